"""Texts as inputs: tokenized by the `tokenizers` library from `tokenizer.json`, cut at `max_length`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks import types
from tasks.errors import InputError
from tasks.types import Example

if TYPE_CHECKING:
    from tokenizers import Tokenizer

COLUMN = "text"
INPUTS = {
    "input_ids": {0: "batch", 1: "length"},
    "attention_mask": {0: "batch", 1: "length"},
}


def check(value: Any, settings: dict[str, Any]) -> None:
    """Raise InputError unless `value` is text with something in it."""
    if not isinstance(value, str):
        raise InputError(f"expected text, got {type(value).__name__} ({value!r:.80})")
    if not value.strip():
        raise InputError("the text is empty")


def tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a preprocessor's folder."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def encode(folder: Path, values: Sequence[Any]) -> list[Example]:
    """Token ids and mask per text, int64 of shape (length,), and whether the text was cut."""
    own = tokenizer(folder)
    own.no_padding()
    own.enable_truncation(types.settings(folder)["max_length"])
    return [
        {
            "input_ids": np.asarray(item.ids, dtype=np.int64),
            "attention_mask": np.asarray(item.attention_mask, dtype=np.int64),
            "truncated": np.asarray(bool(item.overflowing)),
        }
        for item in own.encode_batch(list(values))
    ]


def collate(examples: Sequence[Example]) -> Example:
    """Pad to the longest with zeros (masked), to shape (batch, length)."""
    length = max(len(example["input_ids"]) for example in examples)
    return {
        name: np.stack([np.pad(example[name], (0, length - len(example[name]))) for example in examples])
        for name in INPUTS
    }


def size(example: Example) -> float:
    """How many tokens the text has, after the cut."""
    return float(example["input_ids"].size)


def example(settings: dict[str, Any]) -> str:
    """Any text."""
    return "a text of a few words"


def smoke(folder: Path) -> list[str]:
    """Two texts of different lengths."""
    return ["a smoke request", "the second request is a longer one, so that the shorter is padded"]
