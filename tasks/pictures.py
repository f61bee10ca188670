"""Pictures: what a diffusion engine makes of the same starts as the uncompressed one, side by side.

python -m flows optimize RECIPE     (stage `pictures`, diffusion models)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tasks import batches, store, types
from tasks.artifacts import Dataset, Engine, Metrics
from tasks.predictor import Runner
from tasks.running import opened
from tasks.stage import stage

COUNT, ENLARGED, GAP = 6, 96, 4


@stage(uses=("onnxruntime", "pillow"), name="pictures", gpu=True, timeout_seconds=3600)
def pictures(candidate: Engine, baseline: Engine, dataset: Dataset, host: str) -> Metrics:
    """`pair.png`: the baseline's pictures above, the candidate's below, from the same noise and conditioning.

    `host` is part of the cache key.
    """
    above, below = (_made(engine, dataset) for engine in (baseline, candidate))
    off = float(np.sqrt(np.mean(np.square(above - below))) / above.std())
    with store.staging() as folder:
        _draw(above, below, folder / "pair.png")
        return Metrics({"picture_error": off}, store.commit(folder), {"pictures": len(above)})


def _made(engine: Engine, dataset: Dataset) -> np.ndarray:
    kind: Any = types.load(dataset.type)
    examples = batches.inputs(dataset, "calibration", store.path(engine.preprocessor))[:COUNT]
    random = np.random.default_rng(0)
    starts = [{**item, "start": random.standard_normal(item["start"].shape)} for item in examples]
    with opened(engine) as session:
        return np.asarray(kind.pictures(starts, Runner(session, kind)))


def _draw(above: np.ndarray, below: np.ndarray, file: Path) -> None:
    """Two rows of pictures (count, channels, height, width), on one scale from black to white."""
    from PIL import Image

    low, high = above.min(), above.max()
    rows = [
        _strip((np.clip((row - low) / (high - low), 0, 1) * 255).astype(np.uint8)) for row in (above, below)
    ]
    gap = np.full((GAP, *rows[0].shape[1:]), 255, np.uint8)
    Image.fromarray(np.concatenate([rows[0], gap, rows[1]])).save(file)


def _strip(row: np.ndarray) -> np.ndarray:
    """Pictures beside each other: (height, width, 3); the first three channels, or grey."""
    colors = row[:, :3] if row.shape[1] >= 3 else np.repeat(row[:, :1], 3, axis=1)
    times = max(1, ENLARGED // row.shape[-1])
    enlarged = colors.repeat(times, axis=2).repeat(times, axis=3).transpose(0, 2, 3, 1)
    return np.concatenate(
        [np.pad(one, ((0, 0), (0, GAP), (0, 0)), constant_values=255) for one in enlarged], axis=1
    )
