"""Refit: the champion's plan with this training's weights, proved on real inputs, or the reason why not.

python -m flows retrain MODEL     (stage `refit`)
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks import batches, cache, store, types
from tasks.artifacts import Checkpoint, Dataset, Engine, OnnxModel, Plan
from tasks.engines import module, together
from tasks.engines.common import Built, RefitError
from tasks.stage import stage


@dataclass(frozen=True)
class Refit:
    """The refitted engine, or none and why; seconds that it took or that were lost."""

    engine: Engine | None
    why: str
    seconds: float


@stage(
    uses=("onnx", "onnxruntime", "tensorrt", "tensorrt-rtx", "polygraphy"),
    name="refit",
    gpu=True,
    timeout_seconds=3600,
)
def refit(model: OnnxModel, checkpoint: Checkpoint, dataset: Dataset, champion: Engine, host: str) -> Refit:
    """The champion's plan on `model`'s weights; `host` (see `tasks.build.host`) is part of the cache key.

    Any doubt is a reason to build instead: another graph, runtime or device, weights that do not go in,
    outputs that are not the ONNX's own.
    """
    began = time.perf_counter()
    why = _stranger(model, champion)
    if why:
        return Refit(None, why, time.perf_counter() - began)
    plan = champion.plan
    with store.staging() as folder:
        shutil.copytree(batches.preprocessor(checkpoint), folder / "preprocessor")
        samples = cache.samples(dataset, folder / "preprocessor", store.path(model.blob))
        try:
            made = together.merged(
                {
                    name: _part(plan, model, name, part, folder, samples)
                    for name, part in types.parts(types.load(dataset.type)).items()
                }
            )
        except RefitError as doubt:
            return Refit(None, str(doubt), time.perf_counter() - began)
        engine = Engine(
            plan=plan,
            weights=store.commit(folder / "weights"),
            preprocessor=store.commit(folder / "preprocessor"),
            format=model.format,
            proved=made.proved,
            facts=made.facts,
        )
    why = f"the graph is the champion's ({plan.graph[:12]}), and the outputs are right with the new weights"
    return Refit(engine, why, time.perf_counter() - began)


def _part(
    plan: Plan,
    model: OnnxModel,
    name: str,
    part: types.Graph,
    folder: Path,
    samples: Sequence[types.Example],
) -> Built:
    """One graph's new weights, in the engine's folder."""
    own = [{key: sample[key] for key in part.INPUTS} for sample in samples] if name else samples
    (folder / name).mkdir(exist_ok=True)
    made: Built = module(plan.runtime).refit(
        store.path(plan.blob) / name, store.path(model.blob) / name, folder / name, samples=own
    )
    together.settled(folder, name)
    return made


def _stranger(model: OnnxModel, champion: Engine) -> str:
    """Why the plan cannot be this model's, before anything is tried; empty when it may be."""
    plan, runtime = champion.plan, module(champion.plan.runtime)
    version = runtime.version() if plan.runtime == "onnxruntime" else runtime.version(plan.runtime)
    for what, theirs, ours in (("version", plan.version, version), ("device", plan.device, runtime.device())):
        if theirs != ours:
            return f"the champion's plan is for {plan.runtime} {what} {theirs}, here is {ours}"
    graph = together.graph_of(store.path(model.blob))
    if graph != plan.graph:
        return f"the graph is another one ({graph[:12]}) than the champion's ({plan.graph[:12]})"
    return ""
