"""Quantized convolutions: integers in, integers out where the next layer takes them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from tasks.engines.lowering.gemm import weight_of
from tasks.engines.lowering.graph import Graph
from tasks.engines.lowering.pairs import Pair, activation, moved, quantized, zero_point

INT32 = np.iinfo(np.int32)


@dataclass(frozen=True)
class Chain:
    """What follows a convolution up to one INT8 QuantizeLinear, all of it the same on integers."""

    between: list[onnx.NodeProto]
    end: onnx.NodeProto
    pair: Pair


def lower_convs(graph: Graph) -> list[dict[str, str]]:
    """Convolutions whose both sides are INT8, and whose results are quantized next, become QLinearConv."""
    done = []
    for node in graph.of("Conv"):
        pair = activation(graph, node.input[0])
        source = weight_of(graph, node.input[1])
        if pair is None or source is None:
            continue
        scales = _scales(graph, pair, source[0], source[1])
        chain = _chain(graph, node)
        if scales is not None and chain is not None and not _bias_fits(graph, node, scales):
            source = _widened(graph, node, source, scales)
            scales = _scales(graph, pair, source[0], source[1])
        if scales is None or chain is None or not _bias_fits(graph, node, scales):
            continue
        _lower(graph, node, pair, source[0], chain, scales)
        done.append({"transform": "conv", "node": node.output[0], "weight": source[0].input[0]})
    return done


def _scales(graph: Graph, pair: Pair, source: onnx.NodeProto, values: np.ndarray) -> np.ndarray | None:
    """Activation scale times weight scale, one for each output channel."""
    weight, data = graph.array(source.input[1]), graph.array(pair.scale)
    axis = next((a.i for a in source.attribute if a.name == "axis"), 1)
    if weight is None or data is None or (weight.size > 1 and axis != 0):
        return None
    return np.broadcast_to(weight.reshape(-1) * data.reshape(()), (values.shape[0],))


def _chain(graph: Graph, node: onnx.NodeProto) -> Chain | None:
    between: list[onnx.NodeProto] = []
    name = node.output[0]
    while True:
        for kind in ("Relu", "MaxPool", "Flatten", "Reshape"):
            user = graph.consumer(name, kind)
            if user is not None and len(user.output) == 1:
                between.append(user)
                name = user.output[0]
                break
        else:
            break
    end = graph.consumer(name, "QuantizeLinear")
    last = graph.consumer(end.output[0], "DequantizeLinear") if end is not None else None
    if end is None or last is None or zero_point(graph, end) is None:
        return None
    pair = activation(graph, last.output[0])
    return Chain(between, end, pair) if pair is not None else None


def _bias_fits(graph: Graph, node: onnx.NodeProto, scales: np.ndarray) -> bool:
    if len(node.input) < 3:
        return True
    bias = graph.array(node.input[2])
    return bias is not None and bool(np.all(np.abs(bias / scales) < INT32.max / 2))


def _widened(
    graph: Graph,
    node: onnx.NodeProto,
    source: tuple[onnx.NodeProto, np.ndarray, np.ndarray],
    scales: np.ndarray,
) -> tuple[onnx.NodeProto, np.ndarray, np.ndarray]:
    """The weights with larger scales in channels whose bias would not fit into 32 bits, where it can be had.

    Such a channel is its bias (a batch norm left weights of next to nothing): what the coarser integers lose
    is a few millionths of it.
    """
    old, values, zero = source
    scale, bias = graph.array(old.input[1]), graph.array(node.input[2])
    if scale is None or bias is None or scale.shape != (len(values),):
        return source
    times = np.maximum(1.0, np.abs(bias / scales) / (INT32.max // 4)).astype(np.float32)
    rows = times.reshape(-1, *[1] * (values.ndim - 1))
    integers = np.rint(values / rows).astype(values.dtype)
    inputs = [
        graph.constant(f"{old.input[0]}.wide", integers),
        graph.constant(f"{old.input[1]}.wide", scale * times),
        *old.input[2:],
    ]
    new = helper.make_node("DequantizeLinear", inputs, list(old.output), name=old.name)
    new.attribute.extend(old.attribute)
    graph.replace([old], [new])
    return new, integers, zero


def _lower(
    graph: Graph, node: onnx.NodeProto, pair: Pair, source: onnx.NodeProto, chain: Chain, scales: np.ndarray
) -> None:
    data, zero = quantized(graph, pair)
    scale = chain.pair.scale
    zero_out = graph.constant(f"{scale}.zero", moved(chain.pair))
    weight_zero = graph.constant(f"{source.input[1]}.zero", np.zeros((), np.int8))
    inputs = [data, pair.scale, zero, source.input[0], source.input[1], weight_zero, scale, zero_out]
    if len(node.input) > 2:
        bias = graph.array(node.input[2])
        assert bias is not None
        inputs.append(graph.constant(f"{node.input[2]}.i32", np.rint(bias / scales).astype(np.int32)))
    outputs = [f"{name}.u8" for name in (node.output[0], *(user.output[0] for user in chain.between))]
    new = [_copy(node, "QLinearConv", inputs, outputs[0])]
    for user, start, end in zip(chain.between, outputs, outputs[1:], strict=False):
        if user.op_type == "Relu":
            new.append(helper.make_node("Clip", [start, zero_out], [end], name=user.output[0]))
        else:
            new.append(_copy(user, user.op_type, [start, *user.input[1:]], end))
    last = graph.consumer(chain.end.output[0], "DequantizeLinear")
    assert last is not None
    new.append(helper.make_node("DequantizeLinear", [outputs[-1], scale, zero_out], [last.output[0]]))
    graph.replace([node, *chain.between, chain.end, last], new)


def _copy(node: onnx.NodeProto, kind: str, inputs: list[str], output: str) -> onnx.NodeProto:
    copy = helper.make_node(kind, inputs, [output], name=node.output[0])
    copy.attribute.extend(node.attribute)
    return copy
