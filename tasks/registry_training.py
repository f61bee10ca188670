"""Trainings in MLflow while they run: a run each in the experiment `enginehouse-training`.

The run of what came of it, in `enginehouse`, has the same curves, from the stage's result.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.curves import curves, plot
from tasks.manifest import Attempt
from tasks.registry_alias import client
from tasks.registry_engine import EXPERIMENT, experiment_id
from tasks.stage import listeners, say
from tasks.training import described

if TYPE_CHECKING:
    from mlflow import MlflowClient

TRAINING = f"{EXPERIMENT}-training"
AT_ONCE = 1000  # metrics that MLflow takes in a request


class Live:
    """Hands losses to MLflow as they come; a killed training that goes on keeps its run."""

    def __init__(self, recipe: str) -> None:
        self.recipe = recipe
        self.runs: dict[str, str] = {}
        self.logged: dict[str, dict[str, int]] = {}

    def __call__(self, key: str, what: str, step: int, losses: dict[str, float]) -> None:
        """MLflow that does not answer is told once, and ends no training."""
        from mlflow.exceptions import MlflowException

        try:
            self._log(key, what, step, losses)
        except (MlflowException, OSError) as error:
            listeners.remove(self)
            say(f"fine-tune: the curve is not live in MLflow ({error})")

    def _log(self, key: str, what: str, step: int, losses: dict[str, float]) -> None:
        from mlflow.entities import Metric

        mlflow = client()
        if key not in self.runs:
            self.runs[key], self.logged[key] = _run(mlflow, key, what, self.recipe)
        now = int(time.time() * 1000)
        known = self.logged[key]
        fresh = [Metric(n, value, now, step) for n, value in losses.items() if step > known.get(n, -1)]
        if fresh:
            mlflow.log_batch(self.runs[key], metrics=fresh)
        if not losses:
            mlflow.set_terminated(self.runs.pop(key))

    def close(self) -> None:
        """What has not ended now, failed."""
        from mlflow.exceptions import MlflowException

        with suppress(MlflowException, OSError):  # the flow's own error is the one to tell
            for run in self.runs.values():
                client().set_terminated(run, "FAILED")


@contextmanager
def live(recipe: str) -> Iterator[None]:
    """While the block runs, the losses of its trainings go to MLflow as they come."""
    listener = Live(recipe)
    listeners.append(listener)
    try:
        yield
    finally:
        if listener in listeners:
            listeners.remove(listener)
            listener.close()


def log_curves(attempt: Attempt, scratch: Path) -> None:
    """Every curve, whether the training ran now or before; the picture where there is one to compare."""
    import mlflow
    from mlflow.entities import Metric

    found, now = curves(attempt), int(time.time() * 1000)
    run = mlflow.active_run()
    assert run is not None
    for name, curve in found.items():
        losses = [(key, p["step"], value) for p in curve for key, value in p.items() if key != "step"]
        points = [Metric(f"{name}_{key}", value, now, int(step)) for key, step, value in losses]
        for start in range(0, len(points), AT_ONCE):
            client().log_batch(run.info.run_id, metrics=points[start : start + AT_ONCE])
    if attempt.controls:
        plot(found, described(attempt.checkpoints["candidate"]), scratch / "curves.png", attempt.recipe.name)
        mlflow.log_artifact(str(scratch / "curves.png"), "training")


def _run(mlflow: MlflowClient, key: str, what: str, recipe: str) -> tuple[str, dict[str, int]]:
    """The training's run (that of one that did not end, if there is), and its last step of each loss."""
    place = experiment_id(TRAINING)
    known = mlflow.search_runs([place], f"tags.training = '{key}' and attributes.status != 'FINISHED'")
    if known:
        run = str(known[0].info.run_id)
        mlflow.update_run(run, status="RUNNING")
        losses = {name: mlflow.get_metric_history(run, name) for name in known[0].data.metrics}
        return run, {name: max(point.step for point in history) for name, history in losses.items()}
    tags = {"training": key, "recipe": recipe, "what": what}
    return str(mlflow.create_run(place, tags=tags, run_name=f"{recipe}: {what}").info.run_id), {}
