"""What stands around convolutions and can be said without a node of its own: zeros before, ReLU6 behind."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from tasks.engines.lowering.graph import Graph

PAIR = ("QuantizeLinear", "DequantizeLinear")


def take_in_padding(graph: Graph) -> list[dict[str, str]]:
    """Zeros put around an image become the convolution's own; exact, as zero is always exactly quantized."""
    done = []
    for node in graph.of("Pad"):
        pads, convolution = _zeros(graph, node), _behind(graph, node.output[0])
        if pads is None or convolution is None:
            continue
        own = next((item for item in convolution.attribute if item.name == "pads"), None)
        if own is None:
            own = helper.make_attribute("pads", [0] * len(pads))
            convolution.attribute.append(own)
            own = convolution.attribute[-1]
        own.ints[:] = [a + b for a, b in zip(own.ints, pads, strict=True)]
        graph.remove(node)
        graph.rename(node.output[0], node.input[0])
        done.append({"transform": "padding", "node": convolution.output[0]})
    return done


def _zeros(graph: Graph, node: onnx.NodeProto) -> list[int] | None:
    """How many zeros before and behind each of the image's axes; None for any other padding."""
    mode = next((item.s for item in node.attribute if item.name == "mode"), b"constant")
    value = graph.array(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(())
    pads = graph.array(node.input[1])
    if mode != b"constant" or len(node.input) > 3 or value is None or value.any() or pads is None:
        return None
    rank = len(pads) // 2
    before, behind = pads[:rank], pads[rank:]
    if before[:2].any() or behind[:2].any() or (pads < 0).any():
        return None
    return [int(n) for n in (*before[2:], *behind[2:])]


def _behind(graph: Graph, name: str) -> onnx.NodeProto | None:
    """The convolution that is the only user of a value, perhaps behind Q and DQ."""
    for kind in PAIR:
        user = graph.consumer(name, kind)
        if user is not None and user.input[0] == name:
            name = user.output[0]
    found = graph.consumer(name, "Conv")
    if found is None or found.input[0] != name:
        return None
    fixed = any(item.name == "auto_pad" and item.s != b"NOTSET" for item in found.attribute)
    return None if fixed else found


def clips_as_relus(graph: Graph) -> list[dict[str, str]]:
    """ReLU6 before a quantizer that cannot hold more than 6 is ReLU: the integers saturate by themselves."""
    done = []
    for node in graph.of("Clip"):
        end = graph.consumer(node.output[0], "QuantizeLinear")
        if end is None or len(node.input) < 3 or not _saturates(graph, node, end):
            continue
        relu = helper.make_node("Relu", [node.input[0]], [node.output[0]], name=node.name)
        graph.replace([node], [relu])
        done.append({"transform": "relu6", "node": node.output[0]})
    return done


def _saturates(graph: Graph, node: onnx.NodeProto, end: onnx.NodeProto) -> bool:
    """Whether the range is from 0 to what becomes the largest integer."""
    low, high = (graph.array(name) for name in node.input[1:3])
    scale, zero = (graph.array(name) for name in end.input[1:3]) if len(end.input) > 2 else (None, None)
    if low is None or high is None or scale is None or zero is None or scale.size != 1:
        return False
    if zero.dtype not in (np.int8, np.uint8):
        return False
    return bool(low == 0 and np.rint(high / scale) + zero >= np.iinfo(zero.dtype).max)
