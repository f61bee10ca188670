"""A model in two parts: a plan without any trained value, and a safetensors file that holds them all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from tasks.engines.lowering import tensors
from tasks.engines.lowering.tensors import STRUCTURE

PLAN, PLAN_INDEX = "model.onnx", "plan.json"
WEIGHTS, WEIGHTS_INDEX = "weights.safetensors", "weights.json"
_NAMES: dict[int, str] = {
    TensorProto.FLOAT: "F32",
    TensorProto.FLOAT16: "F16",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.DOUBLE: "F64",
    TensorProto.INT8: "I8",
    TensorProto.UINT8: "U8",
    TensorProto.INT16: "I16",
    TensorProto.INT32: "I32",
    TensorProto.FLOAT8E4M3FN: "F8_E4M3",
    TensorProto.FLOAT8E5M2: "F8_E5M2",
}
Table = dict[str, list[Any]]


def load(path: Path) -> onnx.ModelProto:
    """A model; large values that lie beside it stay there (`tensors`)."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        if tensors.outside(tensor):
            tensors.take_in(tensor, path.parent)
    return model


def split(model: onnx.ModelProto, plan: Path, weights: Path) -> None:
    """Write `plan/model.onnx` with stubs and `weights/weights.safetensors`; the plan holds no value."""
    trained = [t for t in model.graph.initializer if t.data_type not in STRUCTURE]
    trained.sort(key=lambda t: (-_item_size(t), t.name))  # wide types first keeps every tensor aligned
    header, places = _header(trained)
    weights.mkdir(parents=True, exist_ok=True)
    with (weights / WEIGHTS).open("wb") as file:
        file.write(header)
        for tensor in trained:
            for piece in tensors.pieces(tensor):
                file.write(piece)
    stripped = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    stripped.graph.CopyFrom(_stub_graph(model.graph, places, len(header)))
    plan.mkdir(parents=True, exist_ok=True)
    (plan / PLAN).write_bytes(stripped.SerializeToString(deterministic=True))


def table(model: onnx.ModelProto) -> Table:
    """What a plan expects of its weights: dtype and shape by name."""
    return {t.name: [TensorProto.DataType.Name(t.data_type), list(t.dims)] for t in _stubs(model)}


def sha256(path: Path) -> str:
    """The digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _stubs(model: onnx.ModelProto) -> list[TensorProto]:
    return [t for t in model.graph.initializer if tensors.outside(t)]


def _item_size(tensor: TensorProto) -> int:
    return int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _header(trained: list[TensorProto]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Safetensors' header, padded so that the data is aligned, and each tensor's place in the data."""
    entries: dict[str, Any] = {}
    places: dict[str, tuple[int, int]] = {}
    start = 0
    for tensor in trained:
        size = tensors.size(tensor)
        known = tensor.data_type in _NAMES
        shape = list(tensor.dims) if known else [size]  # 4-bit types travel packed, as bytes
        kind = _NAMES.get(tensor.data_type, "U8")
        entries[tensor.name] = {"dtype": kind, "shape": shape, "data_offsets": [start, start + size]}
        places[tensor.name] = (start, size)
        start += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text, places


def _stub_graph(graph: onnx.GraphProto, places: dict[str, tuple[int, int]], base: int) -> onnx.GraphProto:
    stub = onnx.GraphProto(name=graph.name, node=graph.node, input=graph.input, output=graph.output)
    for tensor in sorted(graph.initializer, key=lambda t: t.name):
        if tensor.name not in places:
            stub.initializer.append(tensor)
            continue
        start, size = places[tensor.name]
        entry = stub.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        tensors.refer(entry, WEIGHTS, base + start, size)
    return stub
