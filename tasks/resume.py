"""Where a training keeps its place, so that a killed one goes on: ENGINEHOUSE_HOME/training/<stage key>/.

A checkpoint is a folder `checkpoint-<step>`; it counts once `checkpoint-<step>.complete` lies beside it, with
its digest: what a kill left half written is never loaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks import store


def root() -> Path:
    """The folder of all places."""
    return store.home() / "training"


@contextmanager
def held(key: str) -> Iterator[Path]:
    """The folder of the training with this key, gone once the block is done; a stage runs once at a time."""
    folder = root() / key
    with store.explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    shutil.rmtree(folder, ignore_errors=True)


def finish(checkpoint: Path) -> None:
    """Declare a checkpoint whole, then remove the earlier ones."""
    _mark(checkpoint).write_text(store.digest(checkpoint))
    for other in _checkpoints(checkpoint.parent):
        if other != checkpoint:
            _remove(other)


def last(folder: Path) -> Path | None:
    """The latest checkpoint that is whole; what is not is removed."""
    for checkpoint in sorted(_checkpoints(folder), key=step, reverse=True):
        mark = _mark(checkpoint)
        if mark.is_file() and mark.read_text() == store.digest(checkpoint):
            return checkpoint
        _remove(checkpoint)
    return None


def step(checkpoint: Path) -> int:
    """How many steps the checkpoint's network has been trained."""
    return int(checkpoint.name.rpartition("-")[2])


def _mark(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.complete")


def _remove(checkpoint: Path) -> None:
    _mark(checkpoint).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    return [place for place in folder.glob("checkpoint-*") if place.is_dir()]
