"""Weights of an exported graph in the storage they are quantized to, and under their parameters' names."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx
    from torch import nn

Key = tuple[tuple[int, ...], str, bytes]
TURNED = ".T"
STORED = "_quantized"


def fold(model: onnx.ModelProto) -> None:
    """Constants become initializers, quantized weights INT8 (ModelOpt leaves Q and DQ on FP32)."""
    from onnx import numpy_helper

    graph = model.graph
    for node in [node for node in graph.node if node.op_type == "Constant"]:
        tensor = next(item.t for item in node.attribute if item.name == "value")
        tensor.name = node.output[0]
        graph.initializer.append(tensor)
        graph.node.remove(node)
    _without_aliases(graph)
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] in stored]:
        axis = next((item.i for item in node.attribute if item.name == "axis"), 1)
        weight, scale, zero = (numpy_helper.to_array(stored[name]) for name in node.input)
        name = _store(stored, f"{node.input[0]}{STORED}", quantize_weight(weight, scale, zero, axis))
        for user in graph.node:
            user.input[:] = [name if item == node.output[0] else item for item in user.input]
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in stored.values() if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _without_aliases(graph: onnx.GraphProto) -> None:
    """Who takes a stored tensor through Identity takes the tensor: the exporter stores equal ones once.

    They are those of layers that share a weight, or of one that runs more than once.
    """
    stored = {tensor.name for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    aliases = [node for node in graph.node if node.op_type == "Identity" and node.input[0] in stored]
    sources = {node.output[0]: node.input[0] for node in aliases if node.output[0] not in outputs}
    for node in graph.node:
        node.input[:] = [sources.get(name, name) for name in node.input]
    for node in aliases:
        if node.output[0] in sources:
            graph.node.remove(node)


def _store(stored: dict[str, onnx.TensorProto], name: str, values: np.ndarray) -> str:
    """Add the values under the name, numbered where others have it; what is there already serves again."""
    from onnx import numpy_helper

    unique, number = name, 1
    while unique in stored and not np.array_equal(numpy_helper.to_array(stored[unique]), values):
        number += 1
        unique = f"{name}_{number}"
    stored[unique] = numpy_helper.from_array(values, unique)
    return unique


def quantize_weight(weight: np.ndarray, scale: np.ndarray, zero: np.ndarray, axis: int) -> np.ndarray:
    """ONNX QuantizeLinear for INT8: round half to even, saturate; `scale` is scalar or along `axis`."""
    assert zero.dtype == np.int8, f"only INT8 weights are folded here, got {zero.dtype}"
    shape = [-1 if k == axis else 1 for k in range(weight.ndim)] if scale.ndim else []
    scaled = np.rint(weight / scale.reshape(shape)) + zero.astype(np.float32).reshape(shape)
    folded: np.ndarray = np.clip(scaled, -128, 127).astype(np.int8)
    return folded


def name_weights(model: onnx.ModelProto, network: nn.Module, most: int | None = None) -> None:
    """Give weights that the tracer renamed (turned around, or behind a mask) their parameter's name.

    They are found by value; one that was `onnx::MatMul_17` and turned is `model.LAYER.weight.T`. Weights
    of more than `most` bytes are not looked for: they are outside the graph, under their names.
    """
    from onnx import numpy_helper

    known = _weights(network, most)
    taken = {tensor.name for tensor in model.graph.initializer}
    names: dict[str, str] = {}
    for tensor in model.graph.initializer:
        if tensor.name.startswith("model.") or len(tensor.dims) < 2:
            continue
        found = known.get(_key(numpy_helper.to_array(tensor)))
        if found is not None and found not in taken:
            taken.add(found)
            names[tensor.name] = found
            tensor.name = found
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]


def _weights(network: nn.Module, most: int | None) -> dict[Key, str]:
    """The name of every weight by its values, as it is and turned around."""
    known: dict[Key, str] = {}
    for name, module in network.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.ndim < 2:
            continue
        values = weight.detach().cpu().numpy()
        if most is not None and values.nbytes > most:
            continue
        known[_key(values)] = f"model.{name}.weight"
        if values.ndim == 2 and _key(values.T) not in known:
            known[_key(values.T)] = f"model.{name}.weight{TURNED}"
    return known


def layer_of(node: str) -> str:
    """The layer whose scope the tracer wrote into a node's name: `/model/net/net.2/Conv` is `net.2`."""
    parts: list[str] = []
    for part in node.split("/")[2:-1]:
        if parts and part.startswith(f"{parts[-1]}."):
            parts.pop()
        parts.append(part)
    return ".".join(parts)


def _key(array: np.ndarray) -> Key:
    return array.shape, array.dtype.str, hashlib.sha256(array.tobytes()).digest()
