"""One file per runtime, the same few functions in each: version, device, build, refit, open, proof."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasks.engines.common import Session

MODULES = {"onnxruntime": "onnxruntime", "tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt"}


def module(runtime: str) -> ModuleType:
    """The engine module of a runtime (`tensorrt_rtx` and `tensorrt-rtx` are the same)."""
    return importlib.import_module(f"tasks.engines.{MODULES[runtime.replace('_', '-')]}")


def open_engine(runtime: str, plan: Path, weights: Path | None, **options: Any) -> Session:
    """A session on the plan and its weights; a context manager, or open as long as the process.

    Where the plan has parts, a session on all of them.
    """
    from tasks.engines.together import below, opened, parts_of

    def one(part: str) -> Session:
        own = below(weights, part) if part else weights
        session: Session = module(runtime).open(plan / part, own, **options)
        return session

    parts = parts_of(plan)
    return opened(parts, one) if parts else one("")
