"""From a recipe to a promoted engine, or to the reason why not.

python -m flows optimize RECIPE [--set section.key=value …] [--json]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from prefect import flow

import recipes
from flows.artifacts import publish
from recipes import Recipe
from tasks import registry
from tasks.artifacts import Checkpoint, Dataset, Engine, OnnxModel, Version
from tasks.benchmark import benchmark
from tasks.build import build, host, machine, precision
from tasks.calibrate import calibrate
from tasks.decide import decide
from tasks.evaluate import check, evaluate
from tasks.export import export
from tasks.finetune import finetune
from tasks.load import fingerprint, load_data, load_model
from tasks.manifest import Attempt, metrics
from tasks.measurements import verdict_from_bytes
from tasks.sparsify import sparsify
from tasks.stage import say, timeline


@dataclass(frozen=True)
class Outcome:
    """What a run ended with; `--json` prints it."""

    verdict: Literal["promoted", "registered", "built", "refused"]
    recipe: str
    version: Version
    reasons: tuple[str, ...]
    metrics: dict[str, float]
    attempt: Attempt


@flow(name="optimize", flow_run_name="{recipe}", persist_result=False, validate_parameters=False)
def optimize(recipe: str, overrides: Sequence[str] = ()) -> Outcome:
    """Run one recipe through every stage; a failed run is logged, too."""
    plan = recipes.load(recipe, overrides)
    timeline.clear()
    try:
        return publish(_optimize(plan))
    except Exception as error:
        _log_failure(plan, error)
        raise


def _optimize(recipe: Recipe) -> Outcome:
    # 1. Metric, rows and weights: checked here, before anything costly.
    check(recipe.gate, len(recipe.data.labels))
    found_data = fingerprint(recipe.data.source, recipe.data.revision, "dataset")
    found_model = fingerprint(recipe.model.source, recipe.model.revision)
    data = load_data(recipe.data, recipe.task, found_data)
    start = load_model(recipe.model, recipe.data, recipe.task, found_model, recipe.data.split.seed)

    # 2. The baseline: fine-tuned, not compressed.
    baseline = finetune(start, data, recipe.finetune) if recipe.finetune else start

    # 3. The candidate: pruned, then quantized, then trained again with both on.
    candidate = compress(baseline, data, recipe)

    # 4. Engines of both for the target runtime, and the candidate's for the others.
    checkpoints = {"candidate": candidate, "baseline": baseline}
    onnx, engines = engines_of(checkpoints, data, recipe)
    attempt = Attempt(recipe, data, checkpoints, onnx, engines, timeline=tuple(timeline))

    # 5. Where the target cannot run here, a worker that has it must judge.
    if engines["candidate"].proved != "executed":
        return pending(attempt)

    # 6. Nothing new: the champion is this engine, by this recipe.
    champion = registry.champion(recipe.model.name)
    if champion and registry.made_by(champion, recipe, engines["candidate"]):
        return unchanged(attempt, champion)

    # 7. The champion is measured again, now, on this data and this machine.
    unmeasured = registry.unmeasurable(champion, engines["candidate"]) if champion else None
    judged = {name: engines[name] for name in ("candidate", "baseline")}
    if champion and not unmeasured and not registry.same_engine(champion, engines["candidate"]):
        judged["champion"] = champion.engine
    here, own = machine(recipe.build.runtime), metric_fingerprint(recipe.gate.metric)
    scores = {
        name: evaluate(engine, onnx.get(name), data, recipe.gate.metric, own, here)
        for name, engine in judged.items()
    }
    timing = benchmark(judged, data, recipe.benchmark, recipe.build.threads, here)

    # 8. Judge, register, promote.
    verdict, measurements = decide(judged, scores, timing, data, recipe.gate, unmeasured)
    attempt = replace(
        attempt,
        engines=engines | judged,
        scores=scores,
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
    return _outcome("promoted", attempt, promoted, ())


def compress(baseline: Checkpoint, data: Dataset, recipe: Recipe) -> Checkpoint:
    """Sparsify before quantizing (the reverse prunes nothing), then recover accuracy with both on."""
    model = baseline
    if recipe.sparsify:
        model = sparsify(model, data, recipe.sparsify)
    if recipe.quantize:
        model = calibrate(model, data, recipe.quantize)
    if recipe.qat:
        model = finetune(model, data, recipe.qat)
    return model


def engines_of(
    checkpoints: dict[str, Checkpoint], data: Dataset, recipe: Recipe
) -> tuple[dict[str, OnnxModel], dict[str, Engine]]:
    """ONNX and engines by name: candidate, baseline, and `candidate-RUNTIME` for each of `build.also`."""
    target = recipe.build.runtime
    settings = recipe.build.model_copy(update={"also": ()})
    onnx: dict[str, OnnxModel] = {}
    engines: dict[str, Engine] = {}
    for name, checkpoint in checkpoints.items():
        onnx[name] = export(checkpoint, data, recipe.export, precision(target))
        engines[name] = build(onnx[name], checkpoint, data, settings, target, host(target))
    candidate = checkpoints["candidate"]
    for runtime in recipe.build.also:
        model = export(candidate, data, recipe.export, precision(runtime))
        engines[f"candidate-{runtime}"] = build(model, candidate, data, settings, runtime, host(runtime))
        onnx[f"candidate-{runtime}"] = model
    return onnx, engines


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


def _log_failure(recipe: Recipe, error: Exception) -> None:
    try:
        registry.record_failure(recipe.model_dump(mode="json"), error)
    except Exception as second:  # the first error is the one to tell
        say(f"the failed run could not be logged: {second}")


def metric_fingerprint(metric: str) -> str:
    """The content of a metric of the user's own; nothing for one by name."""
    return fingerprint(metric) if metric.startswith("python:") else ""


def _outcome(verdict: Any, attempt: Attempt, version: Version, reasons: Sequence[str]) -> Outcome:
    return Outcome(verdict, attempt.recipe.name, version, tuple(reasons), metrics(attempt), attempt)
