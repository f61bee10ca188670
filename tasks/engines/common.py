"""What every engine returns and raises, and the digest that says whether two models are one graph."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import onnx

from tasks.artifacts import Facts, Proved

Arrays = Mapping[str, np.ndarray]
Samples = Sequence[Arrays]

PAST, PRESENT = "past_key_values.", "present."
"""A key/value cache among inputs and outputs: `past_key_values.0.key` comes back as `present.0.key`."""

_STRUCTURAL = {onnx.TensorProto.INT64, onnx.TensorProto.BOOL, onnx.TensorProto.STRING}


class RefitError(ValueError):
    """The plan cannot take this training's weights; the message says why. The way out is a fresh build."""


@dataclass(frozen=True)
class Built:
    """An engine in `folder/plan` (and `folder/weights`): what it is made of and how far it is proved."""

    graph: str
    runtime: str
    version: str
    device: str
    proved: Proved
    facts: Facts = field(default_factory=dict)


class Session(Protocol):
    """An opened engine; `inputs` gives each input's NumPy dtype name and shape (None where dynamic)."""

    inputs: dict[str, tuple[str, tuple[int | None, ...]]]

    def run(self, feed: Arrays) -> dict[str, np.ndarray]:
        """All outputs by name."""

    def __enter__(self) -> Session: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class OnDevice(Protocol):
    """A session that times itself by the device's own events."""

    def latencies(self, feed: Arrays, count: int, warmup: int) -> list[float]:
        """Milliseconds of `count` executions, inputs and outputs staying on the device."""


def model_file(model: Path) -> Path:
    """`model.onnx` in a folder, or the file itself."""
    return model / "model.onnx" if model.is_dir() else model


def graph_digest(model: onnx.ModelProto) -> str:
    """The sha256 of ops, names, attributes, dtypes, shapes and Q/DQ places; never of a trained value.

    Integer (int64), boolean and string constants are structure (axes, shapes, masks) and count;
    of every other tensor only dtype and shape do.
    """
    digest = hashlib.sha256()
    for part in _graph_parts(model.graph):
        digest.update(part.encode() + b"\n")
    for opset in sorted(model.opset_import, key=lambda o: o.domain):
        digest.update(f"{opset.domain}={opset.version}\n".encode())
    return digest.hexdigest()


def _graph_parts(graph: onnx.GraphProto) -> Iterator[str]:
    for value in (*graph.input, *graph.output):
        yield f"io {value.name} {_type_text(value.type)}"
    for tensor in sorted(graph.initializer, key=lambda t: t.name):
        yield f"tensor {tensor.name} {_tensor_text(tensor)}"
    for node in graph.node:
        yield f"node {node.domain} {node.op_type} {list(node.input)} {list(node.output)}"
        for attribute in sorted(node.attribute, key=lambda a: a.name):
            yield from _attribute_parts(attribute)


def _attribute_parts(attribute: onnx.AttributeProto) -> Iterator[str]:
    value: Any = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, onnx.GraphProto):
        yield f"graph {attribute.name}"
        yield from _graph_parts(value)
    elif isinstance(value, onnx.TensorProto):
        yield f"attribute {attribute.name} {_tensor_text(value)}"
    elif attribute.type in (onnx.AttributeProto.FLOATS, onnx.AttributeProto.INTS):
        yield f"attribute {attribute.name} {list(value)}"
    else:
        yield f"attribute {attribute.name} {value!r}"


def _type_text(kind: onnx.TypeProto) -> str:
    dims = kind.tensor_type.shape.dim
    return f"{kind.tensor_type.elem_type} {[d.dim_value if d.HasField('dim_value') else '?' for d in dims]}"


def _tensor_text(tensor: onnx.TensorProto) -> str:
    text = f"{tensor.data_type} {list(tensor.dims)}"
    if tensor.data_type in _STRUCTURAL:
        text += f" {hashlib.sha256(onnx.numpy_helper.to_array(tensor).tobytes()).hexdigest()}"
    return text
