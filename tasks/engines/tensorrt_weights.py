"""A model's trained tensors: by name as TensorRT's refitter takes them, digests, and which are 2:4 sparse."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

FLOATS = {
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.DOUBLE,
}
TRAINED = {*FLOATS, onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT4}
TRAINED |= {onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.FLOAT8E5M2}


def tensors(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Every initializer and every Constant node's value, under the name that TensorRT's parser gives it."""
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    found[node.output[0]] = attribute.t
    return found


def digests(model: onnx.ModelProto, names: set[str] | None = None) -> dict[str, str]:
    """The digest of each trained (float or quantized) tensor, or of those named alone."""
    return {
        name: hashlib.sha256(numpy_helper.to_array(tensor).tobytes()).hexdigest()[:16]
        for name, tensor in sorted(tensors(model).items())
        if tensor.data_type in TRAINED and (names is None or name in names)
    }


def all_digest(model: onnx.ModelProto) -> str:
    """One digest of every trained tensor."""
    return hashlib.sha256(repr(digests(model)).encode()).hexdigest()


def copy_model(source: Path, folder: Path) -> Path:
    """Copy a model to `folder/model.onnx`, and its external data under the name that it is known by."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.parent.glob(f"{source.name}?*"):
        shutil.copyfile(file, folder / file.name)
    return Path(shutil.copyfile(source, folder / "model.onnx"))


def rolled(model: onnx.ModelProto, names: Sequence[str] = ()) -> onnx.ModelProto:
    """The same graph with each trained vector and matrix (or those named) rolled by four on its last axis.

    Other weights of the same range, for a trial refit; by four, so that 2:4 stays 2:4.
    """
    other = onnx.ModelProto()
    other.CopyFrom(model)
    for tensor in other.graph.initializer:
        if tensor.data_type in TRAINED and tensor.dims and (not names or tensor.name in names):
            array = np.roll(numpy_helper.to_array(tensor), 4, axis=-1)
            tensor.CopyFrom(
                helper.make_tensor(tensor.name, tensor.data_type, tensor.dims, array.tobytes(), raw=True)
            )
    return other


def is_2_4(array: np.ndarray, axis: int) -> bool:
    """True when every group of four along the axis holds at most two values that are not zero."""
    rows = np.moveaxis(array, axis, -1)
    if rows.shape[-1] % 4 or not rows.any():
        return False
    groups = rows.reshape(-1, 4) != 0
    return bool((groups.sum(axis=1) <= 2).all())


def two_four(model: onnx.ModelProto) -> list[str]:
    """The names of the MatMul, Gemm and Conv weights that are 2:4 along their input dimension."""
    return sorted({name for name, axis, array in _kernels(model) if is_2_4(array, axis)})


def _kernels(model: onnx.ModelProto) -> Iterator[tuple[str, int, np.ndarray]]:
    """(initializer, input axis, values) of each kernel, traced back through Q/DQ, casts and transposes."""
    made_by = {name: node for node in model.graph.node for name in node.output}
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in ("MatMul", "Gemm", "Conv") or len(node.input) < 2:
            continue
        flag = next((a.i for a in node.attribute if a.name == "transB"), 0)
        axis = 1 if node.op_type == "Conv" or flag else 0
        name = node.input[1]
        while name in made_by and made_by[name].op_type in (
            "DequantizeLinear",
            "QuantizeLinear",
            "Cast",
            "Transpose",
        ):
            axis = 1 - axis if made_by[name].op_type == "Transpose" else axis
            name = made_by[name].input[0]
        if name in values and len(values[name].dims) >= 2:
            array = numpy_helper.to_array(values[name])
            yield name, axis if node.op_type != "MatMul" else axis + array.ndim - 2, array
