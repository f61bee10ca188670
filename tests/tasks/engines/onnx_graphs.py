"""Small graphs in the shapes that the export gives: INT8 or FP8 Q/DQ, a transformer layer or a CNN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WORDS, WIDTH, INNER, HEADS = 4200, 256, 384, 4


class Builder:
    """Adds nodes and weights one after the other; every weight comes from the seed."""

    def __init__(self, seed: int, kind: int = TensorProto.INT8) -> None:
        self.random = np.random.default_rng(seed)
        self.kind = kind
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"tensor_{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def zero(self, shape: tuple[int, ...] = ()) -> str:
        name = f"tensor_{len(self.tensors)}"
        self.tensors.append(helper.make_tensor(name, self.kind, shape, np.zeros(shape).ravel().tolist()))
        return name

    def normal(self, *shape: int) -> np.ndarray:
        return self.random.standard_normal(shape).astype(np.float32)

    def activation(self, value: str, scale: float) -> str:
        numbers = [self.constant(scale), self.zero()]
        return self.add("DequantizeLinear", self.add("QuantizeLinear", value, *numbers), *numbers)

    def weight(self, *shape: int, axis: int = 0) -> str:
        values = self.normal(*shape) * 0.05
        scale = (np.abs(values).reshape(shape[0], -1).max(axis=1) / 127).astype(np.float32)
        scale = np.full(shape[axis], scale.max(), np.float32) if axis else scale
        if self.kind != TensorProto.INT8:
            name = f"tensor_{len(self.tensors)}"
            self.tensors.append(
                helper.make_tensor(name, self.kind, shape, (values / scale.max()).ravel().tolist())
            )
        else:
            rows = [-1 if k == axis else 1 for k in range(len(shape))]
            name = self.constant(np.rint(values / scale.reshape(rows)), np.int8)
        return self.add("DequantizeLinear", name, self.constant(scale), self.zero(scale.shape), axis=axis)

    def linear(self, value: str, inner: int, outer: int, scale: float = 0.03) -> str:
        weight = self.add("Transpose", self.weight(outer, inner), perm=[1, 0])
        product = self.add("MatMul", self.activation(value, scale), weight)
        return self.add("Add", self.constant(self.normal(outer) * 0.1), product)

    def model(
        self, inputs: dict[str, tuple[int, list[Any]]], output: str, shape: list[Any], opset: int = 20
    ) -> onnx.ModelProto:
        self.nodes.append(helper.make_node("Identity", [output], ["logits"]))
        graph = helper.make_graph(
            self.nodes,
            "main_graph",
            [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
            self.tensors,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        onnx.checker.check_model(model)
        return model


def text(
    seed: int = 0,
    *,
    kind: int = TensorProto.INT8,
    heads: int = HEADS,
    key_scale: float = 0.03,
    opset: int = 20,
) -> onnx.ModelProto:
    """Embedding, one layer of attention and feed-forward, and a classifier on the first token.

    In opset 17 the classifier is on the mean of all tokens.
    """
    b = Builder(seed, kind)
    hidden = b.add("Gather", b.constant(b.normal(WORDS, WIDTH)), "input_ids")
    bias = b.add(
        "Unsqueeze", b.add("Cast", "attention_mask", to=TensorProto.FLOAT), b.constant([1, 2], np.int64)
    )
    bias = b.add("Mul", b.add("Sub", bias, b.constant(1.0)), b.constant(1e4))
    hidden = norm(b, b.add("Add", hidden, attention(b, hidden, bias, heads, key_scale)))
    inner = b.add("Gelu" if opset == 20 else "Relu", b.linear(hidden, WIDTH, INNER))
    hidden = norm(b, b.add("Add", b.linear(inner, INNER, WIDTH), hidden))
    if opset == 17:
        first = b.add("ReduceMean", hidden, axes=[1], keepdims=0)
    else:
        first = b.add("Gather", hidden, b.constant(0, np.int64), axis=1)
    logits = b.add("Gemm", b.activation(first, 0.03), b.weight(3, WIDTH), b.constant(b.normal(3)), transB=1)
    ids = (TensorProto.INT64, ["batch", "length"])
    return b.model({"input_ids": ids, "attention_mask": ids}, logits, ["batch", 3], opset)


def attention(b: Builder, hidden: str, bias: str, heads: int, key_scale: float) -> str:
    """As PyTorch's eager attention exports: reshape, transpose, product, scale, mask, softmax, product."""
    shape = b.constant([0, 0, heads, WIDTH // heads], np.int64)
    parts = []
    for scale, perm in ((0.03, [0, 2, 1, 3]), (key_scale, [0, 2, 3, 1]), (0.03, [0, 2, 1, 3])):
        cut = b.add("Reshape", b.linear(hidden, WIDTH, WIDTH, scale), shape)
        parts.append(b.add("Transpose", cut, perm=perm))
    scores = b.add("Mul", b.add("MatMul", parts[0], parts[1]), b.constant((WIDTH // heads) ** -0.5))
    weights = b.add("Softmax", b.add("Add", scores, bias), axis=-1)
    back = b.add("Transpose", b.add("MatMul", weights, parts[2]), perm=[0, 2, 1, 3])
    joined = b.add("Reshape", back, b.constant([0, 0, WIDTH], np.int64))
    return b.linear(joined, WIDTH, WIDTH, 0.01)


def norm(b: Builder, value: str) -> str:
    return b.add(
        "LayerNormalization", value, b.constant(1 + b.normal(WIDTH) * 0.1), b.constant(b.normal(WIDTH) * 0.1)
    )


def image(seed: int = 0, *, residual: bool = False, pool_scale: float = 0.02) -> onnx.ModelProto:
    """Two convolutions with Relu, a pool, and a linear layer; with `residual` a sum in float between them."""
    b = Builder(seed)
    first = b.add("Relu", convolution(b, "pixels", 1, 8))
    second = convolution(b, first, 8, 8)
    positive = b.add("Relu", b.add("Add", first, second) if residual else second)
    pooled = b.add("MaxPool", b.activation(positive, pool_scale), kernel_shape=[2, 2], strides=[2, 2])
    flat = b.add("Flatten", pooled)
    logits = b.add("Gemm", b.activation(flat, 0.02), b.weight(4, 32), b.constant(b.normal(4)), transB=1)
    return b.model({"pixels": (TensorProto.FLOAT, ["batch", 1, 4, 4])}, logits, ["batch", 4])


class Mixed(Builder):
    """Scales, biases and weights that serve more than once, and zero points of both kinds of integers."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.known: dict[object, str] = {}

    def chance(self, share: float) -> bool:
        return bool(self.random.random() < share)

    def once(self, key: object, make: Callable[[], str]) -> str:
        if key not in self.known or self.chance(0.7):
            self.known[key] = make()
        return self.known[key]

    def activation(self, value: str, scale: float = 0.0) -> str:
        scale = scale or float(self.random.choice([0.02, 0.03, 0.05]))
        kind, zero = ((np.int8, 0), (np.int8, 0), (np.uint8, 0), (np.uint8, 128))[self.random.integers(4)]
        numbers = [self.once(scale, lambda: self.constant(scale)), self.constant(zero, kind)]
        return self.add("DequantizeLinear", self.add("QuantizeLinear", value, *numbers), *numbers)

    def perhaps(self, value: str, share: float = 0.5) -> str:
        return self.activation(value) if self.chance(share) else value

    def kernel(self, outer: int, *shape: int) -> str:
        return self.once((outer, *shape), lambda: self.weight(outer, *shape))

    def bias(self, outer: int) -> list[str]:
        make = lambda: self.constant(self.normal(outer) * 0.1)  # noqa: E731
        return [self.once(("bias", outer), make)] if self.chance(0.7) else []


def mixed(seed: int) -> onnx.ModelProto:
    """Layers of a CNN in any order, with values of the middle among its outputs."""
    b = Mixed(seed)
    values = [("pixels", 4, 8)]  # name, channels, height
    for kind in b.random.choice(["conv", "conv", "relu", "clip", "pool", "mean", "add", "pad", "shape"], 6):
        value, width, side = values[b.random.integers(max(0, len(values) - 2), len(values))]
        if kind == "conv" and side > 2:
            outer, edge = int(b.random.choice([4, 8])), int(b.random.integers(2))
            inputs = [b.perhaps(value, 0.8), b.kernel(outer, width, 3, 3), *b.bias(outer)]
            value = b.add("Conv", *inputs, kernel_shape=[3, 3], pads=[edge] * 4)
            width, side = outer, side - 2 + 2 * edge
        elif kind == "relu":
            value = b.add("Relu", value)
        elif kind == "clip":
            value = b.add("Clip", value, b.constant(0.0), b.constant(b.random.choice([2.0, 6.0])))
        elif kind in ("pool", "mean") and side > 1:
            operator = "MaxPool" if kind == "pool" else "AveragePool"
            value = b.add(operator, b.perhaps(value), kernel_shape=[2, 2], strides=[2, 2])
            side //= 2
        elif kind == "add":
            like = [name for name, *shape in values if shape == [width, side]]
            value = b.add("Add", b.perhaps(value), b.perhaps(like[b.random.integers(len(like))]))
        elif kind == "pad":
            value = b.add("Pad", value, b.constant([0, 0, 1, 1] * 2, np.int64))
            side += 2
        elif kind == "shape":
            value = b.add("Reshape", b.perhaps(value), b.constant([0, width, side, side], np.int64))
        values.append((b.perhaps(value, 0.3), width, side))
    value, width, side = values[-1]
    flat = b.perhaps(b.add("Flatten", b.perhaps(value)), 0.8)
    logits = b.add("Gemm", flat, b.kernel(5, width * side * side), *b.bias(5), transB=1)
    model = b.model({"pixels": (TensorProto.FLOAT, ["batch", 4, 8, 8])}, logits, ["batch", 5])
    others = {name for name, *_ in values[1:] if b.chance(0.2)}
    shapes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in sorted(others)]
    model.graph.output.extend(shapes)
    return model


def convolution(b: Builder, value: str, inner: int, outer: int) -> str:
    data, weight = b.activation(value, 0.02), b.weight(outer, inner, 3, 3)
    return b.add("Conv", data, weight, b.constant(b.normal(outer) * 0.1), kernel_shape=[3, 3], pads=[1] * 4)


def sentences(
    seed: int = 0, shapes: tuple[tuple[int, int], ...] = ((2, 7), (3, 12))
) -> list[dict[str, np.ndarray]]:
    """Token ids with padding at the end of each row but the first."""
    random = np.random.default_rng(seed)
    samples = []
    for batch, length in shapes:
        mask = np.ones((batch, length), np.int64)
        for row in range(1, batch):
            mask[row, length - row :] = 0
        samples.append({"input_ids": random.integers(0, WORDS, (batch, length)), "attention_mask": mask})
    return samples


def pixels(batch: int = 6) -> list[dict[str, np.ndarray]]:
    return [{"pixels": np.random.default_rng(0).uniform(0, 2, (batch, 1, 4, 4)).astype(np.float32)}]
