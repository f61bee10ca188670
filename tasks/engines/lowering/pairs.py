"""QuantizeLinear and DequantizeLinear around one activation: found, shared, dropped, made unsigned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from tasks.engines.lowering.graph import Graph, attribute

SELECTIONS = ("MaxPool", "Flatten", "Reshape")


@dataclass(frozen=True)
class Pair:
    """An activation between Q and DQ: the value before, or else the integers, and the numbers."""

    value: str
    integers: str
    scale: str
    zero: np.ndarray


def share_pairs(graph: Graph) -> None:
    """Q and DQ nodes that do the same to one value become one (query, key and value of one input)."""
    for kind in ("QuantizeLinear", "DequantizeLinear"):
        first: dict[tuple[object, ...], str] = {}
        for node in graph.of(kind):
            if any(graph.array(name) is None for name in node.input[1:]) or node.output[0] in graph.outputs:
                continue
            numbers = [graph.array(name) for name in node.input[1:]]
            values = [(n.dtype.str, n.shape, n.tobytes()) for n in numbers if n is not None]
            attributes = sorted(a.SerializeToString(deterministic=True) for a in node.attribute)
            kept = first.setdefault((node.input[0], *values, *attributes), node.output[0])
            if kept != node.output[0]:
                graph.remove(node)
                graph.rename(node.output[0], kept)


def drop_pairs(graph: Graph) -> None:
    """A Q/DQ pair goes when all that follows is a selection of its values, quantized just so again.

    Rounding to one grid keeps the order of values, so it may as well happen once, after the selection.
    """
    for node in graph.of(*SELECTIONS):
        pair = activation(graph, node.input[0])
        after = _quantized_after(graph, node)
        if pair is None or after is None or not pair.value or len(graph.consumers(node.input[0])) > 1:
            continue
        zero = zero_point(graph, after)
        if _equal(graph, pair.scale, after.input[1]) and zero is not None and _same_grid(zero, pair.zero):
            new = onnx.NodeProto()
            new.CopyFrom(node)
            new.input[0] = pair.value
            graph.replace([node], [new])


def _quantized_after(graph: Graph, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """The QuantizeLinear that a value runs into, alone, through nothing but selections."""
    while not graph.outputs.intersection(node.output):
        users = [user for name in node.output for user in graph.consumers(name)]
        if len(users) != 1 or users[0].op_type not in SELECTIONS:
            return users[0] if len(users) == 1 and users[0].op_type == "QuantizeLinear" else None
        node = users[0]
    return None


def activation(graph: Graph, name: str) -> Pair | None:
    """The Q/DQ pair that ends in this value, when it is one 8-bit integer scale for the whole tensor."""
    last = graph.producer(name, "DequantizeLinear")
    if last is None or len(last.input) < 3:
        return None
    scale, zero = graph.array(last.input[1]), zero_point(graph, last)
    if scale is None or zero is None or scale.size != 1:
        return None
    first = graph.producer(last.input[0])
    if first is not None and first.op_type == "QuantizeLinear":
        same = all(_equal(graph, a, b) for a, b in zip(first.input[1:], last.input[1:], strict=True))
        return Pair(first.input[0], "", last.input[1], zero) if same else None
    if first is None or zero.dtype != np.uint8:
        return None
    return Pair("", last.input[0], last.input[1], zero)


def zero_point(graph: Graph, node: onnx.NodeProto) -> np.ndarray | None:
    """A Q or DQ node's 8-bit integer zero point; None for other types and for computed ones."""
    if len(node.input) < 3 or not node.input[2]:
        kind = attribute(node, "output_dtype", onnx.TensorProto.UINT8)
        kinds = {onnx.TensorProto.UINT8: np.uint8, onnx.TensorProto.INT8: np.int8}
        return np.zeros((), kinds[kind]) if kind in kinds and node.op_type == "QuantizeLinear" else None
    zero = graph.array(node.input[2])
    return zero if zero is not None and zero.dtype in (np.int8, np.uint8) else None


def quantized(graph: Graph, pair: Pair) -> tuple[str, str]:
    """The activation as uint8 and its zero point: int8 moved by 128, the same numbers exactly."""
    zero = graph.constant(f"{pair.scale}.zero", moved(pair))
    if pair.integers:
        return pair.integers, zero
    output = f"{pair.value}/{zero.removesuffix('.zero')}.u8"
    if graph.producer(output) is None:
        graph.add(helper.make_node("QuantizeLinear", [pair.value, pair.scale, zero], [output]))
    return output, zero


def moved(pair: Pair) -> np.ndarray:
    """The zero point among unsigned numbers."""
    return np.array(int(pair.zero.reshape(())) + (128 if pair.zero.dtype == np.int8 else 0), np.uint8)


def _same_grid(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether zero points are equal, range and all: int8 and uint8 around 0 end elsewhere."""
    return one.dtype == other.dtype and bool(one == other)


def _equal(graph: Graph, one: str, other: str) -> bool:
    first, second = graph.array(one), graph.array(other)
    return one == other or (first is not None and second is not None and np.array_equal(first, second))
