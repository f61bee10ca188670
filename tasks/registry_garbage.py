"""What MLflow refers to, and the shared blobs that nothing refers to any more."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tasks import ledger
from tasks.errors import InputError
from tasks.registry import client, noted
from tasks.registry_alias import GONE
from tasks.registry_engine import EXPERIMENT, SHARED

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


def references() -> set[str]:
    """Every digest that a run's manifest, and so a version or a ledger line, names.

    Raises InputError where a manifest cannot be read now: what it names must stay.
    """
    mlflow = client(room=False)
    found = {digest for run_id in ledger.runs() for digest in _digests(run_id)}
    for experiment in mlflow.search_experiments():
        if experiment.name == EXPERIMENT:
            for made in _runs(mlflow, experiment.experiment_id):
                if "gate" in made.data.tags:  # only a whole run has it, and a manifest
                    found |= _digests(made.info.run_id)
    return found


def _digests(run_id: str) -> set[str]:
    """Every digest in a run's manifest; none where MLflow says that there is no manifest any more."""
    from mlflow.exceptions import MlflowException

    try:
        return set(re.findall(r"\b[0-9a-f]{64}\b", json.dumps(noted(run_id))))
    except (MlflowException, OSError, ValueError) as error:
        if _gone(run_id):
            return set()
        raise InputError(
            f"nothing was removed: the manifest of MLflow's run {run_id} cannot be read, and what it names "
            f"must stay ({type(error).__name__}: {error}). Run prune again once MLflow answers and the disk "
            "has room; a run whose files are lost no longer counts once you delete it in MLflow"
        ) from error


def _gone(run_id: str) -> bool:
    """Whether MLflow says that the run is gone for good, or it is not one of ours: then it has no manifest.

    The failed download does not tell: to MLflow a file that its server could not send is a missing one, too.
    """
    from mlflow.exceptions import MlflowException

    mlflow = client(room=False)
    try:
        made = mlflow.get_run(run_id)
        files = {file.path for file in mlflow.list_artifacts(run_id)}
    except MlflowException as error:
        return error.error_code in GONE
    except OSError:
        return False
    whole = made.info.lifecycle_stage == "active" and "gate" in made.data.tags
    return "manifest.json" not in files and not whole


def unreferenced(referenced: set[str], before: float) -> dict[str, int]:
    """Runs that hold a shared blob which nothing refers to, made before a time (s), and their bytes."""
    mlflow = client(room=False)
    found = {}
    for experiment in mlflow.search_experiments():
        kind = experiment.name.removeprefix(f"{EXPERIMENT}-").removesuffix("s")
        if kind not in SHARED:
            continue
        for made in _runs(mlflow, experiment.experiment_id):
            if made.data.tags.get(kind) not in referenced and made.info.start_time / 1000 <= before:
                files = mlflow.list_artifacts(made.info.run_id, kind)
                found[str(made.info.run_id)] = sum(file.file_size or 0 for file in files)
    return found


def delete_shared(run_id: str) -> None:
    """Remove a run that held a shared blob, then its files: what `shared` finds by its digest has them."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    mlflow = client(room=False)
    files = get_artifact_repository(mlflow.get_run(run_id).info.artifact_uri)
    mlflow.delete_run(run_id)
    files.delete_artifacts()  # type: ignore[no-untyped-call]


def _runs(mlflow: MlflowClient, experiment: str) -> Iterator[Run]:
    token = None
    while True:
        page = mlflow.search_runs([experiment], max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
