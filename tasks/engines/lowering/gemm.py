"""Quantized MatMul and Gemm: integer product with float outputs, on static scales."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from tasks.engines.lowering.graph import MICROSOFT, Graph, attribute
from tasks.engines.lowering.pairs import Pair, activation, quantized, zero_point


def lower_gemms(graph: Graph) -> list[dict[str, str]]:
    """Every MatMul and Gemm whose both sides are INT8 becomes MatMulIntegerToFloat, bias included."""
    done = []
    for node in graph.of("MatMul", "Gemm"):
        pair = activation(graph, node.input[0])
        weight = _weight(graph, node)
        if pair is not None and weight is not None and _plain(graph, node, weight[1].shape[1]):
            done.append(_lower(graph, node, pair, *weight))
    return done


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
