"""A dataset's rows as model inputs: the same encoding for training, calibration, export and the engines."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from tasks import store, types
from tasks.artifacts import Checkpoint, Dataset
from tasks.load import rows
from tasks.types import Example

if TYPE_CHECKING:
    from torch import Tensor, nn


def examples(dataset: Dataset, part: str, preprocessor: Path) -> tuple[list[Example], np.ndarray]:
    """Every encoded example of a part, and the labels as int64 of shape (rows,), or (0,) without any."""
    labels = np.asarray(rows(dataset, part).get("label", []), dtype=np.int64)
    return inputs(dataset, part, preprocessor), labels


def inputs(dataset: Dataset, part: str, preprocessor: Path) -> list[Example]:
    """Every encoded example of a part, labelled or not."""
    kind = types.load(dataset.type)
    return kind.encode(preprocessor, rows(dataset, part)[kind.COLUMN])


def batches(dataset: Dataset, part: str, preprocessor: Path, size: int) -> Iterator[Example]:
    """The part in order, collated into batches of at most `size`."""
    kind = types.load(dataset.type)
    encoded = inputs(dataset, part, preprocessor)
    for start in range(0, len(encoded), size):
        yield kind.collate(encoded[start : start + size])


def samples(dataset: Dataset, preprocessor: Path, count: int = 4, size: int = 8) -> list[Example]:
    """A few real batches from the calibration rows, for parity checks and shapes."""
    return list(itertools.islice(batches(dataset, "calibration", preprocessor, size), count))


def forward(dataset: Dataset, checkpoint: Checkpoint) -> Callable[[nn.Module], Tensor]:
    """A function that gives a network's output for a few calibration rows."""
    kind = types.load(dataset.type)

    @functools.cache
    def sample() -> dict[str, Tensor]:
        return tensors(samples(dataset, preprocessor(checkpoint), count=1, size=2)[0])

    return lambda model: kind.forward(model, sample())


def forward_loop(
    dataset: Dataset, preprocessor: Path, size: int, name: str, most: int | None = None
) -> Callable[[nn.Module], None]:
    """A function that runs calibration rows (every one, or `most`) through a network, with a progress bar."""
    total = -(-(most or dataset.rows["calibration"]) // size)

    def loop(model: nn.Module) -> None:
        data = itertools.islice(batches(dataset, "calibration", preprocessor, size), total)
        device = next(model.parameters()).device
        for batch in tqdm(data, total=total, desc=name, unit="batch"):
            model(**{key: tensor.to(device) for key, tensor in tensors(batch).items()})

    return loop


def tensors(batch: Example) -> dict[str, Tensor]:
    """A batch for torch, sharing memory."""
    import torch

    return {name: torch.from_numpy(array) for name, array in batch.items()}


def preprocessor(checkpoint: Checkpoint) -> Path:
    """The folder with tokenizer or image settings."""
    return store.path(checkpoint.blob) / "preprocessor"
