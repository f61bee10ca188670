"""Images as inputs: arrays of pixels, channels first; (pixel * scale - mean) / std as the recipe says."""

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


def check(value: Any, settings: dict[str, Any]) -> None:
    """Raise InputError unless `value` is an array (or nested list) of finite numbers of the right size."""
    try:
        array = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError):
        raise InputError(f"expected an image as an array of numbers, got {value!r:.80}") from None
    if array.size == 0 or not np.isfinite(array).all():
        raise InputError("the image is empty or holds values that are not finite")
    shape = tuple(settings["shape"])
    flat = array.ndim == 1 and array.size == np.prod(shape)  # as a table holds it
    if array.shape != shape and not flat and array.shape != shape[1:] * (shape[0] == 1):
        raise InputError(
            f"expected an image of shape {shape} (channels, height, width), got one of shape {array.shape}"
        )


def encode(folder: Path, values: Sequence[Any]) -> list[Example]:
    """`pixel_values` per image: float32 of the recipe's shape (channels, height, width)."""
    settings = types.settings(folder)
    shape = tuple(settings["shape"])
    examples = []
    for value in values:
        check(value, settings)
        pixels = np.asarray(value, dtype=np.float32).reshape(shape) * np.float32(settings["scale"])
        for name, change in (("mean", np.subtract), ("std", np.divide)):
            if settings.get(name):
                pixels = change(pixels, np.float32(settings[name]).reshape(-1, 1, 1))
        examples.append({"pixel_values": pixels})
    return examples


def collate(examples: Sequence[Example]) -> Example:
    """Stack to shape (batch, channels, height, width)."""
    return {"pixel_values": np.stack([example["pixel_values"] for example in examples])}


def size(example: Example) -> float:
    """The image's mean, after scaling."""
    return float(example["pixel_values"].mean())


def example(settings: dict[str, Any]) -> np.ndarray:
    """Black."""
    return np.zeros(settings["shape"], np.float32)


def smoke(folder: Path) -> list[np.ndarray]:
    """Two images: a ramp from black to white, and the reverse."""
    settings = types.settings(folder)
    ramp = np.linspace(0, 1 / settings["scale"], int(np.prod(settings["shape"])), dtype=np.float32)
    return [image.reshape(settings["shape"]) for image in (ramp, ramp[::-1])]
