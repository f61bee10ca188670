"""Several graphs of one version (an image and a text encoder): each an engine, opened and told of as one.

In a folder with parts every part has a subfolder of its own; a version of one graph has none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import cast

import numpy as np
import onnx

from tasks.artifacts import Facts, Proved
from tasks.engines.common import Arrays, Built, OnDevice, Session, graph_digest, model_file
from tasks.errors import InputError

LEVELS: tuple[Proved, ...] = ("checked", "built", "executed")


def parts_of(folder: Path) -> list[str]:
    """The parts in an engine's or a model's folder, in order; none where it is one graph."""
    return sorted(item.name for item in folder.iterdir() if item.is_dir()) if folder.is_dir() else []


def below(folder: Path | None, part: str) -> Path | None:
    """A part's subfolder, None where it has none."""
    return folder / part if folder is not None and (folder / part).is_dir() else None


class Together:
    """Sessions as one: each takes its own inputs of a feed, and runs where all of them are given."""

    def __init__(self, sessions: Mapping[str, Session], opened: ExitStack) -> None:
        self.sessions, self._opened = dict(sessions), opened
        self.inputs = {name: kind for part in self.sessions.values() for name, kind in part.inputs.items()}
        limits = [getattr(part, "max_batch", None) for part in self.sessions.values()]
        if known := [limit for limit in limits if limit is not None]:
            self.max_batch = min(known)

    def run(self, feed: Arrays) -> dict[str, np.ndarray]:
        """The outputs, by name, of every part that the feed is for."""
        return {name: array for part, own in self._fed(feed) for name, array in part.run(own).items()}

    def _fed(self, feed: Arrays) -> list[tuple[Session, dict[str, np.ndarray]]]:
        found = []
        for part in self.sessions.values():
            own = {name: feed[name] for name in part.inputs if name in feed}
            if len(own) == len(part.inputs):
                found.append((part, own))
        if not found:
            raise InputError(f"the engine's inputs are {sorted(self.inputs)}; given {sorted(feed)}")
        return found

    def __enter__(self) -> Together:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, trace)


class TogetherOnDevice(Together):
    """The same where each part times itself."""

    def latencies(self, feed: Arrays, count: int, warmup: int) -> list[float]:
        """Milliseconds of `count` executions, all parts one after the other."""
        times = [cast(OnDevice, part).latencies(own, count, warmup) for part, own in self._fed(feed)]
        return [sum(each) for each in zip(*times, strict=True)]


def opened(parts: Sequence[str], open_part: Callable[[str], AbstractContextManager[Session]]) -> Together:
    """The parts' sessions as one; what was opened is closed again when one fails."""
    with ExitStack() as stack:
        sessions = {part: stack.enter_context(open_part(part)) for part in parts}
        every = all(isinstance(session, OnDevice) for session in sessions.values())
        return (TogetherOnDevice if every else Together)(sessions, stack.pop_all())


def merged(built: Mapping[str, Built]) -> Built:
    """What is told of all parts: the least that is proved, the worst share, seconds together."""
    first = next(iter(built.values()))
    if list(built) == [""]:
        return first
    graphs = {name: part.graph for name, part in built.items()}
    facts: Facts = {"parts": {name: part.facts for name, part in built.items()}}
    proofs = [part.facts["proof"] for part in built.values() if "proof" in part.facts]
    if len(proofs) == len(built):
        shares = ("quantized_share", "sparse_share")
        facts["proof"] = {name: min(proof[name] for proof in proofs) for name in shares if _all(proofs, name)}
    for name in ("build_seconds", "refit_seconds", "seconds"):
        if _all([part.facts for part in built.values()], name):
            facts[name] = sum(part.facts[name] for part in built.values())
    proved = LEVELS[min(LEVELS.index(part.proved) for part in built.values())]
    return Built(_digest(graphs), first.runtime, first.version, first.device, proved, facts)


def _all(facts: Sequence[Facts], name: str) -> bool:
    return all(found.get(name) is not None for found in facts)


def graph_of(model: Path) -> str:
    """The graph digest of a model's folder: of its one graph, or of all parts by name."""

    def one(folder: Path) -> str:
        return graph_digest(onnx.load(model_file(folder), load_external_data=False))

    parts = parts_of(model)
    return _digest({part: one(model / part) for part in parts}) if parts else one(model)


def _digest(graphs: dict[str, str]) -> str:
    lines = "".join(f"{name} {graph}\n" for name, graph in sorted(graphs.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def settled(folder: Path, part: str, names: Sequence[str] = ("plan", "weights")) -> None:
    """Move what was made in `folder/PART/plan` to `folder/plan/PART`; nothing to do for one graph."""
    for name in names:
        if part and (made := folder / part / name).is_dir():
            (folder / name).mkdir(exist_ok=True)
            made.rename(folder / name / part)
