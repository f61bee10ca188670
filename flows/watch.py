"""Watch a model in use: do its new inputs still look like what it was calibrated on?

python -m flows watch MODEL --data SOURCE [--json]
"""

from __future__ import annotations

from prefect import flow
from prefect.events import emit_event

import recipes
from flows.retrain import sourced
from tasks import lineage, registry
from tasks.build import machine, precision
from tasks.drift import Drifted, check_rows, compare, survey
from tasks.errors import InputError
from tasks.export import export
from tasks.load import content, load_inputs
from tasks.registry_drift import record
from tasks.stage import timeline


@flow(name="watch", flow_run_name="{model}", persist_result=False, validate_parameters=False)
def watch(model: str, data: str) -> Drifted:
    """One pass of the champion's engine over new, unlabelled inputs; says what they ask for."""
    timeline.clear()
    champion = registry.champion(model)
    if champion is None:
        raise InputError(f"{model} has no champion to watch")
    held = lineage.held_out(champion.version)
    if held is None:
        raise InputError(f"{model} version {champion.version.version} was registered without its rows")
    asked = lineage.recipe(champion.version)
    asked["data"] |= {"source": sourced(data), "revision": None, "query": None}
    recipe = recipes.parse(asked, (), "--data")

    new = load_inputs(recipe.data, recipe.task, content(recipe.data))
    check_rows(new, recipe.drift)
    # ONNX Runtime counts in the engine itself; another runtime's engine is counted in its ONNX.
    model_ = None
    if champion.engine.plan.runtime != "onnxruntime":
        checkpoint = lineage.checkpoint(champion.version)
        model_ = export(checkpoint, held, recipe.export, precision("onnxruntime"))
    here = machine("onnxruntime")
    before = survey(champion.engine, model_, held, "calibration", here)
    found = compare(before, survey(champion.engine, model_, new, "inputs", here), recipe.drift)

    record(champion.version, found)
    if found.asks:
        emit_event(
            "enginehouse.drift",
            resource={"prefect.resource.id": f"enginehouse.model.{model}"},
            payload={"asks": list(found.asks), "reasons": list(found.reasons)},
        )
    return found


def table(model: str, found: Drifted) -> str:
    """What was seen, the furthest first."""
    worst = sorted(found.overflow.items(), key=lambda item: -item[1])[:5]
    lines = [f"{found.rows} new rows"]
    lines += [
        f"  PSI of {name:6} {value:.3f} (by chance up to {found.chance[name]:.3f})"
        for name, value in found.psi.items()
    ]
    lines += [
        f"  {share:8.3%} at the end of {name} (calibration {found.before.get(name, 0.0):.3%})"
        for name, share in worst
    ]
    word = " and ".join(found.asks) or "nothing"
    return "\n".join([*lines, f"ASKS FOR {word.upper()}: {model}", *(f"  {why}" for why in found.reasons)])
