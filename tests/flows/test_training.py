"""A recipe that compares: curves live in MLflow, in the manifest, as a picture, again from kept stages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tasks import registry

if TYPE_CHECKING:
    from flows.judge import Outcome

pytestmark = [pytest.mark.slow, pytest.mark.long]
OVERRIDES = [
    "model.name=compared",
    "compare_dense=true",
    "data.split.validation=40",
    "finetune.epochs=3",
    "qat.epochs=2",
    "qat.evaluations=5",
    "qat.early_stopping=5",
    "benchmark.round_ms=1",
    "gate={max_drop: 0.5, on_coarse: warn}",
    "qat.distill={weight: 0.5}",
    "quantize.embeddings=false",
]


def history(run: str, name: str) -> dict[int, float]:
    return {point.step: point.value for point in registry.client().get_metric_history(run, name)}


def trained() -> list[Any]:
    """The trainings of this recipe, each a run: other tests have theirs in the same MLflow."""
    client = registry.client()
    place = client.get_experiment_by_name("enginehouse-training")
    return client.search_runs([place.experiment_id], "tags.recipe = 'tiny'")


def test_curves_are_live_compared_and_shown_again(
    tiny_recipe: Path, optimize: Callable[..., Outcome]
) -> None:
    from mlflow.artifacts import download_artifacts

    outcome = optimize(str(tiny_recipe), *OVERRIDES)
    assert outcome.verdict == "promoted", outcome.reasons
    manifest = json.loads(Path(outcome.version.manifest).read_text())
    curves = manifest["curves"]
    assert set(curves) == {"baseline", "candidate", "dense", "sparse"}
    assert all(curve[0]["step"] == 0 and "validation_loss" in curve[0] for curve in curves.values())
    assert curves["sparse"][0]["validation_loss"] > curves["dense"][0]["validation_loss"]

    runs = {run.data.tags["what"]: run for run in trained()}
    assert set(runs) == {"dense", "2:4", "2:4 int8"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    live = history(runs["2:4 int8"].info.run_id, "validation_loss")
    assert live == {p["step"]: p["validation_loss"] for p in curves["candidate"] if "validation_loss" in p}
    assert history(outcome.version.run_id, "candidate_validation_loss") == live
    for name in ("training/curves.png", "teacher/model.safetensors"):
        assert (
            Path(download_artifacts(run_id=outcome.version.run_id, artifact_path=name)).stat().st_size > 9000
        )

    again = optimize(str(tiny_recipe), *OVERRIDES, "gate.max_drop=0.4")
    assert {timing.reused for timing in again.attempt.timeline if timing.stage == "fine-tune"} == {True}
    assert again.version.run_id != outcome.version.run_id
    assert history(again.version.run_id, "candidate_validation_loss") == live
    assert len(trained()) == len(runs) + 1  # the baseline's is `dense`, too

    from flows.retrain import retrain

    learned = retrain("compared", rebuild=True)
    manifest = json.loads(Path(learned.version.manifest).read_text())
    assert manifest["retrained"]["from_version"] == again.version.version
    assert manifest["curves"]["candidate"][0]["validation_loss"] < live[0]
    assert manifest["recipe"]["qat"]["distill"]["weight"] == 0.5
