"""What follows once there is an engine, whichever flow made it: measure, judge, register, promote.

python -m flows optimize RECIPE · python -m flows retrain MODEL
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from flows.promote import agree
from recipes import Recipe
from tasks import lineage, registry, registry_run, types
from tasks.agreement import agreement
from tasks.artifacts import Dataset, Engine, Metrics, OnnxModel, Version
from tasks.benchmark import benchmark
from tasks.build import build, host, machine, precision
from tasks.decide import decide
from tasks.evaluate import evaluate
from tasks.export import export
from tasks.load import fingerprint
from tasks.manifest import Attempt, metrics
from tasks.measurements import verdict_from_bytes
from tasks.pictures import pictures
from tasks.previous import previous_rows
from tasks.stage import say, timeline


@dataclass(frozen=True)
class Outcome:
    """What a run ended with; `--json` prints it. Nothing was attempted where nothing had changed."""

    verdict: Literal["promoted", "registered", "built", "refused", "unchanged"]
    recipe: str
    version: Version
    reasons: tuple[str, ...]
    metrics: dict[str, float]
    attempt: Attempt | None = None


def judge(attempt: Attempt) -> Outcome:
    """The outcome of an attempt that has its engines: candidate, baseline, perhaps of other runtimes, too."""
    recipe, candidate = attempt.recipe, attempt.engines["candidate"]

    # 1. Where the target cannot run here, a worker that has it must judge.
    if candidate.proved != "executed":
        return pending(attempt)

    # 2. Nothing new: the champion is this engine, by this recipe. An alias moved by hand is seen to first.
    agree(recipe.model.name)
    champion, own = registry.champion(recipe.model.name), attempt.found.get("metric", "")
    if champion and registry.made_by(champion, recipe, candidate, own):
        return unchanged(attempt, champion)

    # 3. The champion is measured again, now, on this data and this machine.
    judged = {name: attempt.engines[name] for name in ("candidate", "baseline")}
    rival, unmeasured = measurable(champion, attempt) if champion else (None, None)
    if rival and not registry.same_engine(rival, candidate):
        judged["champion"] = rival
    beside = {name: attempt.engines[name] for name in attempt.engines if name == "calibrated"}
    scores = score(judged | beside, attempt.dataset, attempt.onnx, attempt)
    told, drawn = shown(attempt)
    scores["candidate"] = replace(scores["candidate"], values=scores["candidate"].values | told)
    timing = benchmark(
        judged, attempt.dataset, recipe.timing, recipe.build.threads, machine(recipe.build.runtime)
    )

    # 4. Is what the champion had learned still there?
    previous = None
    if champion and "champion" in judged and recipe.gate.max_forgetting is not None:
        previous = forgetting(champion, judged["champion"], attempt)

    # 5. Judge, register, promote, deploy.
    verdict, measurements = decide(
        judged, scores, timing, attempt.dataset, recipe.gate, own, unmeasured, previous
    )
    attempt = replace(
        attempt,
        engines=attempt.engines | judged,
        scores=scores,
        pictures=drawn,
        timing=timing,
        verdict=verdict,
        measurements=measurements,
        timeline=tuple(timeline),
    )
    if not verdict.passed:
        version = registry.register(attempt, "refused", f"Refused: {'; '.join(verdict.reasons)}.")
        return _outcome("refused", attempt, version, verdict.reasons)
    reason = "; ".join(rule.sentence for rule in verdict.rules)
    version = registry.register(attempt, "passed", f"Passed: {reason}.")
    if recipe.promote == "manual":
        return _outcome("registered", attempt, version, ("promotion is manual: set the alias in MLflow",))
    promoted = registry.promote(version, champion.version.version if champion else None)
    done = agree(recipe.model.name)
    if done.champion != version.version:
        return _outcome("refused", attempt, replace(promoted, alias=None), (done.reason,))
    return _outcome("promoted", attempt, promoted, ())


def shown(attempt: Attempt) -> tuple[dict[str, float], Metrics | None]:
    """What a model that generates says or draws beside its reference: numbers to report, and the pictures."""
    kind, here = types.load(attempt.recipe.task), host(attempt.recipe.build.runtime)
    candidate, data = attempt.engines["candidate"], attempt.dataset
    if hasattr(kind, "generate"):
        return agreement(candidate, attempt.checkpoints["candidate"], data, here).values, None
    if hasattr(kind, "pictures"):
        drawn = pictures(candidate, attempt.engines["baseline"], data, here)
        return drawn.values, drawn
    return {}, None


def score(
    engines: dict[str, Engine], data: Dataset, onnx: dict[str, OnnxModel], attempt: Attempt
) -> dict[str, Metrics]:
    """The recipe's metric of each engine over the held-out rows."""
    recipe = attempt.recipe
    metric, own = recipe.gate.metric, attempt.found.get("metric", "")
    here = machine(recipe.build.runtime)
    compared = types.load(recipe.task).REFERENCES == "baseline"
    baseline = attempt.engines["baseline"] if compared else None
    return {
        name: evaluate(engine, onnx.get(name), data, metric, own, here, baseline)
        for name, engine in engines.items()
    }


def own_code(recipe: Recipe) -> dict[str, str]:
    """The fingerprints of what the user wrote: `metric` and `network`, each where it is a `python:` one."""
    places = {"metric": recipe.gate.metric, "network": recipe.model.source}
    return {name: fingerprint(place) for name, place in places.items() if place.startswith("python:")}


def measurable(champion: registry.Champion, attempt: Attempt) -> tuple[Engine | None, str | None]:
    """The champion's engine for this host, or why there is none; one made elsewhere is built again here."""
    candidate = attempt.engines["candidate"]
    why = registry.unmeasurable(champion, candidate)
    if why is None:
        return champion.engine, None
    if not registry.elsewhere(champion, candidate):
        return None, why
    say(f"champion: {why}; building it again from its checkpoint")
    try:
        checkpoint = lineage.checkpoint(champion.version)
        runtime = attempt.recipe.build.runtime
        section = attempt.recipe.export
        model = export(checkpoint, attempt.dataset, section, precision(runtime, section.precision))
        settings = attempt.recipe.build.model_copy(update={"also": ()})
        return build(model, checkpoint, attempt.dataset, settings, runtime, host(runtime)), None
    except Exception as error:
        return None, f"{why}, and it could not be built again here: {error}"


def forgetting(champion: registry.Champion, rival: Engine, attempt: Attempt) -> dict[str, Metrics] | None:
    """Candidate and champion on the rows that the champion was held to; None where they cannot be had."""
    rows = lineage.held_out(champion.version)
    if rows is None:
        return None
    old = previous_rows(rows, attempt.dataset)
    return score({"candidate": attempt.engines["candidate"], "champion": rival}, old, {}, attempt)


def pending(attempt: Attempt) -> Outcome:
    """Register without a verdict: the engine waits for a machine that can run it."""
    engine = attempt.engines["candidate"]
    reason = (
        f"{engine.plan.runtime} cannot execute here (device: {engine.plan.device}), so the engine is only "
        f"{engine.proved}; the gate waits for a worker that has the runtime"
    )
    version = registry.register(attempt, "pending", f"Pending: {reason}.")
    return _outcome("built", attempt, version, (reason,))


def unchanged(attempt: Attempt, champion: registry.Champion) -> Outcome:
    """The verdict and the numbers that the champion was promoted with."""
    logged = registry.judged(champion.version.run_id)
    attempt = replace(attempt, verdict=verdict_from_bytes(logged.verdict))
    return Outcome("promoted", attempt.recipe.name, champion.version, (), logged.metrics, attempt)


def log_failure(recipe: Recipe, error: Exception) -> None:
    """A run that ended in an error is logged, too."""
    try:
        registry_run.record_failure(recipe.model_dump(mode="json"), error)
    except Exception as second:  # the first error is the one to tell
        say(f"the failed run could not be logged: {second}")


def _outcome(verdict: Any, attempt: Attempt, version: Version, reasons: Sequence[str]) -> Outcome:
    return Outcome(verdict, attempt.recipe.name, version, tuple(reasons), metrics(attempt), attempt)
