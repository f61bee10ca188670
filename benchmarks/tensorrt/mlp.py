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
        return two_four(array)
    if zeros == "random":
        array[random.random(array.shape) < 0.5] = 0.0
    return array


def two_four(array: np.ndarray) -> np.ndarray:
    """The two largest of every four along the first axis; the others are zero."""
    groups = array.reshape(-1, 4, array.shape[-1])
    second = np.partition(np.abs(groups), 1, axis=1)[:, 1:2]
    return np.where(np.abs(groups) > second, groups, array.dtype.type(0)).reshape(array.shape)


def prune(model: onnx.ModelProto) -> int:
    """Make every MatMul's and Gemm's constant matrix 2:4 along its input, in place; how many."""
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    done = set()
    for node in model.graph.node:
        if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in values:
            continue
        name = node.input[1]
        array = numpy_helper.to_array(values[name])
        if name in done or array.ndim != 2:
            continue
        flipped = any(a.name == "transB" and a.i for a in node.attribute)
        pruned = two_four(array.T.copy()).T if flipped else two_four(array)
        values[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(pruned), name))
        done.add(name)
    return len(done)


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
