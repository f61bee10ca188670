"""Q/DQ nodes put into an ONNX graph with onnx alone: INT8 or FP8, weights kept, or stored in eight bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

INT8_MAX, FP8_MAX = 127.0, 448.0


def weights_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """The constant matrix of each MatMul and Gemm, by node name."""
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    return {
        node.name: numpy_helper.to_array(values[node.input[1]])
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in values
    }


def insert(
    model: onnx.ModelProto, amax: Mapping[str, float], kind: str, *, fold: bool, tables: bool = False
) -> onnx.ModelProto:
    """A copy in which each MatMul and Gemm named in `amax` (largest input seen) runs in `kind`.

    kind: int8 (weights per output channel) or fp8 (per tensor). fold: store the weights in eight bits with
    DequantizeLinear alone, else keep them and quantize in the graph (what TensorRT 8.6 reads).
    tables: store embedding tables and convolution kernels in eight bits too; they compute as before.
    """
    out = onnx.ModelProto()
    out.CopyFrom(model)
    values = {tensor.name: tensor for tensor in out.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    done: dict[str, str] = {}
    fresh = _Fresh(out.graph)
    for node in out.graph.node:
        place = {"Gather": 0, "Conv": 1}.get(node.op_type) if tables else None
        if node.name in amax and node.input[1] in values:
            nodes += _activation(fresh, node, amax[node.name], kind, values[node.input[1]].data_type, done)
            nodes += _weight(fresh, values, node, 1, kind, fold, done)
        elif place is not None and node.input[place] in values and _is_large(values[node.input[place]]):
            nodes += _weight(fresh, values, node, place, kind, fold, done)
        nodes.append(node)
    del out.graph.node[:]
    out.graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in out.graph.initializer if tensor.name in used]
    del out.graph.initializer[:]
    out.graph.initializer.extend(kept)
    return out


def _is_large(tensor: onnx.TensorProto) -> bool:
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16)
    return tensor.data_type in floats and len(tensor.dims) >= 2 and int(np.prod(tensor.dims)) >= 4096


class _Fresh:
    """New tensors and short names in a graph."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph, self.count = graph, 0

    def name(self, kind: str) -> str:
        self.count += 1
        return f"{kind}{self.count}"

    def scale(self, values: np.ndarray, data_type: int, kind: str) -> tuple[str, str]:
        """A scale and its zero point, as initializers."""
        scale, zero = self.name("s"), self.name("z")
        dtype = helper.tensor_dtype_to_np_dtype(data_type)
        self.graph.initializer.append(numpy_helper.from_array(values.astype(dtype), scale))
        quantized = TensorProto.INT8 if kind == "int8" else TensorProto.FLOAT8E4M3FN
        raw = bytes(int(np.prod(values.shape)))
        self.graph.initializer.append(helper.make_tensor(zero, quantized, values.shape, raw, raw=True))
        return scale, zero


def _activation(
    fresh: _Fresh, node: onnx.NodeProto, largest: float, kind: str, data_type: int, done: dict[str, str]
) -> Iterator[onnx.NodeProto]:
    """Q/DQ before a node; nodes of one input and one range share theirs, as query, key and value do."""
    name = f"{node.input[0]} {largest}"
    if name in done:
        node.input[0] = done[name]
        return
    top = INT8_MAX if kind == "int8" else FP8_MAX
    scale, zero = fresh.scale(np.array(max(largest, 1e-6) / top), data_type, kind)
    quantized, back = fresh.name("q"), fresh.name("d")
    yield helper.make_node("QuantizeLinear", [node.input[0], scale, zero], [quantized], name=quantized)
    yield helper.make_node("DequantizeLinear", [quantized, scale, zero], [back], name=back)
    node.input[0] = done[name] = back


def _weight(
    fresh: _Fresh,
    values: Mapping[str, onnx.TensorProto],
    node: onnx.NodeProto,
    place: int,
    kind: str,
    fold: bool,
    done: dict[str, str],
) -> Iterator[onnx.NodeProto]:
    """Dequantized weights in the place of the float ones; a tensor used twice is quantized once."""
    name = node.input[place]
    if name in done:
        node.input[place] = done[name]
        return
    array, data_type = numpy_helper.to_array(values[name]), values[name].data_type
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    axis = 0 if transposed or node.op_type in ("Gather", "Conv") else 1
    per_channel = kind == "int8"
    others = tuple(i for i in range(array.ndim) if i != axis) if per_channel else None
    largest = np.abs(array.astype(np.float32)).max(axis=others)
    scales = np.maximum(largest, 1e-6) / (INT8_MAX if per_channel else FP8_MAX)
    scale, zero = fresh.scale(np.asarray(scales), data_type, kind)
    extra: Any = {"axis": axis} if per_channel else {}
    quantized, back = fresh.name("q"), fresh.name("d")
    if fold:
        shaped = np.expand_dims(scales, others) if others else scales
        fresh.graph.initializer.append(_stored(array, shaped, kind, quantized))
    else:
        yield helper.make_node("QuantizeLinear", [name, scale, zero], [quantized], name=quantized, **extra)
    yield helper.make_node("DequantizeLinear", [quantized, scale, zero], [back], name=back, **extra)
    node.input[place] = done[name] = back


def _stored(array: np.ndarray, scales: np.ndarray, kind: str, name: str) -> onnx.TensorProto:
    """The weights in eight bits."""
    ratio = array.astype(np.float32) / scales
    if kind == "int8":
        return numpy_helper.from_array(np.clip(np.rint(ratio), -128, 127).astype(np.int8), name)
    import ml_dtypes

    raw = ratio.astype(ml_dtypes.float8_e4m3fn).tobytes()
    return helper.make_tensor(name, TensorProto.FLOAT8E4M3FN, array.shape, raw, raw=True)
