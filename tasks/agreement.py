"""Agreement: does the engine go on with the tokens that the quantized network itself goes on with?

python -m flows optimize RECIPE     (stage `generate`, language models)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tasks import batches, checkpoints, store, types
from tasks.artifacts import Checkpoint, Dataset, Engine, Metrics
from tasks.predictor import Runner
from tasks.running import opened
from tasks.stage import stage

TEXTS, PROMPT = 4, 16


@stage(uses=("torch", "nvidia-modelopt", "onnxruntime"), name="generate", gpu=True, timeout_seconds=3600)
def agreement(engine: Engine, checkpoint: Checkpoint, dataset: Dataset, host: str) -> Metrics:
    """The share of equal tokens, greedily, after the beginnings of a few calibration texts.

    `host` is part of the cache key.
    """
    import torch

    kind: Any = types.load(dataset.type)
    encoded = batches.inputs(dataset, "calibration", store.path(engine.preprocessor))[:TEXTS]
    prompts = [{name: array[:PROMPT] for name, array in item.items() if array.ndim} for item in encoded]
    network, device = checkpoints.restore(checkpoint)[0], checkpoints.device()
    network.to(device)

    def run(examples: Sequence[types.Example]) -> np.ndarray:
        given = batches.tensors(kind.collate(examples))
        with torch.no_grad():
            found = kind.forward(network, {name: tensor.to(device) for name, tensor in given.items()})
        return np.asarray(found.cpu())

    wanted = kind.generate(prompts, run)
    with opened(engine) as session:
        found = kind.generate(prompts, Runner(session, kind))
    equal = np.stack(wanted) == np.stack(found)
    facts = {"texts": len(prompts), "tokens": equal.shape[1], "equal": equal.sum(axis=1).tolist()}
    return Metrics({"greedy_agreement": float(equal.mean())}, facts=facts)
