"""Values too large for a protobuf: they stay in files, which are mapped where they are read.

A tensor that is outside has an absolute path as its `location`; whatever makes a new large one while
`scratch` lasts writes it into a file there. Axes, shapes and masks are structure, and always inside.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor

LARGE = 1 << 20  # bytes
BLOCK = 1 << 26
STRUCTURE = {TensorProto.INT64, TensorProto.BOOL, TensorProto.STRING}  # axes, shapes, masks: never trained
HALF_BYTES = {TensorProto.INT4, TensorProto.UINT4, getattr(TensorProto, "FLOAT4E2M1", 23)}  # since ONNX 1.18

_scratch: ContextVar[Path | None] = ContextVar("scratch", default=None)


@contextmanager
def scratch(folder: Path, model: onnx.ModelProto) -> Iterator[None]:
    """While it lasts, new large values go into a folder below `folder`, if the model has some outside."""
    if not any(outside(tensor) for tensor in model.graph.initializer):
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        token = _scratch.set(Path(name))
        try:
            yield
        finally:
            _scratch.reset(token)


def place() -> Path | None:
    """Where large files go for now; None for the system's temporary folder."""
    return _scratch.get()


def outside(tensor: TensorProto) -> bool:
    """Whether the values are in a file."""
    return tensor.data_location == TensorProto.EXTERNAL


def take_in(tensor: TensorProto, folder: Path) -> None:
    """Values beside a model: small ones into the tensor, large ones by the file's absolute path."""
    if size(tensor) <= LARGE or tensor.data_type in STRUCTURE:
        load_external_data_for_tensor(tensor, str(folder))
        tensor.data_location = TensorProto.DEFAULT
        del tensor.external_data[:]
        return
    for entry in tensor.external_data:
        if entry.key == "location":
            entry.value = str((folder / entry.value).absolute())


def size(tensor: TensorProto) -> int:
    """Bytes of the values, wherever they are."""
    count: int = math.prod(tensor.dims)
    if tensor.data_type in HALF_BYTES:
        return -(-count // 2)
    item: int = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return count * item


def array(tensor: TensorProto) -> np.ndarray:
    """The values; those in a file are read only where they are looked at."""
    if not outside(tensor):
        return numpy_helper.to_array(tensor)
    mapped = _mapped(tensor)
    if tensor.data_type in HALF_BYTES:
        packed = TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=mapped.tobytes())
        return numpy_helper.to_array(packed)
    return mapped.view(helper.tensor_dtype_to_np_dtype(tensor.data_type)).reshape(tuple(tensor.dims))


def pieces(tensor: TensorProto) -> Iterator[bytes | memoryview]:
    """The values' bytes in order, a part at a time."""
    if outside(tensor):
        mapped = _mapped(tensor)
        for start in range(0, len(mapped), BLOCK):
            yield mapped[start : start + BLOCK].data
    elif tensor.HasField("raw_data"):
        yield tensor.raw_data
    else:
        yield numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data


def made(value: np.ndarray, name: str) -> TensorProto:
    """A tensor of these values, in a file of its own where they are large and `scratch` lasts."""
    folder, kind = place(), helper.np_dtype_to_tensor_dtype(value.dtype)
    if folder is None or value.nbytes <= LARGE or kind in STRUCTURE | HALF_BYTES:
        return numpy_helper.from_array(np.array(value, order="C"), name)
    return _written((np.ascontiguousarray(part) for part in blocks(value)), kind, value.shape, name, folder)


def changed(tensor: TensorProto, function: Callable[[np.ndarray], np.ndarray]) -> TensorProto:
    """The tensor with `function` applied to its values, rows at a time where they are in a file."""
    folder = place()
    if folder is None or not outside(tensor):
        return numpy_helper.from_array(function(array(tensor)), tensor.name)
    parts = (function(part) for part in blocks(array(tensor)))
    return _written(parts, tensor.data_type, tuple(tensor.dims), tensor.name, folder)


def blocks(value: np.ndarray) -> Iterator[np.ndarray]:
    """The rows (first axis) of an array, some megabytes at a time."""
    rows = max(1, BLOCK // max(1, value[:1].nbytes))
    for start in range(0, len(value), rows):
        yield value[start : start + rows]


def refer(tensor: TensorProto, location: str, offset: int, length: int) -> TensorProto:
    """Let the tensor's values be those bytes of a file."""
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _written(
    parts: Iterator[np.ndarray], kind: int, shape: tuple[int, ...], name: str, folder: Path
) -> TensorProto:
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        length = sum(file.write(part.view(np.uint8).data) for part in parts)
    return refer(TensorProto(name=name, data_type=kind, dims=shape), file.name, 0, length)


def _mapped(tensor: TensorProto) -> np.ndarray:
    about = {entry.key: entry.value for entry in tensor.external_data}
    return np.memmap(
        about["location"], np.uint8, "r", int(about.get("offset", 0)), int(about.get("length", size(tensor)))
    )
