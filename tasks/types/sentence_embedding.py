"""Text in, one vector of length 1 out: the mean over the tokens, normalised in the exported graph.

There are no labels: a metric compares with the vectors of the uncompressed baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks import types
from tasks.types import Example, Run
from tasks.types.texts import *  # noqa: F403
from tasks.types.vectors import *  # noqa: F403

if TYPE_CHECKING:
    from torch import Tensor, nn

OUTPUTS = {"embedding": {0: "batch"}}
AUTO = "AutoModel"
ANSWER = {"embedding": "doubles", "truncated": "boolean"}


def forward(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Mean of the hidden states where the mask is 1, to length 1."""
    hidden: Tensor = types.result(model(**inputs), "last_hidden_state")
    mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    unit: Tensor = mean / mean.norm(dim=1, keepdim=True).clamp(min=1e-6)
    return unit


def wrong(shape: tuple[int, ...], settings: dict[str, Any]) -> str:
    """One vector per text."""
    return "" if len(shape) == 2 else f"the network gives {shape}, not one vector per text"


def row(output: np.ndarray, example: Example) -> np.ndarray:
    """The vector."""
    return output


def traits(row: np.ndarray) -> dict[str, float]:
    """Nothing: what drifts is seen in sizes and ranges."""
    return {}


def answer(folder: Path, examples: Sequence[Example], run: Run) -> list[dict[str, Any]]:
    """The vector as a list of numbers."""
    vectors = np.asarray(run(examples), dtype=np.float64)
    return [
        {"embedding": vector.tolist(), **types.truncated(example)}
        for vector, example in zip(vectors, examples, strict=True)
    ]
