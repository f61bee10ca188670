"""An engine in a folder, as it answers requests: preprocess, run in batches, decode. No MLflow, no torch.

from tasks.predictor import Predictor
Predictor(Path("~/.enginehouse/serving/NAME/current").expanduser()).predict(["a fine film"])
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tasks import types
from tasks.engines import open_engine
from tasks.engines.common import PAST, Session
from tasks.errors import InputError


@dataclass(frozen=True)
class Runner:
    """Examples through a session; `step` takes a batch as the engine does, with a cache where it has one."""

    session: Session
    kind: types.TaskType
    largest: int | None = None

    @property
    def cached(self) -> bool:
        """Whether the engine takes and gives a key/value cache."""
        return any(name.startswith(PAST) for name in self.session.inputs)

    def __call__(self, examples: Sequence[types.Example]) -> np.ndarray:
        """The engine's output for these examples, in batches that it takes."""
        largest = self.largest or len(examples)
        parts = [examples[start : start + largest] for start in range(0, len(examples), largest)]
        found = [types.joined(self.kind, self.step(self.kind.collate(part))) for part in parts]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def step(self, feed: types.Example) -> types.Example:
        """All outputs by name."""
        return self.session.run(feed)


class Predictor:
    """`folder` holds engine.json, preprocessor, weights and, unless it is given apart, the plan."""

    def __init__(self, folder: Path, plan: Path | None = None) -> None:
        self.about: dict[str, Any] = json.loads((folder / "engine.json").read_text())
        weights = folder / "weights"
        self.preprocessor = folder / "preprocessor"
        self.settings = types.settings(self.preprocessor)
        self.kind = types.load(self.settings["type"])
        runtime, plan = self.about["plan"]["runtime"], plan or folder / "plan"
        self.session = open_engine(runtime, plan, weights if weights.is_dir() else None)
        self.run = Runner(self.session, self.kind, int(self.about["max_batch"]))

    def predict(self, values: Sequence[Any]) -> list[dict[str, Any]]:
        """What the task type answers (`{"label", "score"}`) per value; a bad one is named by its place."""
        for place, value in enumerate(values):
            try:
                self.kind.check(value, self.settings)
            except InputError as error:
                raise InputError(f"input {place}: {error}") from None
        encoded = self.kind.encode(self.preprocessor, values)
        largest = int(self.about["max_batch"])
        found: list[dict[str, Any]] = []
        for start in range(0, len(encoded), largest):
            found += self.kind.answer(self.preprocessor, encoded[start : start + largest], self.run)
        return found

    def output(self, values: Sequence[Any]) -> np.ndarray:
        """The engine's output for at most one batch of values that were checked."""
        return self.run(self.kind.encode(self.preprocessor, values))
