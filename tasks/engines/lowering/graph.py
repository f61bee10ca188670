"""An ONNX graph with the look-ups that rewrites need."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import helper

from tasks.engines.lowering import tensors

MICROSOFT = "com.microsoft"
ALIASED_PAST = 1 << 16  # bytes


class Graph:
    """Nodes in order, initializers by name; producers and consumers stay right while nodes change."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = _shell(model)
        self.nodes: dict[int, onnx.NodeProto] = {}
        self.tensors = {t.name: t for t in model.graph.initializer}
        self.outputs = {o.name for o in model.graph.output}
        self._producers: dict[str, onnx.NodeProto] = {}
        self._consumers: dict[str, dict[int, onnx.NodeProto]] = defaultdict(dict)
        for node in model.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.tensors[node.output[0]] = _named(node.attribute[0].t, node.output[0])
            else:
                self.add(_copy(node))
        self._resolve_aliases()

    def _resolve_aliases(self) -> None:
        """An Identity of a stored tensor (the exporter makes them for equal ones) becomes a tensor.

        So a bias that happens to equal another is still found as a bias. Large ones stay shared.
        """
        for node in self.of("Identity"):
            source, name = self.tensors.get(node.input[0]), node.output[0]
            if source is None or name in self.outputs:
                continue
            self.remove(node)
            if tensors.size(source) > ALIASED_PAST:
                self.rename(name, node.input[0])
            else:
                self.tensors[name] = _named(source, name)

    def add(self, node: onnx.NodeProto) -> None:
        """Put a node into the graph; its place is found when the graph is written."""
        self.nodes[id(node)] = node
        for name in node.output:
            self._producers[name] = node
        for name in node.input:
            self._consumers[name][id(node)] = node

    def remove(self, node: onnx.NodeProto) -> None:
        """Take a node out and leave what made its inputs."""
        del self.nodes[id(node)]
        for name in node.output:
            if self._producers.get(name) is node:
                del self._producers[name]
        for name in node.input:
            self._consumers[name].pop(id(node), None)

    def replace(self, old: Iterable[onnx.NodeProto], new: Iterable[onnx.NodeProto]) -> None:
        """Exchange nodes for others that make the same names; what nothing wants any more goes."""
        gone = list(old)
        for node in gone:
            self.remove(node)
        for node in new:
            self.add(node)
        for node in gone:
            self._prune(node)

    def _prune(self, node: onnx.NodeProto) -> None:
        for name in node.input:
            maker = self._producers.get(name)
            if maker is not None and not any(self._consumers[n] or n in self.outputs for n in maker.output):
                self.remove(maker)
                self._prune(maker)

    def rename(self, old: str, new: str) -> None:
        """Let every user of a value take another one."""
        for node in self.consumers(old):
            node.input[:] = [new if name == old else name for name in node.input]
            self._consumers[new][id(node)] = node
        del self._consumers[old]

    def of(self, *kinds: str) -> list[onnx.NodeProto]:
        """The nodes of these op types."""
        return [node for node in self.nodes.values() if node.op_type in kinds]

    def producer(self, name: str, kind: str = "") -> onnx.NodeProto | None:
        """What makes a value, when it is of this op type (any without one)."""
        node = self._producers.get(name)
        return node if node is not None and kind in ("", node.op_type) else None

    def consumer(self, name: str, kind: str) -> onnx.NodeProto | None:
        """The only user of a value that is no output, when it is of this op type."""
        users = list(self._consumers[name].values())
        if len(users) != 1 or name in self.outputs or users[0].op_type != kind:
            return None
        return users[0]

    def consumers(self, name: str) -> list[onnx.NodeProto]:
        """All users of a value."""
        return list(self._consumers[name].values())

    def array(self, name: str) -> np.ndarray | None:
        """A constant's value, None for what is computed."""
        tensor = self.tensors.get(name)
        return None if tensor is None else tensors.array(tensor)

    def constant(self, name: str, value: np.ndarray) -> str:
        """Add an initializer (or meet an equal one) and give its name: numbered where another one has it."""
        for unique in itertools.chain((name,), (f"{name}.{k}" for k in itertools.count(2))):
            held = self.array(unique)
            if held is None or (held.dtype == value.dtype and np.array_equal(held, value)):
                break
        self.tensors[unique] = tensors.made(value, unique)
        return unique

    def raise_opset(self, version: int) -> None:
        """Declare at least this version of the operators; from 18 on the axes of a Reduce are an input."""
        for opset in self.model.opset_import:
            if opset.domain in ("", "ai.onnx"):
                opset.version = max(opset.version, version)
        for node in self.nodes.values():
            axes = attribute(node, "axes")
            if node.op_type.startswith("Reduce") and axes is not None:
                node.input.append(self.constant(f"{node.output[0]}.axes", np.array(axes, np.int64)))
                kept = [item for item in node.attribute if item.name != "axes"]
                del node.attribute[:]
                node.attribute.extend(kept)

    def write(self) -> onnx.ModelProto:
        """The model: live nodes in topological order, used initializers, Constants as initializers."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        nodes = self._ordered()
        model.graph.node.extend(nodes)
        used = {name for node in nodes for name in _all_inputs(node)} | self.outputs
        model.graph.initializer.extend(t for name, t in sorted(self.tensors.items()) if name in used)
        if any(n.domain == MICROSOFT for n in nodes) and MICROSOFT not in {
            o.domain for o in model.opset_import
        }:
            model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
        return model

    def _ordered(self) -> list[onnx.NodeProto]:
        """Depth first from the outputs: only live nodes, in an order that follows from structure alone."""
        order: list[onnx.NodeProto] = []
        state: dict[int, bool] = {}
        stack = [
            (n, False)
            for name in reversed([o.name for o in self.model.graph.output])
            if (n := self._producers.get(name))
        ]
        while stack:
            node, ready = stack.pop()
            if ready:
                order.append(node)
            elif id(node) not in state:
                state[id(node)] = True
                stack.append((node, True))
                inputs = [self._producers.get(name) for name in reversed(_all_inputs(node))]
                stack.extend((n, False) for n in inputs if n is not None and id(n) not in state)
        return order


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """An attribute's value, or the default that the operator's definition gives it."""
    for item in node.attribute:
        if item.name == name:
            return helper.get_attribute_value(item)
    return default


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


def _named(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    copy.name = name
    return copy


def _shell(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without nodes, values and the exporter's notes, which may differ between machines."""
    shell = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    shell.graph.name = "graph"
    shell.graph.input.extend(i for i in model.graph.input)
    shell.graph.output.extend(model.graph.output)
    return shell


def _all_inputs(node: onnx.NodeProto) -> list[str]:
    """Inputs of a node and of the graphs inside it."""
    names = [name for name in node.input if name]
    for item in node.attribute:
        for inner in item.g.node if item.HasField("g") else ():
            names += _all_inputs(inner)
    return names
