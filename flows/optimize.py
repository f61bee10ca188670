"""From a recipe to a promoted engine, or to the reason why not.

python -m flows optimize RECIPE [--set section.key=value …] [--json]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from prefect import flow

import recipes
from flows.artifacts import publish
from flows.judge import Outcome, judge, log_failure, own_code
from recipes import Recipe
from tasks import ledger
from tasks.artifacts import Checkpoint, Dataset, Engine, OnnxModel
from tasks.build import build, check_build, host, precision
from tasks.calibrate import calibrate, check_calibration, needs
from tasks.evaluate import check
from tasks.export import export
from tasks.finetune import check_training, finetune
from tasks.handover import handover
from tasks.load import content, fingerprint, load_data, load_model, tokenizer
from tasks.manifest import Attempt
from tasks.observe import observe
from tasks.registry_training import live
from tasks.sparsify import sparsify
from tasks.stage import timeline
from tasks.strip import strip


@flow(name="optimize", flow_run_name="{recipe}", persist_result=False, validate_parameters=False)
def optimize(recipe: str, overrides: Sequence[str] = ()) -> Outcome:
    """Run one recipe through every stage; a failed run is logged, too."""
    plan = recipes.load(recipe, overrides)
    timeline.clear()
    try:
        with live(plan.name):
            return publish(_optimize(plan))
    except Exception as error:
        log_failure(plan, error)
        raise


def _optimize(recipe: Recipe) -> Outcome:
    # 1. Ledger, metric, rows and weights: checked here, before anything costly.
    ledger.address()
    check(recipe.gate, recipe.task, len(recipe.data.labels))
    check_build(recipe.build, recipe.quantize.format if recipe.quantize else None, recipe.export.opset)
    check_calibration(recipe.quantize)
    check_training((recipe.finetune, recipe.qat))
    found = {
        "data": content(recipe.data),
        "checkpoint": fingerprint(recipe.model.source, recipe.model.revision),
        **own_code(recipe),
    }
    data = load_data(recipe.data, recipe.task, found["data"])
    known = (found["checkpoint"], recipe.data.split.seed, tokenizer(recipe.model))
    start = load_model(recipe.model, recipe.data, recipe.task, *known)

    # 2. The baseline, not compressed: fine-tuned, or what a checkpoint was before it was.
    if recipe.compressed_elsewhere:
        checkpoints = {"candidate": start, "baseline": strip(start)}
    else:
        baseline = finetune(start, data, recipe.finetune) if recipe.finetune else start

        # 3. The candidate: pruned, then quantized, then trained again with both on.
        calibrated = compress(baseline, data, recipe)
        candidate = recover(calibrated, baseline, data, recipe)
        checkpoints = {"candidate": candidate, "baseline": baseline}
        if recipe.compare_calibrated:
            checkpoints["calibrated"] = calibrated
    controls = control(checkpoints["baseline"], data, recipe) if recipe.compare_dense else {}

    # 4. Engines of each for the target runtime, and the candidate's for the others.
    onnx, engines = engines_of(checkpoints, data, recipe)
    handed = handover(checkpoints["candidate"], data) if recipe.export.huggingface else None

    # 5. Measure beside baseline and champion, judge, register, promote.
    attempt = Attempt(recipe, data, checkpoints, onnx, engines, found, controls=controls, handover=handed)
    return judge(replace(attempt, timeline=tuple(timeline)))


def compress(model: Checkpoint, data: Dataset, recipe: Recipe) -> Checkpoint:
    """Sparsify before quantizing; the reverse prunes nothing."""
    if recipe.sparsify:
        model = sparsify(model, data, recipe.sparsify)
    if recipe.quantize:
        kind = needs(recipe.quantize)
        seen = observe(model, data, recipe.quantize.batch_size, kind) if kind else None
        model = calibrate(model, data, recipe.quantize, seen)
    return model


def recover(model: Checkpoint, baseline: Checkpoint, data: Dataset, recipe: Recipe) -> Checkpoint:
    """Train with mask and quantizers on, where the recipe says so."""
    if recipe.qat is None:
        return model
    return finetune(model, data, recipe.qat, baseline if recipe.qat.distill else None)


def control(baseline: Checkpoint, data: Dataset, recipe: Recipe) -> dict[str, Checkpoint]:
    """What the candidate's curve stands beside: the same training of the dense and of the sparse network."""
    assert recipe.sparsify
    assert recipe.qat
    teacher = baseline if recipe.qat.distill else None
    starts = {"dense": baseline, "sparse": sparsify(baseline, data, recipe.sparsify)}
    return {name: finetune(start, data, recipe.qat, teacher) for name, start in starts.items()}


def engines_of(
    checkpoints: dict[str, Checkpoint], data: Dataset, recipe: Recipe
) -> tuple[dict[str, OnnxModel], dict[str, Engine]]:
    """ONNX and engines by the checkpoints' names, and `candidate-RUNTIME` for each of `build.also`."""
    target = recipe.build.runtime
    settings = recipe.build.model_copy(update={"also": ()})
    onnx: dict[str, OnnxModel] = {}
    engines: dict[str, Engine] = {}
    for name, checkpoint in checkpoints.items():
        numbers = precision(target, recipe.precision_of(name))
        onnx[name] = export(checkpoint, data, recipe.export, numbers)
        engines[name] = build(onnx[name], checkpoint, data, settings, target, host(target))
    candidate = checkpoints["candidate"]
    for runtime in recipe.build.also:
        model = export(candidate, data, recipe.export, precision(runtime, recipe.export.precision))
        engines[f"candidate-{runtime}"] = build(model, candidate, data, settings, runtime, host(runtime))
        onnx[f"candidate-{runtime}"] = model
    return onnx, engines
