"""Refit: the champion's plan with this training's weights, proved on real inputs, or the reason why not.

python -m flows retrain MODEL     (stage `refit`)
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass

import onnx

from tasks import batches, cache, store
from tasks.artifacts import Checkpoint, Dataset, Engine, OnnxModel
from tasks.engines import module
from tasks.engines.common import RefitError, graph_digest, model_file
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
            made = module(plan.runtime).refit(
                store.path(plan.blob), store.path(model.blob), folder, samples=samples
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


def _stranger(model: OnnxModel, champion: Engine) -> str:
    """Why the plan cannot be this model's, before anything is tried; empty when it may be."""
    plan, runtime = champion.plan, module(champion.plan.runtime)
    version = runtime.version() if plan.runtime == "onnxruntime" else runtime.version(plan.runtime)
    for what, theirs, ours in (("version", plan.version, version), ("device", plan.device, runtime.device())):
        if theirs != ours:
            return f"the champion's plan is for {plan.runtime} {what} {theirs}, here is {ours}"
    graph = graph_digest(onnx.load(model_file(store.path(model.blob)), load_external_data=False))
    if graph != plan.graph:
        return f"the graph is another one ({graph[:12]}) than the champion's ({plan.graph[:12]})"
    return ""
