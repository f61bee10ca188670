"""From a table's columns to values and class indices, every bad row named with its number."""

from __future__ import annotations

import hashlib
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.data import Data, Image, Label
from tasks import types
from tasks.errors import InputError
from tasks.types.image_text import prompt
from tasks.types.images import check

if TYPE_CHECKING:
    import pyarrow

BILINEAR = 2  # Pillow's number for it


def column(table: pyarrow.Table, name: str, key: str) -> list[Any]:
    """The values of a column; `key` is the recipe's that names it."""
    if name not in table.column_names:
        raise InputError(f"{key}: no column {name!r}; there is {', '.join(map(str, table.column_names))}")
    return list(table[name].to_pylist())


def values(table: pyarrow.Table, data: Data, task: str) -> list[Any]:
    """The inputs: texts, images as flat lists or arrays of pixels, or both of each pair."""
    kind = types.load(task).COLUMN
    if kind == "text":
        return _texts(table, data)
    assert data.image is not None
    images = _pixels(table, data) if data.image.column is None else _pictures(table, data.image)
    if kind == "image":
        return images
    texts = _texts(table, data) if data.text else _prompts(table, data)
    return [{"image": image, "text": text} for image, text in zip(images, texts, strict=True)]


def _texts(table: pyarrow.Table, data: Data) -> list[str]:
    assert data.text is not None
    texts = column(table, data.text, "data.text")
    bad = [k for k, text in enumerate(texts) if not isinstance(text, str) or not text.strip()]
    if bad:
        raise InputError(
            f"data.text: {len(bad)} of {len(texts)} rows have no text in column {data.text!r} "
            f"(first at row {bad[0] + 1}: {texts[bad[0]]!r}); remove or fill them{_missing(texts[bad[0]])}"
        )
    return texts


def _missing(value: Any) -> str:
    """Why a value may be missing that the file holds."""
    if value is not None:
        return ""
    return "; None, NA and the like in a CSV are missing unless data.read is {keep_default_na: false}"


def _prompts(table: pyarrow.Table, data: Data) -> list[str | None]:
    """Each row's label in the prompt; None where rows come without labels."""
    assert data.prompt is not None
    assert data.label is not None
    if (data.label.column if isinstance(data.label, Label) else data.label) not in table.column_names:
        return [None] * len(table)
    found, _ = labels(table, data)
    return [prompt(data.prompt, data.labels[found[k]]) if k in found else None for k in range(len(table))]


def _pixels(table: pyarrow.Table, data: Data) -> list[list[float]]:
    assert data.image is not None
    size = math.prod(data.image.shape)
    if len(table.column_names) < size:
        raise InputError(
            f"data.image.shape {data.image.shape} needs {size} columns, there are {len(table.column_names)}"
        )
    label = data.label.column if isinstance(data.label, Label) else data.label
    if label in table.column_names[:size]:
        raise InputError(
            f"data.image: the label column {label!r} is among the first {size} columns, the pixels"
        )
    try:
        pixels = np.stack([np.asarray(table[k].to_numpy(), dtype=np.float64) for k in range(size)], axis=1)
    except ValueError as error:
        raise InputError(f"data.image: the first {size} columns are not all numbers: {error}") from error
    bad = np.flatnonzero(~np.isfinite(pixels).all(axis=1))
    if len(bad):
        raise InputError(f"data.image: {len(bad)} images hold NaN or infinity (first at row {bad[0] + 1})")
    images: list[list[float]] = pixels.tolist()
    return images


def _pictures(table: pyarrow.Table, image: Image) -> list[np.ndarray]:
    """Images of one column, decoded and resized, as flat arrays of pixels."""
    import PIL.Image

    assert image.column is not None
    found: list[np.ndarray] = []
    for row, value in enumerate(column(table, image.column, "data.image.column")):
        try:
            found.append(picture(value, image).ravel())
        except (OSError, TypeError, ValueError, PIL.Image.DecompressionBombError) as error:
            file = value.get("path") if isinstance(value, dict) else value
            named = f" ({file})" if isinstance(file, str) and file not in str(error) else ""
            raise InputError(
                f"data.image: row {row + 1} of column {image.column!r} is not an image{named}: {error}"
            ) from error
    return found


def picture(value: Any, image: Image) -> np.ndarray:
    """One image as (channels, height, width): from a file's path or bytes (resized), or from an array.

    Raises OSError, TypeError, ValueError or Pillow's DecompressionBombError for what is no image.
    """
    content = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
    channels, height, width = image.shape
    if not isinstance(content, (str, bytes)):
        check(content, {"shape": image.shape})  # pixels of another layout would be mixed up
        return np.asarray(content, dtype=np.float64).reshape(image.shape)
    import PIL.Image

    if channels not in (1, 3):
        raise ValueError(f"a file gives 1 or 3 channels, data.image.shape asks for {channels}")
    with PIL.Image.open(Path(content) if isinstance(content, str) else io.BytesIO(content)) as opened:
        if opened.mode not in (
            "1",
            "L",
            "LA",
            "P",
            "PA",
            "RGB",
            "RGBA",
            "RGBX",
            "CMYK",
            "YCbCr",
            "LAB",
            "HSV",
        ):
            raise ValueError(
                f"its pixels ({opened.mode}) have more than 8 bits, which would be cut; save it with 8"
            )
        resized = opened.convert("L" if channels == 1 else "RGB").resize((width, height), BILINEAR)
    return np.asarray(resized).reshape(height, width, channels).transpose(2, 0, 1)


def cells(column: pyarrow.Array) -> list[Any]:
    """A stored column's values; lists of numbers as arrays, which take a tenth of the memory."""
    import pyarrow

    if pyarrow.types.is_list(column.type):
        return [None if row.values is None else row.values.to_numpy() for row in column]
    if pyarrow.types.is_struct(column.type):
        fields = {field.name: cells(column.field(field.name)) for field in column.type}
        return [dict(zip(fields, row, strict=True)) for row in zip(*fields.values(), strict=True)]
    return list(column.to_pylist())


def identity(value: Any) -> bytes:
    """Equal for inputs that are the same: by text, by pixels, of a pair by its image's pixels."""
    if isinstance(value, dict):
        value = value["image"]
    if isinstance(value, str):
        return value.encode()
    return hashlib.sha256(np.asarray(value, dtype=np.float32).tobytes()).digest()


def labels(table: pyarrow.Table, data: Data) -> tuple[dict[int, int], list[int]]:
    """Class index by row, and the rows that have one; without labels every row counts."""
    if data.label is None:
        return {}, list(range(len(table)))
    if isinstance(data.label, Label):
        return _labels_from_numbers(table, data, data.label)
    index = {name: k for k, name in enumerate(data.labels)}
    found = column(table, data.label, "data.label")
    for row, value in enumerate(found):
        if value is None or str(value) not in index:
            raise InputError(
                f"data.label: unknown label {value!r} in column {data.label!r}, row {row + 1}; "
                f"data.labels has {', '.join(data.labels)}{_missing(value)}"
            )
    return {row: index[str(value)] for row, value in enumerate(found)}, list(range(len(found)))


def _labels_from_numbers(table: pyarrow.Table, data: Data, rule: Label) -> tuple[dict[int, int], list[int]]:
    if len(data.labels) != 2:
        raise InputError(f"data.label.cut makes two classes, data.labels has {len(data.labels)}")
    numbers = column(table, rule.column, "data.label.column")
    bad = [k for k, x in enumerate(numbers) if not isinstance(x, (int, float)) or not math.isfinite(x)]
    if bad:
        raise InputError(
            f"data.label: {len(bad)} rows have no finite number in column {rule.column!r} "
            f"(first at row {bad[0] + 1}: {numbers[bad[0]]!r})"
        )
    kept = [k for k, x in enumerate(numbers) if abs(x - rule.cut) > rule.margin]
    return {k: int(numbers[k] > rule.cut) for k in kept}, kept
