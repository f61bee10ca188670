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
from tasks.measurements import measurements_from_json, verdict_bytes, verdict_from_bytes
from tasks.registry import Registered


@dataclass(frozen=True)
class Findings:
    """What speaks against a version: `damage` always, `judgement` unless a person has overridden it."""

    registered: Registered
    recipe: Recipe | None
    engine: Engine | None
    digests: dict[str, str]
    damage: tuple[str, ...]
    judgement: tuple[str, ...]


def verify(model: str, version: str) -> Findings:
    """Everything that can be checked without deploying; what is wrong is found, not raised."""
    registered = registry.registered(model, version)
    judgement = _judgement(registered)
    try:
        recipe = registry.recipe_of(registered.run_id)
        manifest = registry.manifest_of(registered.run_id)
        engine = registry.engine_of(model, version)
        digests = digests_of(engine) | {"checkpoint": registry.checkpoint_digest(registered.run_id)}
        damage = [*_differences(digests, manifest), *_differs_from_ledger(model, version, digests)]
        damage += [why] if (why := elsewhere(manifest) or _silent(engine)) else []
    except (InputError, KeyError) as error:
        if store.full():
            raise
        words = f"its manifest has no {error}" if isinstance(error, KeyError) else str(error)
        return Findings(registered, None, None, {}, (f"its artifacts do not open: {words}",), judgement)
    return Findings(registered, recipe, engine, digests, tuple(damage), judgement)


def digests_of(engine: Engine) -> dict[str, str]:
    """The sha256 of each part of an engine."""
    found = {"plan": engine.plan.blob.sha256, "preprocessor": engine.preprocessor.sha256}
    return found | ({"weights": engine.weights.sha256} if engine.weights else {})


def recompute(run_id: str) -> tuple[bytes, bool]:
    """The verdict's canonical JSON, judged again from the measurements, and whether it is what was logged."""
    from tasks.gate import judge  # SciPy, which a rollback has no use for

    logged = registry.judged(run_id)
    recipe = Recipe.model_validate(logged.recipe)
    again = verdict_bytes(judge(measurements_from_json(logged.measurements), recipe.gate))
    return again, again == logged.verdict


def elsewhere(manifest: dict[str, Any]) -> str | None:
    """Why this host is not the one that the engine is for; None when it is."""
    plan = manifest["engines"]["candidate"]["plan"]
    runtime = plan["runtime"]
    if runtime != "onnxruntime":
        from tasks.engines.tensorrt_api import can_execute, gpu

        return None if can_execute(runtime) else f"it is for {runtime} on {plan['device']}; here is {gpu()}"
    here = {"version": module(runtime).version(), "device": module(runtime).device()}
    if plan["device"].startswith("cpu"):
        for what, ours in here.items():
            if plan[what] != ours:
                return f"it was made for {runtime} {what} {plan[what]}, here is {ours}"
    return None


def _silent(engine: Engine) -> str | None:
    """Why the engine gives no answer here; None when it does."""
    try:
        found = deploy.ask(engine)
    except (InputError, RefitError) as error:
        return f"its engine does not open: {error}"
    return None if np.isfinite(found).all() else "its engine answers with NaN or infinity"


def served(model: str, version: str) -> str | None:
    """What is wrong with the version in this machine's serving folder, where it serves; None if nothing."""
    if deploy.current(model) != version:
        return None
    return deploy.damage(deploy.root() / model / "current")


def _judgement(registered: Registered) -> tuple[str, ...]:
    """Gate tag, evidence, and the verdict itself, judged again."""
    tags, found = registered.tags, []
    if tags.get("gate") != "passed":
        found.append(f"its gate says {tags.get('gate', 'nothing')}{_because(registered)}")
    if tags.get("proved") != "executed":
        found.append(f"its engine was {tags.get('proved', 'not proved at all')}, not executed on its target")
    if tags.get("gate") == "pending":
        return tuple(found)
    try:
        verdict, same = recompute(registered.run_id)
    except (InputError, ValueError) as error:
        return (*found, f"its verdict cannot be judged again: {error}")
    if not same:
        found.append("its logged verdict is not what its measurements give")
    again = verdict_from_bytes(verdict)
    if not again.passed and tags.get("gate") == "passed":
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


def _differs_from_ledger(model: str, version: str, digests: dict[str, str]) -> list[str]:
    """Parts that are not those that the ledger saw promoted."""
    known = [line for line in ledger.lines(model) if line.after == version and line.facts.get("digests")]
    wanted = known[-1].facts["digests"] if known else {}
    return [
        f"its {name} is not the one that was promoted (ledger, line {known[-1].number})"
        for name, digest in wanted.items()
        if digests.get(name) != digest
    ]
