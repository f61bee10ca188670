"""Constants that TensorRT 8.6 makes itself from shape arithmetic, and then asks back of a refit.

Its refitter lists what the parser added without a name as "(Unnamed Layer* 92) [Constant] CONSTANT", and
what the builder folded as "TENSOR[Constant] CONSTANT". No file of weights has them. Only integers and
booleans that follow from shapes and integer constants are given: models of one graph digest agree in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from tasks.artifacts import Facts
from tasks.engines.common import Arrays
from tasks.engines.tensorrt_parity import evaluate

ROLE = " CONSTANT"
FOLDED = "[Constant]" + ROLE
INTEGERS = {TensorProto.INT64, TensorProto.BOOL}  # whose values the graph digest covers
LARGEST = 4096  # elements; shape arithmetic is small


def of_network(trt: Any, network: Any) -> Facts:
    """Every small integer constant of a parsed network, under the name that the refitter will have for it."""
    found: Facts = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.CONSTANT:
            layer.__class__ = trt.IConstantLayer  # the bindings hand out the base class
            found |= _kept(layer.name + ROLE, np.asarray(layer.weights))
    return found


def of_graph(model: onnx.ModelProto, names: Iterable[str], sample: Arrays) -> Facts:
    """The folded ones among `names`, evaluated at the shapes of the sample."""
    made_by = {output: node for node in model.graph.node for output in node.output}
    stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    tensors = {name: name[: -len(FOLDED)] for name in names if name.endswith(FOLDED)}
    wanted = {name: tensor for name, tensor in tensors.items() if _is_of_shapes(tensor, made_by, stored)}
    if not wanted:
        return {}
    (values,) = evaluate(_cut(model, list(wanted.values()), made_by), [sample])
    found: Facts = {}
    for name, tensor in wanted.items():
        found |= _kept(name, np.asarray(values[tensor]))
    return found


def arrays(kept: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What `plan.json` holds of them, as arrays."""
    return {
        name: np.array(one["values"], np.dtype(one["type"])).reshape(one["shape"])
        for name, one in kept.items()
    }


def _kept(name: str, array: np.ndarray) -> Facts:
    if array.dtype.kind not in "ib" or array.dtype == np.int8 or not 0 < array.size <= LARGEST:
        return {}
    return {name: {"type": array.dtype.name, "shape": list(array.shape), "values": array.ravel().tolist()}}


def _is_of_shapes(tensor: str, made_by: Mapping[str, onnx.NodeProto], stored: Mapping[str, int]) -> bool:
    """Whether a node makes it from shapes and integer constants alone: never from a trained value."""
    todo, seen = [tensor], set()
    while todo:
        name = todo.pop()
        if not name or name in seen or stored.get(name) in INTEGERS:
            continue
        seen.add(name)
        node = made_by.get(name)
        if node is None or any(
            item.type == onnx.AttributeProto.TENSOR and item.t.data_type not in INTEGERS
            for item in node.attribute
        ):
            return False
        if node.op_type not in ("Shape", "Constant"):
            if not node.input:
                return False
            todo += node.input
    return tensor in made_by


def _cut(
    model: onnx.ModelProto, outputs: list[str], made_by: Mapping[str, onnx.NodeProto]
) -> onnx.ModelProto:
    """The part of the graph that these tensors need, with them as its outputs."""
    todo, needed = list(outputs), set()
    while todo:
        name = todo.pop()
        if name in made_by and name not in needed:
            needed.update(made_by[name].output)
            todo += made_by[name].input
    part = onnx.ModelProto()
    part.CopyFrom(model)
    del part.graph.node[:], part.graph.output[:], part.graph.value_info[:]
    part.graph.node.extend(node for node in model.graph.node if node.output[0] in needed)
    part.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.INT64, None) for name in outputs)
    return part
