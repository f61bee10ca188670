"""Vectors that are compared with the baseline's own: there are no labels, and nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.types import Example

if TYPE_CHECKING:
    from torch import Tensor

REFERENCES = "baseline"
TAKES = ("vector",)


def targets(batch: Example, labels: np.ndarray) -> np.ndarray:
    """Nothing: recipes refuse training."""
    raise AssertionError("nothing is trained here")


def loss(found: Any, targets: Tensor) -> Tensor:
    """Nothing: recipes refuse training."""
    raise AssertionError("nothing is trained here")


def scores(found: Any, targets: Tensor) -> Tensor:
    """Nothing: recipes refuse training."""
    raise AssertionError("nothing is trained here")


def predictions(rows: Sequence[np.ndarray], takes: str) -> np.ndarray:
    """The vectors."""
    return np.stack(rows)


def references(
    examples: Sequence[Example], labels: np.ndarray, baseline: Sequence[np.ndarray] | None
) -> np.ndarray:
    """The baseline's vectors."""
    assert baseline is not None
    return np.stack(baseline)


def trial(labels: int) -> tuple[list[np.ndarray], np.ndarray]:
    """A few vectors, all of them right."""
    vectors = np.eye(32)
    return list(vectors), vectors
