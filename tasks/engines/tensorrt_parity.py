"""Is an engine right: its outputs against a reference; and may a refit be used: the policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx.version_converter
from onnx import numpy_helper

from tasks.engines import microscale
from tasks.engines.common import Arrays, RefitError, Samples, Session
from tasks.engines.tensorrt_options import opset

SLACK = 2.0  # a refitted engine may be this many times as far off as a fresh build was
HALF, FLOAT = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
EVALUATED = 20  # the evaluator knows DequantizeLinear from opset 19 on
FLOOR = 2e-3  # error below which FP16 engines differ by kernel choice alone


def error(outputs: Arrays, expected: Arrays) -> float:
    """The worst output's ||a - b|| / ||b||; infinite for a missing output, a wrong shape or a NaN."""
    worst = 0.0
    for name, right in expected.items():
        if name not in outputs or outputs[name].shape != right.shape:
            return float("inf")
        right = np.asarray(right, np.float64)
        gap = float(np.linalg.norm(np.asarray(outputs[name], np.float64) - right))
        share = gap / max(float(np.linalg.norm(right)), 1e-12)
        worst = max(worst, share if np.isfinite(share) else float("inf"))
    return worst


def cosine(outputs: Arrays, expected: Arrays) -> float:
    """The worst output's cosine with its reference."""
    worst = 1.0
    for name, right in expected.items():
        a, b = (np.asarray(x, np.float64).ravel() for x in (outputs[name], right))
        worst = min(worst, float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-300)))
    return worst


def reference(model: Path, samples: Samples) -> list[dict[str, np.ndarray]]:
    """What the graph says, FP16 computed as FP32, by ONNX's own evaluator: slow, but needs no library."""
    return evaluate(onnx.load(model), samples)


def evaluate(graph: onnx.ModelProto, samples: Samples) -> list[dict[str, np.ndarray]]:
    """The same of a loaded graph."""
    from onnx.reference import ReferenceEvaluator

    graph = widened(graph)
    if opset(graph) < EVALUATED:
        graph = onnx.version_converter.convert_version(graph, EVALUATED)
    evaluator = ReferenceEvaluator(graph, new_ops=[*_mended(), *microscale.operators()])
    names = list(evaluator.output_names)
    rows: list[Any] = [evaluator.run(None, dict(sample)) for sample in samples]
    return [dict(zip(names, row, strict=True)) for row in rows]


def _mended() -> list[Any]:
    """Sigmoid, which older evaluators compute number by number, and GatherElements of more than 64 rows."""
    from onnx.reference.op_run import OpRun

    class Sigmoid(OpRun):
        op_domain = ""

        def _run(self, x: np.ndarray) -> tuple[np.ndarray]:
            small = np.exp(-np.abs(x))
            return (np.where(x > 0, 1 / (1 + small), small / (1 + small)).astype(x.dtype),)

    class GatherElements(OpRun):
        op_domain = ""

        def _run(self, data: np.ndarray, indices: np.ndarray, axis: int = 0) -> tuple[np.ndarray]:
            whole = tuple(
                slice(None) if k == axis % data.ndim else slice(n) for k, n in enumerate(indices.shape)
            )
            return (np.take_along_axis(data[whole], indices, axis),)

    return [Sigmoid, GatherElements]


def widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with every FP16 tensor as FP32: NumPy has no fast FP16, and a reference is exact."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    del out.graph.value_info[:]
    for value in (*out.graph.input, *out.graph.output):
        if value.type.tensor_type.elem_type == HALF:
            value.type.tensor_type.elem_type = FLOAT
    for tensor in out.graph.initializer:
        _widen(tensor)
    for node in out.graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                _widen(attribute.t)
            elif attribute.name in ("to", "output_dtype") and attribute.i == HALF:
                attribute.i = FLOAT
    return out


def _widen(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == HALF:
        array = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def measure(session: Session, samples: Samples, expected: Sequence[Arrays]) -> dict[str, float]:
    """Worst error and cosine of a session over all samples."""
    assert len(samples) == len(expected), "one reference for each sample"
    outputs = [session.run(sample) for sample in samples]
    pairs = list(zip(outputs, expected, strict=True))
    return {"error": max(error(a, b) for a, b in pairs), "cosine": min(cosine(a, b) for a, b in pairs)}


def limit(fresh_error: float) -> float:
    """The largest error a refitted engine may have, from a fresh build's own."""
    return max(SLACK * fresh_error, FLOOR)


def verify(
    session: Session, samples: Samples, expected: Sequence[Arrays], fresh_error: float
) -> dict[str, float]:
    """Measure a refitted engine; RefitError when it is further off than a fresh build may be."""
    found = measure(session, samples, expected)
    allowed = limit(fresh_error)
    if not found["error"] <= allowed:
        raise RefitError(
            f"every call of the refit succeeded, yet its outputs are off by {found['error']:.3g} "
            f"(cosine {found['cosine']:.4f}) where a fresh build of this plan was off by {fresh_error:.3g}; "
            f"at most {allowed:.3g} is allowed"
        )
    return found


def decide(
    policy: Literal["auto", "always", "never"], *, safe: bool, tax: float | None, max_tax: float
) -> tuple[bool, str]:
    """Whether to keep a refittable plan, and the sentence that says why; an unsafe refit is never kept."""
    if policy == "never":
        return False, "the recipe says never"
    if not safe:
        return False, "a trial refit of this plan was wrong"
    if policy == "always":
        return True, "the recipe says always, and a trial refit was right"
    if tax is None:
        return False, "the refit tax is not measured"
    if tax > max_tax:
        return False, f"the refit tax is {tax:.1%}, above max_tax {max_tax:.1%}"
    return True, f"a trial refit was right and the refit tax is {tax:.1%}, within max_tax {max_tax:.1%}"
