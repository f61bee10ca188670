"""One of several labels as output: logits of shape (batch, labels)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks import types
from tasks.types import Example, Run

if TYPE_CHECKING:
    from torch import Tensor, nn

REFERENCES = "labels"
OUTPUTS = {"logits": {0: "batch"}}
TAKES = ("label", "probability")
ANSWER = {"label": "string", "score": "double"}


def forward(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The logits."""
    logits: Tensor = types.result(model(**inputs), "logits")
    return logits


def wrong(shape: tuple[int, ...], settings: dict[str, Any]) -> str:
    """One logit per label."""
    wanted = (1, len(settings["labels"]))
    return "" if shape == wanted else f"the network gives {shape}, data.labels asks for {wanted}"


def targets(batch: Example, labels: np.ndarray) -> np.ndarray:
    """The class indices."""
    return labels


def loss(found: Any, targets: Tensor) -> Tensor:
    """Cross entropy."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(types.result(found, "logits"), targets)


def scores(found: Any, targets: Tensor) -> Tensor:
    """The logits."""
    logits: Tensor = types.result(found, "logits")
    return logits


def row(output: np.ndarray, example: Example) -> np.ndarray:
    """The logits."""
    return output


def predictions(rows: Sequence[np.ndarray], takes: str) -> np.ndarray:
    """The likeliest class, or every class's probability."""
    logits = np.stack(rows)
    return np.asarray(logits.argmax(axis=1)) if takes == "label" else probabilities(logits)


def references(
    examples: Sequence[Example], labels: np.ndarray, baseline: Sequence[np.ndarray] | None
) -> np.ndarray:
    """The class indices."""
    return labels


def trial(labels: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Every class twice, all of them right."""
    classes = np.arange(2 * labels) % labels
    return list(np.eye(labels)[classes]), classes


def traits(row: np.ndarray) -> dict[str, float]:
    """The likeliest class and its probability."""
    shares = probabilities(row)
    return {"class": float(shares.argmax()), "score": float(shares.max())}


def answer(folder: Path, examples: Sequence[Example], run: Run) -> list[dict[str, Any]]:
    """Label and probability of the likeliest class."""
    labels = types.settings(folder)["labels"]
    shares = probabilities(np.asarray(run(examples)))
    return [
        {"label": labels[k], "score": float(row[k]), **types.truncated(example)}
        for k, row, example in zip(shares.argmax(axis=-1), shares, examples, strict=True)
    ]


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))
