"""Judge a version that was made where its runtime could not run: build it here, and finish what was left.

python -m flows promote NAME     (where the alias is on a version with gate=pending)
"""

from __future__ import annotations

from dataclasses import replace

from flows.judge import Outcome, judge, own_code
from tasks import lineage, registry
from tasks.artifacts import Engine
from tasks.build import build, host, precision
from tasks.errors import InputError
from tasks.export import export
from tasks.handover import handover
from tasks.manifest import Attempt
from tasks.stage import timeline


def judge_pending(model: str, version: str) -> Outcome:
    """Candidate and baseline built for this host from what the version's run logged, then the gate."""
    waiting = registry.version(model, version)
    recipe, rows = lineage.parsed(waiting), lineage.held_out(waiting)
    if rows is None:
        raise InputError(f"{model} version {version} was registered without its rows; run its recipe here")
    timeline.clear()
    checkpoint = lineage.checkpoint(waiting)
    target = recipe.build.runtime
    settings = recipe.build.model_copy(update={"also": ()})
    onnx = {
        "candidate": export(checkpoint, rows, recipe.export, precision(target, recipe.export.precision)),
        "baseline": lineage.baseline(waiting)[0],
    }
    engines: dict[str, Engine] = {
        name: build(graph, checkpoint, rows, settings, target, host(target)) for name, graph in onnx.items()
    }
    found = lineage.found(waiting) | own_code(recipe)
    handed = handover(checkpoint, rows) if recipe.export.huggingface else None
    made = Attempt(
        recipe,
        rows,
        {"candidate": checkpoint},
        onnx,
        engines,
        found,
        teacher_run=lineage.teacher_run(waiting),
        handover=handed,
    )
    return judge(replace(made, timeline=tuple(timeline)))
