"""Quantized MatMul and Gemm: integer product with float outputs, on static scales."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from tasks.engines.lowering.graph import MICROSOFT, Graph, attribute


@dataclass(frozen=True)
class Pair:
    """An activation between Q and DQ: the value before, or else the integers, and the numbers."""

    value: str
    integers: str
    scale: str
    zero: np.ndarray


def lower_gemms(graph: Graph) -> list[dict[str, str]]:
    """Every MatMul and Gemm whose both sides are INT8 becomes MatMulIntegerToFloat, bias included."""
    done = []
    for node in graph.of("MatMul", "Gemm"):
        pair = activation(graph, node.input[0])
        weight = _weight(graph, node)
        if pair is not None and weight is not None and _plain(graph, node, weight[1].shape[1]):
            done.append(_lower(graph, node, pair, *weight))
    return done


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
    output = f"{pair.value}/{pair.scale}.u8"
    if graph.producer(output) is None:
        graph.add(helper.make_node("QuantizeLinear", [pair.value, pair.scale, zero], [output]))
    return output, zero


def moved(pair: Pair) -> np.ndarray:
    """The zero point among unsigned numbers."""
    return np.array(int(pair.zero.reshape(())) + (128 if pair.zero.dtype == np.int8 else 0), np.uint8)


def weight_of(graph: Graph, name: str) -> tuple[onnx.NodeProto, np.ndarray, np.ndarray] | None:
    """A weight's DequantizeLinear, its INT8 values and zero point."""
    node = graph.producer(name, "DequantizeLinear")
    values = graph.array(node.input[0]) if node is not None else None
    if node is None or values is None or values.dtype != np.int8:
        return None
    zero = zero_point(graph, node) if len(node.input) > 2 else np.zeros((), np.int8)
    return None if zero is None or np.any(zero) else (node, values, zero)


def _weight(graph: Graph, node: onnx.NodeProto) -> tuple[onnx.NodeProto, np.ndarray] | None:
    """The weight's DequantizeLinear and its values as (K, N), when one scale serves each column or all."""
    name, turned = node.input[1], bool(attribute(node, "transB", 0))
    transpose = graph.producer(name, "Transpose")
    if transpose is not None and attribute(transpose, "perm") == [1, 0]:
        name, turned = transpose.input[0], not turned
    found = weight_of(graph, name)
    if found is None or found[1].ndim != 2:
        return None
    source, values, _ = found
    scale = graph.array(source.input[1])
    axis = attribute(source, "axis", 1) % 2
    if (
        scale is None
        or (scale.size > 1 and axis != (0 if turned else 1))
        or attribute(source, "block_size", 0)
    ):
        return None
    return source, values.T if turned else values


def _plain(graph: Graph, node: onnx.NodeProto, columns: int) -> bool:
    """Whether a Gemm is no more than a product and a bias vector."""
    bias = node.input[2] if len(node.input) > 2 else ""
    return node.op_type == "MatMul" or (
        attribute(node, "alpha", 1.0) == 1.0
        and attribute(node, "beta", 1.0) == 1.0
        and not attribute(node, "transA", 0)
        and (not bias or bool(_vector(graph, bias, columns)))
    )


def _lower(
    graph: Graph, node: onnx.NodeProto, pair: Pair, source: onnx.NodeProto, values: np.ndarray
) -> dict[str, str]:
    bias, last = _bias(graph, node, values.shape[1])
    data, zero = quantized(graph, pair)
    weight = graph.constant(f"{source.input[0]}.kn", values)
    weight_zero = graph.constant(f"{source.input[1]}.zero", np.zeros((), np.int8))
    inputs = [data, weight, pair.scale, source.input[1], zero, weight_zero, bias]
    new = helper.make_node(
        "MatMulIntegerToFloat", inputs, [last.output[0]], domain=MICROSOFT, name=last.output[0]
    )
    graph.replace({id(n): n for n in (node, last)}.values(), [new])
    return {"transform": "gemm", "node": last.output[0], "weight": source.input[0]}


def _bias(graph: Graph, node: onnx.NodeProto, columns: int) -> tuple[str, onnx.NodeProto]:
    """The bias vector ("" without one) and the last node that it takes in."""
    if node.op_type == "Gemm" and len(node.input) > 2 and node.input[2]:
        return node.input[2], node
    add = graph.consumer(node.output[0], "Add")
    if add is not None:
        for name in add.input:
            if _vector(graph, name, columns):
                return name, add
    return "", node


def _vector(graph: Graph, name: str, columns: int) -> str:
    value = graph.array(name)
    return name if value is not None and value.shape == (columns,) and value.dtype == np.float32 else ""


def _equal(graph: Graph, one: str, other: str) -> bool:
    first, second = graph.array(one), graph.array(other)
    return one == other or (first is not None and second is not None and np.array_equal(first, second))
