"""What a run logs: parameters, metrics, reports, checkpoint, graphs, engines; and a run that failed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from tasks import store
from tasks.manifest import Attempt, metrics
from tasks.measurements import measurements_from_json
from tasks.registry_alias import client
from tasks.registry_engine import pack, run
from tasks.registry_training import log_curves
from tasks.report import report


def log(attempt: Attempt, content: dict[str, Any], scratch: Path) -> None:
    """Everything of an attempt into the run that is open; `content` is its manifest."""
    import mlflow

    mlflow.log_params(_flat(attempt.recipe.model_dump(mode="json")))
    mlflow.log_metrics(_flat(metrics(attempt)))
    mlflow.log_metrics(
        {f"seconds_{t.stage.replace(' ', '_')}_{k}": t.seconds for k, t in enumerate(attempt.timeline)}
    )
    log_curves(attempt, scratch)
    mlflow.log_text(yaml.safe_dump(attempt.recipe.model_dump(mode="json"), sort_keys=False), "recipe.yaml")
    mlflow.log_dict(content, "manifest.json")
    if attempt.measurements and attempt.measurements.blob:
        mlflow.log_artifacts(str(store.path(attempt.measurements.blob)), "gate")
        _report(attempt, store.path(attempt.measurements.blob), scratch / "report")
        mlflow.log_artifacts(str(scratch / "report"), "gate")
    mlflow.log_artifacts(str(store.path(attempt.checkpoints["candidate"].blob)), "checkpoint")
    if "baseline" in attempt.checkpoints and _distills(attempt):
        mlflow.log_artifacts(str(store.path(attempt.checkpoints["baseline"].blob)), "teacher")
    for name, made in (("huggingface", attempt.handover), ("pictures", attempt.pictures)):
        if made and made.blob:
            mlflow.log_artifacts(str(store.path(made.blob)), name)
    if attempt.retrained:  # the rest lies with the version that it came from, or can be made again
        return
    for name, model in attempt.onnx.items():
        if name != "calibrated":  # its numbers are what is wanted
            mlflow.log_artifacts(str(store.path(model.blob)), f"onnx/{name}")
    for name, engine in attempt.engines.items():
        if name not in ("candidate", "calibrated"):
            pack(engine, attempt.recipe.build.max_batch, scratch / name)
            mlflow.log_artifacts(str(scratch / name), f"engines/{name}")


def _distills(attempt: Attempt) -> bool:
    """Whether this recipe's training, or that of a retrain, learns from the baseline."""
    return any(section and section.distill for section in (attempt.recipe.qat, attempt.recipe.retrain))


def _report(attempt: Attempt, judged: Path, folder: Path) -> None:
    assert attempt.verdict is not None
    folder.mkdir()
    found = measurements_from_json((judged / "measurements.json").read_bytes())
    report(attempt.verdict, found, attempt.recipe.gate, folder, attempt.recipe.name)


def record_failure(recipe: dict[str, Any], error: BaseException) -> str:
    """Log a run that ended in an error; nothing is registered. Returns the run's id."""
    import mlflow

    client()
    with run(str(recipe.get("name")), status="FAILED") as made:
        mlflow.log_text(yaml.safe_dump(recipe, sort_keys=False), "recipe.yaml")
        mlflow.log_text(f"{type(error).__name__}: {error}\n", "error.txt")
        mlflow.set_tags({"recipe": recipe.get("name"), "error": str(error)[:4000]})
    return str(made.info.run_id)


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            flat[re.sub(r"[^\w./ -]", "_", f"{prefix}{name}")] = value
    return flat
