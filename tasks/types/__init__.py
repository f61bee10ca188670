"""One file per kind of task: what goes in, what comes out, and what the outputs are worth.

Every file has the names of `TaskType`, and imports at its top only what serving has (NumPy). A file is put
together from `texts` or `images` (the inputs) and `classes` (the outputs), or has its own; docs/models.md
says how to add one. An example is one input as arrays; a row is what is kept of one example's output.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, cast

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, nn

Example = dict[str, np.ndarray]
Run = Callable[[Sequence[Example]], np.ndarray]
"""Examples to the engine's output for them, batch first."""


class Graph(NamedTuple):
    """What a type of several graphs says of one: `INPUTS`, `OUTPUTS` and `forward` as in `TaskType`."""

    INPUTS: dict[str, dict[int, str]]
    OUTPUTS: dict[str, dict[int, str]]
    forward: Callable[[Any, dict[str, Tensor]], Tensor]


class TaskType(Protocol):
    """What each file here offers; a language model also has `generate`, a diffusion model `pictures`."""

    COLUMN: str
    """The key of `data` that says where the inputs are, and the column they are kept in: text or image."""
    REFERENCES: Literal["labels", "baseline", "inputs"]
    """What a metric compares with: a row's label, the baseline's outputs, or the input itself."""
    INPUTS: dict[str, dict[int, str]]
    """{input name: {axis: symbol}}, the dynamic axes of the exported model."""
    OUTPUTS: dict[str, dict[int, str]]
    """The same of the one output."""
    AUTO: str
    """The transformers class that reads a Hugging Face folder."""
    TAKES: tuple[str, ...]
    """What a metric may take (`tasks.metrics.Takes`)."""
    ANSWER: dict[str, str]
    """{name: type} of what is told of each input: string, double, boolean or doubles."""

    check: Callable[[Any, dict[str, Any]], None]
    """Raise InputError for a value that cannot be an input; takes the settings."""
    encode: Callable[[Path, Sequence[Any]], list[Example]]
    """One example per value; the folder holds `settings.json` and the tokenizer."""
    collate: Callable[[Sequence[Example]], Example]
    """One batch: {input name: array}."""
    size: Callable[[Example], float]
    """One number of an example, to see inputs drift by."""
    smoke: Callable[[Path], list[Any]]
    """A few values that any model of this type takes, of different lengths; takes the preprocessor."""
    example: Callable[[dict[str, Any]], Any]
    """A value as users give it; takes the settings."""

    forward: Callable[[nn.Module, dict[str, Tensor]], Tensor]
    """The network's output for a batch, as it is exported."""
    wrong: Callable[[tuple[int, ...], dict[str, Any]], str]
    """What is wrong with an output of this shape for one example, given the settings; empty if nothing."""
    targets: Callable[[Example, np.ndarray], np.ndarray]
    """What the loss compares a batch's outputs with; takes the batch and its labels."""
    loss: Callable[[Any, Tensor], Tensor]
    """The loss of what the network returned."""
    scores: Callable[[Any, Tensor], Tensor]
    """The logits that a teacher's are compared with, (rows, classes), of what the network returned."""

    row: Callable[[np.ndarray, Example], np.ndarray]
    """What is kept of an output, one-dimensional, without padding."""
    predictions: Callable[[Sequence[np.ndarray], str], np.ndarray]
    """What a metric takes, from rows."""
    references: Callable[[Sequence[Example], np.ndarray, Sequence[np.ndarray] | None], np.ndarray]
    """What a metric compares with, from examples, their labels, and perhaps the baseline's rows."""
    trial: Callable[[int], tuple[list[np.ndarray], np.ndarray]]
    """Rows and references to try a metric on, for so many labels."""
    traits: Callable[[np.ndarray], dict[str, float]]
    """Numbers of a row to see outputs drift by."""
    answer: Callable[[Path, Sequence[Example], Run], list[dict[str, Any]]]
    """What the user is told of each example; takes the preprocessor's folder."""


def load(name: str) -> TaskType:
    """The file for a recipe's `task`: `text-classification` is `text_classification.py`."""
    return cast(TaskType, importlib.import_module(f"tasks.types.{name.replace('-', '_')}"))


def parts(kind: TaskType) -> dict[str, Graph]:
    """The graphs that a version of this type is made of, by name; one without a name for most.

    A type of several has them as `PARTS`; its own output is theirs side by side, in this order.
    """
    whole = {"": Graph(kind.INPUTS, kind.OUTPUTS, kind.forward)}
    found: dict[str, Graph] = getattr(kind, "PARTS", whole)
    return found


def joined(kind: TaskType, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """A run's one output; of several graphs, those that ran, side by side."""
    names = [name for part in parts(kind).values() for name in part.OUTPUTS if name in outputs]
    arrays = [np.asarray(outputs[name]) for name in names]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1)


def settings(preprocessor: Path) -> dict[str, Any]:
    """What `preprocessor/settings.json` says: task type, labels and the type's own settings."""
    return cast(dict[str, Any], json.loads((preprocessor / "settings.json").read_text()))


def result(found: Any, name: str) -> Any:
    """The named tensor of what a network returned, or the tensor that it returned."""
    return getattr(found, name, found)


def truncated(example: Example) -> dict[str, bool]:
    """Whether a text was cut, for an answer; nothing for other inputs."""
    return {"truncated": bool(example["truncated"])} if "truncated" in example else {}
