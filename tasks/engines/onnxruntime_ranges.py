"""How often activations reach the end of a quantizer's range, counted in the pass that answers."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from tasks.engines.lowering import tensors
from tasks.engines.lowering.split import PLAN, WEIGHTS, split
from tasks.engines.lowering.split import load as load_model
from tasks.engines.onnxruntime_session import OrtSession, check_plan, check_weights, start

PREFIX = "at_the_end/"
ENDS = {
    TensorProto.INT8: (-127.0, 127.0),
    TensorProto.UINT8: (1.0, 255.0),
    TensorProto.FLOAT8E4M3FN: (-448.0, 448.0),
}


ZERO_POINTS = {"QuantizeLinear": 2, "QLinearConv": 7, "QLinearMatMul": 7, "QLinearAdd": 7, "QGemm": 8}
"""Where the zero point of what it makes stands among a node's inputs."""


@contextmanager
def counting(plan: Path, weights: Path | None) -> Iterator[OrtSession]:
    """A session whose extra outputs `at_the_end/QUANTIZER` are shares of values at the range's ends.

    `plan` is an engine's plan, or a folder with a Q/DQ `model.onnx` (weights None).
    """
    level = "basic"
    if weights is not None:
        level = check_plan(plan)["level"]
        check_weights(plan, weights)
        model = onnx.load(plan / PLAN, load_external_data=False)
    else:
        model = load_model(plan / PLAN)
    count(model, _values(model, weights))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if weights is None:
            split(model, folder, folder)
        else:
            onnx.save(model, folder / PLAN)
        with start(folder / PLAN, weights or folder, level=level) as session:
            yield session


def count(model: onnx.ModelProto, zero_points: dict[str, int]) -> None:
    """Add to the graph, for each quantized activation, the share of its values at the ends."""
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in list(graph.node):
        zero = _zero_point(node, stored)
        if zero is None or stored[zero].data_type not in ENDS:
            continue
        low, high = ENDS[stored[zero].data_type]
        # Unsigned from zero: what is zero is at home there, not cut off.
        one_sided = stored[zero].data_type == TensorProto.UINT8 and zero_points.get(zero) == 0
        taken = {output.name for output in graph.output}
        name = PREFIX + _short(node.input[0] if node.op_type == "QuantizeLinear" else node.output[0])
        others = (f"{name} {k}" for k in itertools.count(2))
        unique = next(each for each in itertools.chain((name,), others) if each not in taken)
        _count(graph, node.output[0], unique, None if one_sided else low, high)


def _zero_point(node: onnx.NodeProto, stored: dict[str, TensorProto]) -> str | None:
    """The zero point of an activation that the node quantizes; None where it does not."""
    place = ZERO_POINTS.get(node.op_type)
    if place is None or len(node.input) <= place or node.input[0] in stored:
        return None
    return node.input[place] if node.input[place] in stored else None


def shares(outputs: dict[str, np.ndarray]) -> dict[str, float]:
    """The counted shares among a run's outputs, by quantizer."""
    return {
        name.removeprefix(PREFIX): float(value) for name, value in outputs.items() if name.startswith(PREFIX)
    }


def _count(graph: onnx.GraphProto, tensor: str, name: str, low: float | None, high: float) -> None:
    number, result = f"{name}/number", name
    graph.node.append(helper.make_node("Cast", [tensor], [number], to=TensorProto.FLOAT))
    _compare(graph, "GreaterOrEqual", number, high, f"{name}/high")
    at_end = f"{name}/high"
    if low is not None:
        _compare(graph, "LessOrEqual", number, low, f"{name}/low")
        graph.node.append(helper.make_node("Or", [f"{name}/high", f"{name}/low"], [f"{name}/either"]))
        at_end = f"{name}/either"
    graph.node.append(helper.make_node("Cast", [at_end], [f"{name}/float"], to=TensorProto.FLOAT))
    graph.node.append(helper.make_node("ReduceMean", [f"{name}/float"], [result], keepdims=0))
    graph.output.append(helper.make_tensor_value_info(result, TensorProto.FLOAT, []))


def _compare(graph: onnx.GraphProto, operator: str, number: str, bound: float, result: str) -> None:
    graph.initializer.append(helper.make_tensor(f"{result}/bound", TensorProto.FLOAT, [], [bound]))
    graph.node.append(helper.make_node(operator, [number, f"{result}/bound"], [result]))


def _short(tensor: str) -> str:
    """A place in the network from an exported tensor's name: `/model/net/0/Relu_output_0` is `net.0`."""
    whole = tensor.split("/")
    path = whole[:-1] if tensor.startswith("/") and len(whole) > 2 else whole
    return ".".join(part for part in path if part not in ("", "model", "input_quantizer")) or tensor


def _values(model: onnx.ModelProto, weights: Path | None) -> dict[str, int]:
    """Scalar zero points by name, wherever they are kept."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    wanted = {_zero_point(node, stored) for node in model.graph.node}
    found = {
        tensor.name: int(tensors.array(tensor).ravel()[0])
        for tensor in model.graph.initializer
        if tensor.name in wanted
        and not tensors.outside(tensor)
        and tensor.data_type in (TensorProto.INT8, TensorProto.UINT8)
    }
    if weights is not None:
        from safetensors import safe_open

        with safe_open(weights / WEIGHTS, "numpy") as held:
            inside = set(held.keys()) & wanted
            found |= {name: int(held.get_tensor(name).ravel()[0]) for name in inside}
    return found
