"""Weights that never enter the tracer or the graph: networks too large for a protobuf (past 1 GB).

ModelOpt's exporter holds a graph about ten times. Here each large weight is traced as a mark without a value;
the graph has an input in its place until its values go from the network straight into `model.onnx.data`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.engines.lowering import tensors
from tasks.fold import STORED, TURNED, quantize_weight

if TYPE_CHECKING:
    import onnx
    from torch import Tensor, nn

DOMAIN = "enginehouse"
DATA = "model.onnx.data"
MASK = "_weight_mask"
FP8_LARGEST = 448.0


@dataclass(frozen=True)
class Value:
    """What an input of the graph stands for: a weight as it is or turned, quantized, or in another type."""

    weight: Tensor
    turned: bool = False
    scale: np.ndarray | None = None
    zero: np.ndarray | None = None
    axis: int = 0
    kind: int = 1

    @property
    def array(self) -> np.ndarray:
        """The weight before it is quantized, sharing memory."""
        found: np.ndarray = self.weight.detach().cpu().numpy()
        return found.T if self.turned else found


Values = dict[str, Value]


def large(network: nn.Module, past: int) -> Values:
    """The weights past `tensors.LARGE` by name, where all together have more than `past` bytes.

    A mask of 2:4 becomes part of them.
    """
    import torch

    sizes = {name: weight.numel() * 4 for name, weight in network.named_parameters()}
    if sum(sizes.values()) <= past:
        return {}
    for module in network.modules():
        weight, mask = module._parameters.get("weight"), module._buffers.get(MASK)
        if weight is not None and mask is not None and weight.numel() * 4 > tensors.LARGE:
            with torch.no_grad():
                weight.mul_(mask)
            module._buffers[MASK] = None
    return {
        f"model.{name}": Value(weight)
        for name, weight in network.named_parameters()
        if sizes[name] > tensors.LARGE and weight.ndim >= 2
    }


@contextmanager
def marked(network: nn.Module, values: Values, anchor: Tensor) -> Iterator[None]:
    """While it lasts, the tracer sees a mark with the weight's name wherever one of these is used.

    `anchor` is an input of the network: what depends on it is no constant that a pass could fold.
    """
    names = {id(value.weight): name for name, value in values.items()}
    found = [
        (module, key, weight)
        for module in network.modules()
        for key, weight in module._parameters.items()
        if id(weight) in names
    ]
    for module, key, weight in found:
        module._parameters[key] = _mark().apply(weight, anchor, names[id(weight)])
    try:
        yield
    finally:
        for module, key, weight in found:
            module._parameters[key] = weight


@functools.cache
def _mark() -> Any:
    import torch

    class Mark(torch.autograd.Function):
        """The weight itself, and for the exporter a node that only has its name."""

        @staticmethod
        def forward(ctx: Any, weight: Tensor, anchor: Tensor, name: str) -> Tensor:
            return weight.view_as(weight)

        @staticmethod
        def symbolic(graph: Any, weight: Any, anchor: Any, name: str) -> Any:
            return graph.op(f"{DOMAIN}::Weight", anchor, name_s=name).setType(weight.type())

    return Mark


def as_inputs(model: onnx.ModelProto, values: Values) -> None:
    """Marks become inputs of the graph, turned around where all that follows is turning them around."""
    graph = model.graph
    for node in [node for node in graph.node if node.domain == DOMAIN]:
        name = node.attribute[0].s.decode()
        for user in [user for user in graph.node if user.op_type == "Transpose"]:
            if user.input[0] == node.output[0] and list(user.attribute[0].ints) == [1, 0]:
                values[name + TURNED] = replace(values[name], turned=True)
                _rename(model, user.output[0], name + TURNED)
                graph.node.remove(user)
        _rename(model, node.output[0], name)
        graph.node.remove(node)
    opsets = [entry for entry in model.opset_import if entry.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    _settle(model, values)


def fold(model: onnx.ModelProto, values: Values) -> None:
    """A QuantizeLinear of a weight goes: the input is then what it makes."""
    from onnx import helper, numpy_helper

    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in [node for node in model.graph.node if node.op_type == "QuantizeLinear"]:
        if node.input[0] not in values:
            continue
        scale, zero = (numpy_helper.to_array(stored[name]) for name in node.input[1:3])
        axis = next((item.i for item in node.attribute if item.name == "axis"), 1)
        kind = helper.np_dtype_to_tensor_dtype(zero.dtype)
        name = f"{node.input[0]}{STORED}"
        values[name] = replace(values[node.input[0]], scale=scale, zero=zero, axis=axis, kind=kind)
        _rename(model, node.output[0], name)
        model.graph.node.remove(node)
    _settle(model, values)


def left(model: onnx.ModelProto, values: Values) -> Values:
    """The values that are still inputs of the graph."""
    inputs = {item.name for item in model.graph.input}
    return {name: value for name, value in values.items() if name in inputs}


def cast(model: onnx.ModelProto, values: Values) -> None:
    """A Cast of a weight goes: the input then has that type."""
    for node in [node for node in model.graph.node if node.op_type == "Cast" and node.input[0] in values]:
        kind = int(node.attribute[0].i)
        name = f"{node.input[0]}_{kind}"
        values[name] = replace(values[node.input[0]], kind=kind)
        _rename(model, node.output[0], name)
        model.graph.node.remove(node)
    _settle(model, values)


def write(model: onnx.ModelProto, values: Values, folder: Path) -> None:
    """`model.onnx`, its large values in `model.onnx.data` beside it; inputs become what they stand for."""
    import onnx

    inputs = [item for item in model.graph.input if item.name not in values]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    with (folder / DATA).open("wb") as file:
        for name, value in values.items():
            start = file.tell()
            for part in _parts(value):
                file.write(np.ascontiguousarray(part).view(np.uint8).data)
            tensor = onnx.TensorProto(name=name, data_type=value.kind, dims=value.array.shape)
            model.graph.initializer.append(tensors.refer(tensor, DATA, start, file.tell() - start))
            file.write(b"\0" * (-file.tell() % 4096))  # maps start at pages
    onnx.save_model(model, str(folder / "model.onnx"))


def _parts(value: Value) -> Iterator[np.ndarray]:
    """Rows of what is stored, some megabytes at a time."""
    from onnx import helper

    kind, start = helper.tensor_dtype_to_np_dtype(value.kind), 0
    for rows in tensors.blocks(value.array):
        part = slice(start, start := start + len(rows))
        if value.scale is None or value.zero is None:
            yield rows.astype(kind, copy=False)
        elif value.zero.dtype == np.int8:
            own = part if value.scale.ndim and value.axis == 0 else slice(None)
            numbers = (value.scale[own], value.zero[own]) if value.scale.ndim else (value.scale, value.zero)
            yield quantize_weight(rows, *numbers, value.axis)
        else:
            yield np.clip(rows / value.scale, -FP8_LARGEST, FP8_LARGEST).astype(kind)


def _settle(model: onnx.ModelProto, values: Values) -> None:
    """Inputs for exactly the values that are used, and no initializer that is not."""
    from onnx import helper

    graph = model.graph
    used = {name for node in graph.node for name in node.input}
    for name in [name for name in values if name not in used]:
        del values[name]
    inputs = {item.name: item for item in graph.input}
    gone = [item for name, item in inputs.items() if name.startswith("model.") and name not in values]
    for item in gone:
        graph.input.remove(item)
    for name, value in values.items():
        if name not in inputs:
            graph.input.append(helper.make_tensor_value_info(name, value.kind, value.array.shape))
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _rename(model: onnx.ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
