"""How far an optimized graph may be from what the graph says, and how far it is.

A quantized network can be unsteady by itself: one value rounded the other way moves others in every
later layer. MiniLM in INT8 answers a change of one in a million in its float weights with outputs moved
by 0.3 of the largest. No lowering can be nearer to the reference than the reference is to itself, so
the limit is a fixed one or three times that noise, whichever is larger, and never above a ceiling.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from tasks.artifacts import Facts
from tasks.engines.common import Arrays, Samples
from tasks.engines.lowering import tensors
from tasks.engines.lowering.split import PLAN, split
from tasks.engines.onnxruntime_session import start

LIMITS = {"max_error_share": 0.10, "mean_error_share": 0.02}
CEILINGS = {"max_error_share": 0.75, "mean_error_share": 0.35}  # a wrong graph is off by whole outputs
NOISE, TIMES, TRIES = 1e-6, 3.0, 2


def parity(expected: Sequence[Arrays], got: Sequence[Arrays]) -> dict[str, float]:
    """Maximum and mean absolute error, and both as shares of the largest value: those of the worst output.

    Equal values have no error, even infinite ones; any other value that is not finite has an infinite one.
    """
    found = [
        _output_errors([(want[name], out[name]) for want, out in zip(expected, got, strict=True)])
        for name in expected[0]
    ]
    return {key: max(errors[key] for errors in found) for key in found[0]}


def _output_errors(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """One output's, over all samples."""
    errors = np.concatenate([_errors(want, got) for want, got in pairs])
    scale = max(float(np.abs(want[np.isfinite(want)]).max(initial=0.0)) for want, _ in pairs) or 1.0
    largest, mean = float(errors.max()), float(errors.mean())
    return {
        "max_error": largest,
        "mean_error": mean,
        "max_error_share": largest / scale,
        "mean_error_share": mean / scale,
    }


def agrees(errors: dict[str, float], limits: dict[str, float]) -> bool:
    """Whether both shares are within their limits."""
    return all(errors[name] <= limit for name, limit in limits.items())


def reference(model: onnx.ModelProto, samples: Samples, threads: int | None) -> list[dict[str, np.ndarray]]:
    """What the graph says: its outputs without any optimization."""
    with tempfile.TemporaryDirectory(dir=tensors.place()) as name:
        split(model, Path(name), Path(name))
        with start(Path(name) / PLAN, Path(name), level="disabled", threads=threads) as session:
            return [session.run(sample) for sample in samples]


def limits(
    model: onnx.ModelProto, expected: Sequence[Arrays], samples: Samples, threads: int | None
) -> tuple[dict[str, float], Facts]:
    """The limits for this graph, and the noise that they come from (none without quantization)."""
    if not any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        return dict(LIMITS), {}
    noises = [parity(expected, reference(_shaken(model, k), samples, threads)) for k in range(TRIES)]
    noise = {name: max(found[name] for found in noises) for name in LIMITS}
    return {k: min(max(v, TIMES * noise[k]), CEILINGS[k]) for k, v in LIMITS.items()}, {"own_noise": noise}


def _shaken(model: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """The model with one part in a million added to or taken from every float weight."""
    random = np.random.default_rng(seed)

    def shake(values: np.ndarray) -> np.ndarray:
        signs = random.choice(np.array([-1, 1], np.float32), values.shape)
        return np.asarray(values * (1 + np.float32(NOISE) * signs))

    shaken = onnx.ModelProto()
    shaken.CopyFrom(model)
    for tensor in shaken.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims):
            tensor.CopyFrom(tensors.changed(tensor, shake))
    return shaken


def _errors(want: np.ndarray, got: np.ndarray) -> np.ndarray:
    if want.shape != got.shape:
        return np.array([np.inf])
    with np.errstate(invalid="ignore"):
        difference = np.abs(want.astype(np.float64) - got.astype(np.float64)).ravel()
    difference[(want == got).ravel()] = 0.0
    return np.where(np.isfinite(difference), difference, np.inf)
