"""Deploy a champion on this machine, or say why it cannot serve and make the one before it champion again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from recipes.schema import Deploy
from tasks import deploy, ledger, registry, registry_alias, verify
from tasks.artifacts import Facts
from tasks.verify import Findings

Action = Literal["nothing", "deployed", "promoted", "refused", "withdrawn", "rolled-back"]


@dataclass(frozen=True)
class Agreement:
    """What was done for a model, the champion that it ended with, and why."""

    model: str
    action: Action
    champion: str | None
    reason: str = ""
    seconds: float = 0.0


def serve(model: str, champion: str | None) -> Agreement:
    """Deploy the champion where this machine does not serve it yet and can."""
    nothing = Agreement(model, "nothing", champion)
    if champion is None or _deployed_here(registered := registry.registered(model, champion)):
        return nothing
    run_id = registered.run_id
    recipe = registry.recipe_of(run_id)
    if recipe.deploy is None or verify.elsewhere(registry.manifest_of(run_id)):
        return nothing
    findings = verify.verify(model, champion)
    try:
        if findings.damage:
            raise deploy.Unfit("; ".join(findings.damage))
        prepare(findings, recipe.deploy)
    except deploy.Unfit as unfit:
        return _demote(findings, str(unfit))
    return switch(findings, recipe.deploy, "deployed")


def _deployed_here(registered: registry.Registered) -> bool:
    """Whether this very engine serves on this machine, undamaged, and the ledger says so."""
    model, version = registered.model, registered.version
    deployed = [line for line in ledger.lines(model) if line.event == "deployed"]
    here = [line for line in deployed if line.facts.get("place") == deploy.place()]
    if not here or here[-1].after != version or deploy.current(model) != version:
        return False
    digests, told = verify.expected(registered), here[-1].facts.get("digests", {})
    if any(told.get(name, digest) != digest for name, digest in digests.items()):
        return False
    return deploy.intact(model, version, digests)


def prepare(findings: Findings, section: Deploy | None) -> None:
    """Lay the version out here, where it is to be deployed; raises deploy.Unfit when it cannot serve."""
    model, version = findings.registered.model, findings.registered.version
    if section is None or deploy.intact(model, version, findings.digests):
        return
    assert findings.recipe is not None
    assert findings.engine is not None
    build = findings.recipe.build
    deploy.prepare(model, version, findings.engine, build.max_batch, section, build.threads)


def switch(findings: Findings, section: Deploy | None, action: Action) -> Agreement:
    """Let the new champion serve; should its smoke request fail, the one before is champion again."""
    model, version = findings.registered.model, findings.registered.version
    made = [line for line in ledger.lines(model) if line.event in ledger.SETTLED and line.after == version][
        -1
    ]
    tags = {"promoted_by": made.actor, "promoted_at": made.at}
    words = f"Champion since {_readable(made.at)}, by {made.actor}"
    if section is not None:
        try:
            done = deploy.switch(model, version, section)
        except deploy.Unfit as unfit:
            return _demote(findings, str(unfit))
        if action == "deployed" or done.before != version or not _deployed_here(findings.registered):
            _record(findings, done, made.actor)
        tags["deployed"] = deploy.place()
        words += f"; deployed to {deploy.place()}"
    last = ledger.lines(model)[-1]
    tags["ledger"] = f"{last.number} {last.sha256}"
    registry_alias.note(model, version, f"{words}.", tags, drop=[registry_alias.REFUSED])
    if made.before and made.before != version and registry_alias.exists(model, made.before):
        until = f"Champion until {_readable(made.at)}, when version {version} followed."
        registry_alias.note(model, made.before, until, {}, drop=["deployed"])
    return Agreement(model, action, version)


def _record(findings: Findings, done: deploy.Switched, actor: str) -> None:
    facts: Facts = {"place": deploy.place(), "seconds": round(done.seconds, 3)}
    if findings.digests:
        facts["digests"] = findings.digests
    model, run = findings.registered.model, findings.registered.run_id
    ledger.append(
        model, "deployed", actor=actor, before=done.before, after=done.after, run_id=run, facts=facts
    )


def _demote(findings: Findings, reason: str) -> Agreement:
    """The champion cannot serve: say so, and make the one before it champion again, if there is one."""
    model, version = findings.registered.model, findings.registered.version
    before = _before(model, version)
    facts = {"place": deploy.place()}
    serving = deploy.current(model)
    ledger.append(
        model, "deploy-failed", actor="deployment", before=serving, after=version, reason=reason, facts=facts
    )
    why = f"version {version} cannot serve: {reason}"
    registry_alias.move(model, version, before, "put-back", "deployment", why)
    registry_alias.note(
        model, version, f"Not deployed ({now()}): {reason}.", {registry_alias.REFUSED: reason}
    )
    return Agreement(model, "refused", before, why)


def _before(model: str, version: str) -> str | None:
    """The champion before this version that is still there; None where a person withdrew it."""
    known = ledger.lines(model)
    withdrawn = max((line.number for line in known if line.event == "withdrawn"), default=0)
    return last_champion(model, [line for line in known if line.number > withdrawn], version)


def last_champion(model: str, known: Sequence[ledger.Line], but: str | None) -> str | None:
    """The last champion but one that these lines tell of and MLflow still has."""
    earlier = (held for held in reversed(ledger.champions(known)) if held != but)
    return next((held for held in earlier if registry_alias.exists(model, held)), None)


def now() -> str:
    """The time, for people, in UTC."""
    return _readable(datetime.now(UTC).isoformat())


def _readable(moment: str) -> str:
    return f"{moment[:19].replace('T', ' ')} UTC"
