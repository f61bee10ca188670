"""Retrain a registered model: train on from the champion, refit its plan or build, judge, promote.

python -m flows retrain MODEL [--data SOURCE] [--checkpoint DIR] [--recipe RECIPE] [--rebuild] [--json]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefect import flow

import recipes
from flows.artifacts import publish
from flows.judge import Outcome, judge, log_failure, own_code
from flows.optimize import compress, recover
from recipes import Recipe
from recipes.build import Build, Runtime
from tasks import ledger, lineage, registry
from tasks.artifacts import Checkpoint, Dataset, Engine, OnnxModel, Version
from tasks.build import build, check_build, host, precision
from tasks.calibrate import check_calibration, recalibrate
from tasks.errors import InputError
from tasks.evaluate import check
from tasks.export import export
from tasks.finetune import check_training, finetune
from tasks.handover import format_of, handover
from tasks.load import content, fingerprint, load_data, load_model, tokenizer
from tasks.manifest import Attempt
from tasks.refit import Refit, refit
from tasks.registry_training import live
from tasks.slots import alone
from tasks.stage import say, timeline
from tasks.strip import strip


@flow(name="retrain", flow_run_name="{model}", persist_result=False, validate_parameters=False)
def retrain(
    model: str,
    data: str | None = None,
    checkpoint: str | None = None,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    rebuild: bool = False,
) -> Outcome:
    """Bring a registered model up to its data or to a new checkpoint; a second retrain of it waits."""
    with alone(f"retrain-{model}"):
        champion = registry.current(model)
        if champion is None:
            raise InputError(
                f"{model} has no champion to retrain: python -m flows optimize RECIPE comes first"
            )
        plan = planned(champion, data, recipe, overrides)
        timeline.clear()
        try:
            with live(plan.name):
                return publish(_retrain(plan, champion, checkpoint, rebuild))
        except Exception as error:
            log_failure(plan, error)
            raise


def planned(champion: Version, data: str | None, recipe: str | None, overrides: Sequence[str]) -> Recipe:
    """The champion's recipe or a newer one, on the data asked for."""
    if recipe:
        wanted = recipes.load(recipe, overrides)
        if wanted.model.name != champion.model:
            raise InputError(f"recipe {recipe} is of model {wanted.model.name}, not of {champion.model}")
    else:
        where = f"the recipe of {champion.model} version {champion.version}"
        wanted = recipes.parse(lineage.recipe(champion), overrides, where)
    if data is None:
        return wanted
    changed = wanted.model_dump(mode="json")
    changed["data"] |= {"source": sourced(data), "revision": None}
    return recipes.parse(changed, (), "--data")


def sourced(place: str) -> str:
    """A source as recipes write it: a plain path is one, and a folder with ModelOpt's state says so."""
    if place.split(":")[0] in ("hub", "path", "package", "python", "modelopt"):
        return place
    return f"{'modelopt' if (Path(place) / 'modelopt_state.pth').is_file() else 'path'}:{place}"


def _retrain(recipe: Recipe, champion: Version, given: str | None, rebuild: bool) -> Outcome:
    # 1. What changed? Nothing: nothing is done.
    ledger.address()
    check(recipe.gate, recipe.task, len(recipe.data.labels))
    check_build(recipe.build, recipe.quantize.format if recipe.quantize else None, recipe.export.opset)
    check_calibration(recipe.quantize)
    check_training((recipe.finetune, recipe.qat, recipe.retrain))
    source = sourced(given) if given else recipe.model.source if recipe.compressed_elsewhere else None
    if source and recipe.compressed_elsewhere and not source.startswith("modelopt:"):
        raise InputError(
            f"--checkpoint: {source} is not pruned or quantized, and this model's recipe does neither; give "
            "a folder with modelopt_state.pth, or a recipe that compresses (--recipe)"
        )
    lineage.check_inputs(champion, recipe, given=source is not None)
    found = {"data": content(recipe.data), **own_code(recipe)}
    if source:
        found["checkpoint"] = fingerprint(source)
    latest = lineage.latest(recipe.model.name)
    if latest and not rebuild and not changed(recipe, found, latest):
        return unchanged(recipe, latest)

    # 2. Rows, and weights to go on from.
    data = load_data(recipe.data, recipe.task, found["data"])
    if source:
        model = recipe.model.model_copy(update={"source": source})
        known = (found["checkpoint"], recipe.data.split.seed, tokenizer(model))
        start = load_model(model, recipe.data, recipe.task, *known)
        elsewhere = source.startswith("modelopt:")
        if recipe.export.huggingface and elsewhere:
            format_of(start)
        candidate = start if elsewhere else recover(compress(start, data, recipe), start, data, recipe)
    else:
        start = lineage.checkpoint(champion)
        candidate = train_on(start, data, recipe, champion)

    # 3. Refit the champion's plan, if that is proved to be right; build otherwise.
    target = recipe.build.runtime
    onnx = export(candidate, data, recipe.export, precision(target, recipe.export.precision))
    found_champion = registry.champion(recipe.model.name)
    tried = refitted(onnx, candidate, data, found_champion, rebuild, target)
    engine = tried.engine or build(onnx, candidate, data, _settings(recipe), target, host(target))
    baseline_onnx, baseline = reference(champion, candidate, data, recipe)
    handed = handover(candidate, data) if recipe.export.huggingface else None

    # 4. Measure beside baseline and champion, on new and on earlier rows, judge, register, promote.
    attempt = Attempt(
        recipe,
        data,
        {"candidate": candidate},
        {"candidate": onnx, "baseline": baseline_onnx},
        {"candidate": engine, "baseline": baseline},
        found,
        story(champion, tried, engine, found_champion),
        lineage.teacher_run(champion),
        handover=handed,
        timeline=tuple(timeline),
    )
    return judge(attempt)


def changed(recipe: Recipe, found: dict[str, str], latest: lineage.Latest) -> list[str]:
    """What differs from the last attempt at this model: recipe, data, checkpoint, the user's own code."""
    now = {"recipe": registry.recipe_content(recipe), **found}
    different = [name for name, digest in now.items() if digest != getattr(latest, name)]
    say(f"changed since version {latest.version.version}: {', '.join(different) or 'nothing'}")
    return different


def unchanged(recipe: Recipe, latest: lineage.Latest) -> Outcome:
    """Nothing to do; says which version holds the answer."""
    version = latest.version
    why = f"recipe and data are those of version {version.version} (gate={version.gate}); nothing was trained"
    return Outcome("unchanged", recipe.name, version, (why,), {})


def train_on(start: Checkpoint, data: Dataset, recipe: Recipe, champion: Version) -> Checkpoint:
    """Train the champion's network further, with its mask and quantizers where the recipe still has them.

    Ranges are calibrated again first. Another way of compressing starts from the same weights without any.
    """
    before = lineage.parsed(champion)
    if recipe.qat and (recipe.sparsify, recipe.quantize) == (before.sparsify, before.quantize):
        section = recipe.retrain or recipe.qat
        teacher = lineage.teacher(champion) if section.distill else None
        ranged = recalibrate(start, data, recipe.quantize) if recipe.quantize else start
        return finetune(ranged, data, section, teacher)
    dense = strip(start)
    training = recipe.retrain or recipe.finetune
    if training:
        dense = finetune(dense, data, training.model_copy(update={"distill": None}))
    return recover(compress(dense, data, recipe), dense, data, recipe)


def refitted(
    onnx: OnnxModel,
    candidate: Checkpoint,
    data: Dataset,
    champion: registry.Champion | None,
    rebuild: bool,
    target: Runtime,
) -> Refit:
    """The champion's plan with the new weights, or why not."""
    if rebuild:
        return Refit(None, "a build was asked for (--rebuild)", 0.0)
    if champion is None or champion.engine.plan.runtime.replace("_", "-") != target:
        return Refit(None, f"the champion has no plan for {target}", 0.0)
    tried = refit(onnx, candidate, data, champion.engine, host(target))
    say(f"refit: {tried.why}")
    return tried


def reference(
    champion: Version, candidate: Checkpoint, data: Dataset, recipe: Recipe
) -> tuple[OnnxModel, Engine]:
    """The champion's uncompressed baseline, built again where its engine is of another runtime or device."""
    model, engine = lineage.baseline(champion)
    target = recipe.build.runtime
    if f"{engine.plan.device}, {target} {engine.plan.version}" == host(target):
        return model, engine
    return model, build(model, candidate, data, _settings(recipe), target, host(target))


def story(
    champion: Version, tried: Refit, engine: Engine, parent: registry.Champion | None
) -> dict[str, object]:
    """How the engine came to be: refitted or built, why, and the seconds of both where both are known."""
    built = engine.facts if tried.engine is None else parent.engine.facts if parent else {}
    build_seconds = built.get("build_seconds", lineage.build_seconds(champion))
    seconds = {"refit": tried.seconds or None, "build": build_seconds}
    return {
        "from_version": champion.version,
        "baseline_run": lineage.baseline_run(champion),
        "engine": "refitted" if tried.engine else "built",
        "why": tried.why,
        "seconds": seconds,
    }


def _settings(recipe: Recipe) -> Build:
    return recipe.build.model_copy(update={"also": ()})
