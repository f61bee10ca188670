"""Open an engine from the store, whatever its runtime."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tasks import store, types
from tasks.artifacts import Engine
from tasks.engines import open_engine
from tasks.engines.common import Session


def labels(engine: Engine) -> list[str]:
    """The class names that the engine's outputs stand for, in order."""
    return list(types.settings(store.path(engine.preprocessor))["labels"])


@contextmanager
def opened(engine: Engine, threads: int | None = None) -> Iterator[Session]:
    """A session on the engine's plan and weights, their digests checked."""
    options: dict[str, Any] = {"threads": threads} if engine.plan.runtime == "onnxruntime" else {}
    weights = store.path(engine.weights) if engine.weights else None
    with open_engine(engine.plan.runtime, store.path(engine.plan.blob), weights, **options) as session:
        yield session
