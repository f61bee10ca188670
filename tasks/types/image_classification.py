"""Images as arrays in, one of several labels out; channels first, scaled by the recipe's factor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tasks import types
from tasks.errors import InputError
from tasks.types import Example

COLUMN = "image"
INPUTS = {"pixel_values": {0: "batch"}}


def check(value: Any) -> None:
    """Raise InputError unless `value` is an array (or nested list) of finite numbers."""
    try:
        array = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError):
        raise InputError(f"expected an image as an array of numbers, got {value!r:.80}") from None
    if array.size == 0 or not np.isfinite(array).all():
        raise InputError("the image is empty or holds values that are not finite")


def encode(folder: Path, values: Sequence[Any]) -> list[Example]:
    """`pixel_values` per image: float32 of the recipe's shape (channels, height, width)."""
    settings = types.settings(folder)
    shape = tuple(settings["shape"])
    examples = []
    for value in values:
        array = np.asarray(value, dtype=np.float32)
        if array.size != np.prod(shape):
            raise InputError(f"expected an image of shape {shape}, got one of shape {array.shape}")
        examples.append({"pixel_values": array.reshape(shape) * np.float32(settings["scale"])})
    return examples


def collate(examples: Sequence[Example]) -> Example:
    """Stack to shape (batch, channels, height, width)."""
    return {"pixel_values": np.stack([example["pixel_values"] for example in examples])}


def size(example: Example) -> float:
    """The image's mean, after scaling."""
    return float(example["pixel_values"].mean())
