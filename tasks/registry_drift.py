"""What watching a model saw, as MLflow runs: one curve per figure over time."""

from __future__ import annotations

from tasks.artifacts import Version
from tasks.drift import Drifted
from tasks.registry import client
from tasks.registry_engine import run

EXPERIMENT = "enginehouse-drift"


def record(version: Version, found: Drifted) -> str:
    """Log one observation; returns its run's id."""
    import mlflow

    client()
    with run(version.model, experiment=EXPERIMENT) as made:
        mlflow.log_metrics({f"psi_{name}": value for name, value in found.psi.items()})
        mlflow.log_metrics({"rows": found.rows, "overflow_max": max(found.overflow.values(), default=0.0)})
        mlflow.log_dict({"overflow": found.overflow, "calibration": found.before}, "ranges.json")
        tags = {
            "model": version.model,
            "version": version.version,
            "asks": ", ".join(found.asks) or "nothing",
        }
        mlflow.set_tags(tags)
    return str(made.info.run_id)
