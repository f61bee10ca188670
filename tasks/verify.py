"""Verify a registered version: what is logged, what the gate said, and whether the engine runs here.

python -m flows verify NAME@champion
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from recipes.schema import Recipe
from tasks import deploy, ledger, registry, store
from tasks.artifacts import Engine
from tasks.engines import module
from tasks.engines.common import RefitError
from tasks.errors import InputError
from tasks.measurements import measurements_from_json, same_verdict, verdict_bytes, verdict_from_bytes
from tasks.registry import Registered
from tasks.registry_engine import from_facts


@dataclass(frozen=True)
class Findings:
    """What a version is made of, and the `damage` that nothing overrides."""

    registered: Registered
    recipe: Recipe | None
    engine: Engine | None
    digests: dict[str, str]
    damage: tuple[str, ...]


def verify(model: str, version: str) -> Findings:
    """Its artifacts against their digests and on this machine; their faults are found, not raised."""
    registered = registry.registered(model, version)
    if not registered.run_id:
        return Findings(registered, None, None, {}, ("its artifacts do not open: no run made it",))
    try:
        recipe = registry.recipe_of(registered.run_id)
        manifest = registry.manifest_of(registered.run_id)
        engine = registry.engine_of(model, version)
        digests = engine.digests | {"checkpoint": registry.checkpoint_digest(registered.run_id)}
        damage = [*_differences(digests, manifest), *_differs_from_ledger(registered, digests)]
        damage += [why] if (why := elsewhere(manifest) or _silent(engine)) else []
    except (InputError, KeyError) as error:
        if store.at_fault(error):
            raise
        words = f"its manifest has no {error}" if isinstance(error, KeyError) else str(error)
        return Findings(registered, None, None, {}, (f"its artifacts do not open: {words}",))
    return Findings(registered, recipe, engine, digests, tuple(damage))


def expected(registered: Registered) -> dict[str, str]:
    """The sha256 of each part of the engine that the version's run made; fetched once to this machine."""
    return from_facts(registry.noted(registered.run_id)["engines"]["candidate"]).digests


def recompute(run_id: str) -> tuple[bytes, bool]:
    """The verdict's canonical JSON, judged again from the measurements, and whether the logged one agrees."""
    from tasks.gate import judge  # SciPy, which a rollback has no use for

    logged = registry.judged(run_id)
    recipe = Recipe.model_validate(logged.recipe)
    again = verdict_bytes(judge(measurements_from_json(logged.measurements), recipe.gate))
    return again, same_verdict(again, logged.verdict)


def missing(runtime: str) -> str | None:
    """Why this host cannot execute engines of a runtime; None when it can."""
    if runtime == "onnxruntime":
        return None
    found = module(runtime)
    if found.version(runtime.replace("-", "_")) is None:
        return f"{runtime} is not installed here"
    if not found.executes(runtime.replace("-", "_")):
        return f"{runtime} does not run on this host's GPU ({found.device()})"
    return None


def elsewhere(manifest: dict[str, Any]) -> str | None:
    """Why this host is not the one that the run's engine is for; None when it is."""
    plan = manifest["engines"]["candidate"]["plan"]
    runtime = plan["runtime"]
    if why := missing(runtime):
        return why
    found = module(runtime)
    version = found.version() if runtime == "onnxruntime" else found.version(runtime)
    for what, ours in (("version", version), ("device", found.device())):
        if plan[what] != ours:
            return f"it was made for {runtime} {what} {plan[what]}, here is {ours}"
    return None


def _silent(engine: Engine) -> str | None:
    """Why the engine gives no answer here; None when it does."""
    try:
        found = deploy.ask(engine)
    except (InputError, RefitError) as error:
        if store.at_fault(error):
            raise
        return f"its engine does not open: {error}"
    return None if np.isfinite(found).all() else "its engine answers with NaN or infinity"


def served(findings: Findings) -> str | None:
    """What is wrong with the version in this machine's serving folder, where it serves; None if nothing."""
    model = findings.registered.model
    if deploy.current(model) != findings.registered.version:
        return None
    return deploy.damage(deploy.root() / model / "current", findings.digests)


def word(registered: Registered) -> tuple[str, ...]:
    """What the version's own tags say against it: known at once, with nothing fetched."""
    tags, found = registered.tags, []
    if tags.get("gate") != "passed":
        found.append(f"its gate says {tags.get('gate', 'nothing')}{_because(registered)}")
    if tags.get("proved") != "executed":
        found.append(f"its engine was {tags.get('proved', 'not proved at all')}, not executed on its target")
    return tuple(found)


def judgement(registered: Registered) -> tuple[str, ...]:
    """What a person may override: its tags' word, and the verdict itself, judged again."""
    found = list(word(registered))
    if registered.tags.get("gate") == "pending" or not registered.run_id:
        return tuple(found)
    try:
        verdict, same = recompute(registered.run_id)
    except (InputError, ValueError) as error:
        return (*found, f"its verdict cannot be judged again: {error}")
    if not same:
        found.append("its logged verdict is not what its measurements give")
    again = verdict_from_bytes(verdict)
    if not again.passed and registered.tags.get("gate") == "passed":
        found.append(f"its gate tag says passed, and its measurements do not: {'; '.join(again.reasons)}")
    return tuple(found)


def _because(registered: Registered) -> str:
    first = registered.description.split("\n\n")[0]
    reason = first.partition(": ")[2].rstrip(".")
    return f": {reason}" if reason else ""


def _differences(digests: dict[str, str], manifest: dict[str, Any]) -> list[str]:
    """Parts that are not those of the run's manifest."""
    candidate = manifest["engines"]["candidate"]
    wanted = {
        "plan": candidate["plan"]["blob"]["sha256"],
        "preprocessor": candidate["preprocessor"]["sha256"],
        "checkpoint": manifest["checkpoints"]["candidate"]["blob"]["sha256"],
    }
    if candidate["weights"]:
        wanted["weights"] = candidate["weights"]["sha256"]
    return [
        f"its {name} is not the one that its run made (sha256 {digests.get(name)})"
        for name, digest in wanted.items()
        if digests.get(name) != digest
    ]


def _differs_from_ledger(registered: Registered, digests: dict[str, str]) -> list[str]:
    """Parts that are not those that the ledger saw promoted."""
    lines = ledger.about(ledger.lines(registered.model), registered.version, registered.run_id)
    known = [line for line in lines if line.facts.get("digests")]
    wanted = known[-1].facts["digests"] if known else {}
    return [
        f"its {name} is not the one that was promoted (ledger, line {known[-1].number})"
        for name, digest in wanted.items()
        if digests.get(name) != digest
    ]
