"""One file per kind of task: how raw values become model inputs, and outputs become predictions.

Every file has the same few names, and imports only what serving has (NumPy, tokenizers):

    INPUTS   {input name: {axis: symbol}}, the dynamic axes of the exported model
    encode(folder, values)          one dictionary of arrays per example
    collate(examples)               one batch: {input name: array}
    check(value)                    raise InputError for a value that cannot be an input
    size(example)                   one number of an example, to see inputs drift by
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

Example = dict[str, np.ndarray]


class TaskType(Protocol):
    """What each file in this folder offers."""

    INPUTS: dict[str, dict[int, str]]
    COLUMN: str
    check: Callable[[Any], None]
    encode: Callable[[Path, Sequence[Any]], list[Example]]
    collate: Callable[[Sequence[Example]], Example]
    size: Callable[[Example], float]


def load(name: str) -> TaskType:
    """The file for a recipe's `task`: `text-classification` is `text_classification.py`."""
    return cast(TaskType, importlib.import_module(f"tasks.types.{name.replace('-', '_')}"))


def settings(preprocessor: Path) -> dict[str, Any]:
    """What `preprocessor/settings.json` says: task type, labels and the type's own settings."""
    return cast(dict[str, Any], json.loads((preprocessor / "settings.json").read_text()))


def decode(logits: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Label and probability of the likeliest class for logits of shape (batch, classes)."""
    shares = probabilities(logits)
    best = shares.argmax(axis=-1)
    return [{"label": labels[k], "score": float(row[k])} for k, row in zip(best, shares, strict=True)]


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))
