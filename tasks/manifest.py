"""The manifest of a run: what was made, from what, by which code, on which machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from recipes.schema import Recipe
from tasks.artifacts import Checkpoint, Dataset, Engine, Facts, Metrics, OnnxModel, Verdict
from tasks.curves import curves
from tasks.stage import Timing

LIBRARIES = (
    "torch", "transformers", "datasets", "nvidia-modelopt", "onnx", "onnxruntime",
    "tensorrt", "tensorrt-rtx", "prefect", "mlflow", "numpy",
)  # fmt: skip


@dataclass(frozen=True)
class Attempt:
    """One whole run: what every stage made and measured, for the registry and the report."""

    recipe: Recipe
    dataset: Dataset
    checkpoints: dict[str, Checkpoint]
    onnx: dict[str, OnnxModel]
    engines: dict[str, Engine]
    found: dict[str, str] = field(default_factory=dict)
    """What data, starting weights and a metric function of the user's own were, as digests."""
    retrained: Facts | None = None
    """Of a retrain: from which version, refitted or built and why, with the seconds of both."""
    teacher_run: str | None = None
    """The run that keeps the teacher where this one makes no baseline: the first ancestor's."""
    scores: dict[str, Metrics] = field(default_factory=dict)
    handover: Metrics | None = None
    """The candidate as a Hugging Face checkpoint, where the recipe asks for one."""
    pictures: Metrics | None = None
    """Of a diffusion model: what baseline and candidate make of the same noise."""
    timing: Metrics | None = None
    verdict: Verdict | None = None
    measurements: Metrics | None = None
    timeline: tuple[Timing, ...] = ()
    controls: dict[str, Checkpoint] = field(default_factory=dict)
    """Trained for their curves alone, with compare_dense: dense and sparse."""


def manifest(attempt: Attempt) -> dict[str, Any]:
    """JSON-able; artifacts by digest."""
    recipe = attempt.recipe
    calibrated = attempt.checkpoints["candidate"]
    return {
        "recipe": recipe.model_dump(mode="json"),
        "code": code(),
        "host": host(),
        "versions": versions(),
        "data": asdict(attempt.dataset),
        "found": attempt.found,
        "retrained": attempt.retrained,
        "teacher_run": attempt.teacher_run,
        "sparsity": calibrated.facts.get("sparsity"),
        "quantizers": calibrated.facts.get("quantizers"),
        "checkpoints": {name: _without(asdict(item), "curve") for name, item in attempt.checkpoints.items()},
        "curves": curves(attempt),
        "onnx": {name: asdict(item) for name, item in attempt.onnx.items()},
        "engines": {name: asdict(item) | {"bytes": item.bytes} for name, item in attempt.engines.items()},
        "handover": asdict(attempt.handover) if attempt.handover else None,
        "metrics": metrics(attempt),
        "timing": asdict(attempt.timing) if attempt.timing else None,
        "verdict": asdict(attempt.verdict) if attempt.verdict else None,
        "stages": [asdict(timing) for timing in attempt.timeline],
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def metrics(attempt: Attempt) -> dict[str, float]:
    """The numbers of candidate, baseline and champion under one flat name each."""
    found: dict[str, float] = {}
    for name, scores in attempt.scores.items():
        found |= {f"{name}_{key}": value for key, value in scores.values.items()}
    for name, engine in attempt.engines.items():
        found[f"{name}_bytes"] = float(engine.bytes)
    if attempt.timing:
        found |= attempt.timing.values
    return found


def code() -> dict[str, Any]:
    """The commit this runs from, and whether files differ from it; None outside a git checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=30)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def host() -> dict[str, Any]:
    """The machine's name, processor, cores and system."""
    return {
        "name": platform.node(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def versions(names: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Versions of the named libraries, those that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def _without(value: dict[str, Any], key: str) -> dict[str, Any]:
    return value | {"facts": {name: item for name, item in value["facts"].items() if name != key}}
