"""Garbage collection: what no version, run or ledger line refers to, in the store and among shared artifacts.

python -m flows prune [--delete] [--days N]
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tasks import registry_garbage, resume, store

DAY = 24 * 3600


@dataclass(frozen=True)
class Garbage:
    """One thing that nothing refers to: where it is, what it was, its bytes."""

    kind: str
    place: str
    bytes: int


@dataclass(frozen=True)
class Survey:
    """What is kept (how many, bytes), and what may go."""

    kept: int
    kept_bytes: int
    garbage: tuple[Garbage, ...]


def survey(days: float) -> Survey:
    """Everything unreferenced and not used for `days`: what is younger may be of a run under way."""
    referenced = registry_garbage.references()
    before = time.time() - days * DAY
    kept, kept_bytes, garbage = 0, 0, []
    for folder in _artifacts():
        size = _bytes(folder)
        if folder.name in referenced or folder.stat().st_mtime > before:
            kept, kept_bytes = kept + 1, kept_bytes + size
        else:
            garbage.append(Garbage("artifact", str(folder), size))
    for folder in (store.home() / "store").glob(".staging-*"):
        if folder.stat().st_mtime <= before:
            garbage.append(Garbage("staging", str(folder), _bytes(folder)))
    for place in resume.root().glob("*"):  # of trainings that were killed and not started again
        if place.is_dir() and place.stat().st_mtime <= before:
            garbage.append(Garbage("training", str(place), _bytes(place)))
    garbage += [
        Garbage("shared", run, size)
        for run, size in registry_garbage.unreferenced(referenced, before).items()
    ]
    return Survey(kept, kept_bytes, tuple(garbage))


def remove(garbage: Garbage) -> None:
    """Remove one thing; what is gone already is no error."""
    if garbage.kind == "shared":
        registry_garbage.delete_shared(garbage.place)
        return
    shutil.rmtree(garbage.place, ignore_errors=True)


def _artifacts() -> Iterator[Path]:
    root = store.home() / "store"
    return (folder for part in root.glob("[0-9a-f][0-9a-f]") for folder in part.iterdir())


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
