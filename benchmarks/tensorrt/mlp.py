"""A small perceptron as ONNX (opset 17), dense or with zeros: what sparsity and refit are tried on."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.tensorrt import qdq


@lru_cache(maxsize=32)
def kernel(width: int, zeros: str, seed: int) -> np.ndarray:
    """A (width, width) matrix, input first: dense, "2:4" along the input, or half of it zero at "random"."""
    random = np.random.default_rng(seed)
    array: np.ndarray = random.standard_normal((width, width), dtype=np.float32) / np.float32(width**0.5)
    if zeros == "2:4":
        groups = array.reshape(width // 4, 4, width)
        second = np.partition(np.abs(groups), 1, axis=1)[:, 1:2]
        return np.where(np.abs(groups) > second, groups, np.float32(0)).reshape(width, width)
    if zeros == "random":
        array[random.random(array.shape) < 0.5] = 0.0
    return array


def mlp(
    width: int, rows: int, *, kind: str, zeros: str = "dense", layers: int = 3, seed: int = 0
) -> onnx.ModelProto:
    """`layers` of MatMul, Add and Relu; kind: fp32, fp16 (float32 in and out), or int8 (Q/DQ, unfolded)."""
    half = kind == "fp16"
    dtype, code = (np.float16, TensorProto.FLOAT16) if half else (np.float32, TensorProto.FLOAT)
    nodes, tensors, at = [], [], "x"
    if half:
        nodes.append(helper.make_node("Cast", ["x"], ["x16"], to=code, name="in"))
        at = "x16"
    bias = np.random.default_rng(seed + 99).standard_normal((layers, width)) / 10
    for i in range(layers):
        tensors.append(numpy_helper.from_array(kernel(width, zeros, seed * 100 + i).astype(dtype), f"w{i}"))
        tensors.append(numpy_helper.from_array(bias[i].astype(dtype), f"b{i}"))
        nodes.append(helper.make_node("MatMul", [at, f"w{i}"], [f"m{i}"], name=f"matmul{i}"))
        nodes.append(helper.make_node("Add", [f"m{i}", f"b{i}"], [f"a{i}"], name=f"add{i}"))
        nodes.append(helper.make_node("Relu", [f"a{i}"], [f"r{i}"], name=f"relu{i}"))
        at = f"r{i}"
    kinds: Any = {"to": TensorProto.FLOAT} if half else {}
    nodes.append(helper.make_node("Cast" if half else "Identity", [at], ["y"], name="out", **kinds))
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, width])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if kind == "int8":
        model = qdq.insert(model, {f"matmul{i}": 4.5 for i in range(layers)}, "int8", fold=False)
    return model


def feed(width: int, rows: int) -> dict[str, np.ndarray]:
    """One input."""
    return {"x": np.random.default_rng(7).standard_normal((rows, width), dtype=np.float32)}
