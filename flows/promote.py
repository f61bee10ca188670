"""Bring MLflow's alias, the ledger and the serving folder into agreement; roll back.

    python -m flows promote NAME
    python -m flows rollback NAME [--to V] [--by NAME] [--reason TEXT]

A person moves the alias in MLflow; a webhook or the schedule starts `promote`, which may be run at any time
and as often as one likes: where everything agrees it does nothing.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from prefect import flow, task
from prefect.context import FlowRunContext

from flows import history
from recipes.schema import Deploy
from tasks import deploy, ledger, registry, registry_alias, verify
from tasks.artifacts import Facts
from tasks.errors import InputError
from tasks.stage import passing, say
from tasks.verify import Findings

Action = Literal["nothing", "deployed", "promoted", "refused", "withdrawn", "rolled-back"]
PERSON = "alias in MLflow"
JUDGING = "judging"
"""The tag of a version whose judging was begun: how often."""
TRIES = 3


@dataclass(frozen=True)
class Agreement:
    """What was done for a model, the champion that it ended with, and why."""

    model: str
    action: Action
    champion: str | None
    reason: str = ""
    seconds: float = 0.0


@flow(name="promote", flow_run_name="{model}", persist_result=False)
def promote(model: str) -> Agreement:
    """One model; what is away meanwhile (MLflow, the database) is waited for."""
    done: Agreement = _agree_on()(model)
    return done


@flow(name="reconcile", persist_result=False)
def reconcile() -> list[Agreement]:
    """Every registered model; one that fails does not keep the others from it."""
    states = [(model, _agree_on()(model, return_state=True)) for model in registry_alias.models()]
    failed = [f"{model}: {state.message}" for model, state in states if not state.is_completed()]
    if failed:
        raise RuntimeError("; ".join(failed))
    return [state.result() for _, state in states]


def _agree_on() -> Any:
    """`agree` as a task that waits while MLflow or the database is away."""
    return task(
        name="agree", retries=20, retry_delay_seconds=6, retry_condition_fn=passing, persist_result=False
    )(agree)


@flow(name="rollback", flow_run_name="{model}", persist_result=False)
def rollback(
    model: str, to: str | None = None, by: str = "rollback flow", reason: str = "rolled back"
) -> Agreement:
    """The champion before this one, or version `to`."""
    return back(model, to, by, reason)


def agree(model: str) -> Agreement:
    """Compare alias, ledger and serving folder, and do what is missing; safe to repeat after any crash."""
    started = time.perf_counter()
    judged = _judge(model)
    with ledger.held(model):
        registry_alias.settle(model)
        known, holder = ledger.lines(model), registry_alias.alias_of(model)
        champion = ledger.champion(known)
        if holder and not known and "gate" not in registry.registered(model, holder).tags:
            done = Agreement(model, "nothing", holder, "this model is not Enginehouse's")
        elif holder == champion:
            done = _serve(model, champion)
        elif holder is None:
            done = _withdraw(model, champion)
        else:
            done = _take(model, champion, holder)
    if judged and done.action == "nothing":
        done = replace(judged, champion=done.champion)
    if done.action != "nothing":
        say(f"{model}: {done.action}, champion {done.champion}{f' ({done.reason})' if done.reason else ''}")
        publish(model)
    return Agreement(model, done.action, done.champion, done.reason, time.perf_counter() - started)


def _judge(model: str) -> Agreement | None:
    """Have judged what waits for its gate, and say what came of it; None where nothing does.

    The model is not held meanwhile: judging takes long, and may promote.
    """
    if _asked(model) is None:
        return None
    try:
        with ledger.held(f"{model}, judging", patience=0.01):
            version = _asked(model)
            return gate_pending(model, version) if version else None
    except ledger.Busy:  # another process is at it, or this very one, whose judging ends in an agreement, too
        return None


def _asked(model: str) -> str | None:
    """The version to judge: one that the alias was put on, else one that was begun and can be judged here."""
    holder = registry_alias.alias_of(model)
    if holder and registry.registered(model, holder).tags.get("gate") == "pending":
        return holder
    begun = (registry.registered(model, version) for version in registry_alias.tagged(model, JUDGING))
    return next((found.version for found in begun if not verify.missing(found.tags["runtime"])), None)


def gate_pending(model: str, version: str) -> Agreement | None:
    """Have a version that waits for its gate judged here; refused where it cannot be, with the reason.

    Meanwhile the alias goes back, and a tag says that judging was begun: should the process end, the next
    look goes on. What comes of it is a version of its own, since its engine is one.
    """
    from flows.pending import judge_pending

    registered = registry.registered(model, version)
    begun = int(registered.tags.get(JUDGING, "0"))
    try:
        _judgeable(registered, begun)
        with _held(model) as champion:
            if not begun and registry_alias.alias_of(model) != version:
                return None
            first = "its gate is pending; it is judged first"
            _refuse(model, champion, version, first, {JUDGING: str(begun + 1)})
        outcome = judge_pending(model, version)
    except InputError as error:
        with _held(model) as champion:
            return _refuse(model, champion, version, str(error), drop=[JUDGING])
    number, verdict = outcome.version.version, outcome.verdict
    told = {"gated_as": number}
    drop = [registry_alias.REFUSED, JUDGING]
    registry_alias.note(model, version, f"Judged as version {number}: {verdict}.", told, drop)
    actions: dict[str, Action] = {"promoted": "promoted", "refused": "refused"}
    reason = "; ".join([f"version {version} was judged as version {number}", *outcome.reasons])
    return Agreement(model, actions.get(verdict, "nothing"), None, reason)


def _judgeable(registered: registry.Registered, begun: int) -> None:
    """Raise InputError where this machine cannot judge the version, or has tried often enough."""
    manifest = registry.manifest_of(registered.run_id)
    if why := verify.missing(manifest["engines"]["candidate"]["plan"]["runtime"]):
        raise InputError(f"its gate is pending, and {why}: a worker that has the runtime must judge it first")
    if begun >= TRIES:
        raise InputError(
            f"judging it was begun {begun} times and never finished; "
            "see why in the worker's log, then set the alias on it again"
        )


@contextmanager
def _held(model: str) -> Iterator[str | None]:
    """The model held, with nothing left open: its champion."""
    with ledger.held(model):
        registry_alias.settle(model)
        yield ledger.champion(ledger.lines(model))


def _take(model: str, champion: str | None, version: str) -> Agreement:
    """A person put the alias on this version: promote it, or put the alias back."""
    registered = registry.registered(model, version)
    allowed = ledger.override(ledger.lines(model), version)
    if not allowed and (against := verify.word(registered)):
        return _refuse(model, champion, version, "; ".join(against))
    findings = verify.verify(model, version)
    problems = findings.damage + (() if allowed else verify.judgement(registered))
    if problems:
        return _refuse(model, champion, version, "; ".join(problems))
    section = findings.recipe.deploy if findings.recipe else None
    try:
        _prepare(findings, section)
    except deploy.Unfit as unfit:
        return _refuse(model, champion, version, f"it cannot serve here: {unfit}")
    if (now := registry_alias.alias_of(model)) != version:
        return Agreement(model, "nothing", champion, f"the alias moved on to version {now}; look again")
    actor = allowed.actor if allowed else PERSON
    reason = f"override: {allowed.reason}" if allowed else "the alias was set on it"
    run, facts = findings.registered.run_id, {"digests": findings.digests}
    registry_alias.move(model, champion, version, "promoted", actor, reason, run, facts)
    return _switch(findings, section, "promoted")


def _refuse(
    model: str,
    champion: str | None,
    version: str,
    reason: str,
    tags: dict[str, str] | None = None,
    drop: Sequence[str] = (),
) -> Agreement:
    """The reason on the version and in the ledger, then the alias back where it was."""
    words = f"Not promoted ({_now()}): {reason}."
    registry_alias.note(model, version, words, {registry_alias.REFUSED: reason, **(tags or {})}, drop)
    run = registry.registered(model, version).run_id
    ledger.append(model, "refused", actor=PERSON, before=champion, after=version, run_id=run, reason=reason)
    if registry_alias.alias_of(model) == version:
        registry_alias.set_alias(model, champion)
    return Agreement(model, "refused", champion, f"version {version}: {reason}")


def _withdraw(model: str, champion: str | None) -> Agreement:
    """A person took the alias off: there is no champion, and what serves goes on serving."""
    reason = "the alias was taken off; what is deployed goes on serving"
    ledger.append(model, "withdrawn", actor=PERSON, before=champion, reason=reason)
    return Agreement(model, "withdrawn", None, reason)


def _serve(model: str, champion: str | None) -> Agreement:
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
        _prepare(findings, recipe.deploy)
    except deploy.Unfit as unfit:
        return _demote(findings, str(unfit))
    return _switch(findings, recipe.deploy, "deployed")


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


def _prepare(findings: Findings, section: Deploy | None) -> None:
    model, version = findings.registered.model, findings.registered.version
    if section is None or deploy.intact(model, version, findings.digests):
        return
    assert findings.recipe is not None
    assert findings.engine is not None
    build = findings.recipe.build
    deploy.prepare(model, version, findings.engine, build.max_batch, section, build.threads)


def _switch(findings: Findings, section: Deploy | None, action: Action) -> Agreement:
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
        model, version, f"Not deployed ({_now()}): {reason}.", {registry_alias.REFUSED: reason}
    )
    return Agreement(model, "refused", before, why)


def _before(model: str, version: str) -> str | None:
    """The champion before this version that is still there; None where a person withdrew it."""
    known = ledger.lines(model)
    withdrawn = max((line.number for line in known if line.event == "withdrawn"), default=0)
    return _last(model, [line for line in known if line.number > withdrawn], version)


def _last(model: str, known: Sequence[ledger.Line], but: str | None) -> str | None:
    """The last champion but one that these lines tell of and MLflow still has."""
    earlier = (held for held in reversed(ledger.champions(known)) if held != but)
    return next((held for held in earlier if registry_alias.exists(model, held)), None)


def back(model: str, to: str | None, by: str, reason: str) -> Agreement:
    """Restore alias and engine of an earlier champion; quick while it lies in the serving folder."""
    started = time.perf_counter()
    with ledger.held(model):
        registry_alias.settle(model)
        known = ledger.lines(model)
        champion = ledger.champion(known)
        version = to or _earlier(model, known)
        if version == champion:
            raise InputError(f"version {version} of {model} is champion already")
        findings = _candidate(model, version, known)
        section = findings.recipe.deploy if findings.recipe else None
        try:
            _prepare(findings, section)
        except deploy.Unfit as unfit:
            raise InputError(f"version {version} of {model} cannot serve here: {unfit}") from unfit
        run = findings.registered.run_id
        registry_alias.move(model, champion, version, "rolled-back", by, reason, run)
        done = _switch(findings, section, "rolled-back")
    publish(model)
    return Agreement(model, done.action, done.champion, done.reason, time.perf_counter() - started)


def _earlier(model: str, known: Sequence[ledger.Line]) -> str:
    earlier = _last(model, known, ledger.champion(known))
    if earlier is None:
        raise InputError(f"{model} has had no other champion that is still there; name a version with --to")
    return earlier


def _candidate(model: str, version: str, known: Sequence[ledger.Line]) -> Findings:
    """A version to roll back to: whole, and once champion, passed or overridden."""
    if version in ledger.champions(known):
        registered = registry.registered(model, version)
        digests = verify.expected(registered)
        if deploy.intact(model, version, digests):
            return Findings(registered, registry.recipe_of(registered.run_id), None, digests, ())
    findings = verify.verify(model, version)
    trusted = version in ledger.champions(known) or ledger.override(known, version)
    problems = findings.damage + (() if trusted else verify.judgement(findings.registered))
    if problems:
        raise InputError(f"version {version} of {model} cannot be champion: {'; '.join(problems)}")
    return findings


def override(model: str, version: str, by: str, reason: str) -> ledger.Line:
    """Let a version be promoted though its gate refused it; damage is never overridden."""
    run = registry.registered(model, version).run_id
    champion = ledger.champion(ledger.lines(model))
    return ledger.append(
        model, "override", actor=by, before=champion, after=version, run_id=run, reason=reason
    )


def publish(model: str) -> None:
    """The ledger as a table in Prefect's UI, when this is a flow run there."""
    if FlowRunContext.get() is None:
        return
    from prefect.artifacts import create_table_artifact

    key = re.sub(r"[^a-z0-9]+", "-", f"history-{model}".lower()).strip("-")
    words = f"Every move of {model}'s champion, newest first."
    create_table_artifact(table=history.rows(model), key=key, description=words)


def _now() -> str:
    return _readable(datetime.now(UTC).isoformat())


def _readable(moment: str) -> str:
    return f"{moment[:19].replace('T', ' ')} UTC"
