"""The registry: runs, versions, aliases, champions. With registry_engine all that talks to MLflow.

python -m flows optimize RECIPE     (stages `find champion`, `register` and `promote`)
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from prefect import task

from recipes.schema import Recipe
from tasks import ledger, store
from tasks.artifacts import Engine, Version
from tasks.errors import InputError
from tasks.manifest import Attempt, manifest
from tasks.previous import held_out
from tasks.registry_alias import CHAMPION, GONE, aliased, client, promote
from tasks.registry_engine import fetch, log_model, plan_address, run, shared, unpack
from tasks.registry_run import log
from tasks.running import labels
from tasks.stage import NETWORK

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

__all__ = ["CHAMPION", "client", "promote"]  # and what is defined here


@dataclass(frozen=True)
class Champion:
    """The version that carries the alias, its engine, and the digests of the recipe that made it and of a
    metric function of the user's own that judged it.
    """

    version: Version
    engine: Engine
    recipe: str
    metric: str


@task(name="find champion", persist_result=False, **NETWORK)
def champion(model: str) -> Champion | None:
    """The champion, its files checked against their digests; None without one."""
    mlflow = client()
    version = aliased(mlflow, model, CHAMPION)
    if version is None:
        return None
    with store.staging() as folder:
        source = fetch(f"models:/{model}/{version.version}", folder / "download")
        digests = (version.tags.get(name, "") for name in ("recipe_sha256", "metric_content"))
        return Champion(version_of(version, model), unpack(source, folder), *digests)


def made_by(champion: Champion, recipe: Recipe, engine: Engine, metric: str) -> bool:
    """Whether the champion is this engine, from this very recipe, and passed its gate by this metric."""
    passed = champion.version.gate == "passed" and same_engine(champion.engine, engine)
    return passed and (champion.recipe, champion.metric) == (_recipe_digest(recipe), metric)


def same_engine(one: Engine, other: Engine) -> bool:
    """Whether plan and weights are the same, byte for byte."""
    return (one.plan.blob, one.weights) == (other.plan.blob, other.weights)


def unmeasurable(champion: Champion, candidate: Engine) -> str | None:
    """Why the champion cannot be measured beside the candidate here; None when it can."""
    here, there, ours = candidate.plan, champion.engine.plan, champion.version
    name, known = f"version {ours.version}", ledger.lines(ours.model)
    if ours.gate != "passed" and not ledger.override(known, ours.version, ours.run_id):
        return f"{name} carries the alias with gate={ours.gate}; remove the alias"
    if labels(champion.engine) != labels(candidate):
        return f"{name} has other labels: {', '.join(labels(champion.engine))}"
    for what in ("runtime", "version", "device"):
        if getattr(here, what) != getattr(there, what):
            return f"{name} was made for {what} {getattr(there, what)}, here is {getattr(here, what)}"
    return None


def elsewhere(champion: Champion, candidate: Engine) -> bool:
    """Whether only the place is in the way: the same network could be built for this runtime and device."""
    sound = champion.version.gate == "passed" and labels(champion.engine) == labels(candidate)
    here, there = candidate.plan, champion.engine.plan
    return sound and (here.runtime, here.version, here.device) != (there.runtime, there.version, there.device)


def current(model: str) -> Version | None:
    """The version that carries the champion alias; None without one."""
    found = aliased(client(), model, CHAMPION)
    return version_of(found, model) if found else None


def version(model: str, number: str) -> Version:
    """A version by its number; raises InputError where there is none."""
    registered(model, number)
    return version_of(client().get_model_version(model, number), model)


def recipe_content(recipe: Recipe) -> str:
    """Digest of everything a recipe says but its name and where data and weights lie."""
    content = recipe.model_dump(mode="json", exclude={"name": True, "model": {"source", "revision"}})
    content["data"] = {k: v for k, v in content["data"].items() if k not in ("source", "revision")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@task(name="register", persist_result=False, **NETWORK)
def register(attempt: Attempt, gate: str, reason: str) -> Version:
    """Log the run with everything it made, and register its engine with the gate's word and the reason.

    The same engine with the same recipe and verdict is registered once: a repetition finds its version.
    """
    mlflow = client()
    model = attempt.recipe.model.name
    key = _key(attempt, gate)
    known = _known(mlflow, model, key)
    if known is not None:
        return version_of(known, model)
    content, address = manifest(attempt), plan_address(attempt.engines["candidate"])
    content["held_out"] = _held_out(attempt)
    with run(attempt.recipe.name) as made, tempfile.TemporaryDirectory() as scratch:
        log(attempt, content, Path(scratch))
        uri = log_model(attempt, Path(scratch), address)
        tags = {
            "gate": gate,
            "proved": attempt.engines["candidate"].proved,
            "runtime": attempt.engines["candidate"].plan.runtime,
            "recipe": attempt.recipe.name,
            "recipe_sha256": _recipe_digest(attempt.recipe),
            "recipe_content": recipe_content(attempt.recipe),
            **{f"{name}_content": digest for name, digest in attempt.found.items()},
            "key": key,
        }
        if attempt.retrained:
            tags["retrained_from"] = attempt.retrained["from_version"]
        # Last, and whole: a version is there with its gate tag, or it is not there.
        registered = _create_version(mlflow, model, uri, made.info.run_id, tags, reason)
        mlflow.set_tag(made.info.run_id, "gate", gate)
    return version_of(mlflow.get_model_version(model, registered.version), model)


@dataclass(frozen=True)
class Judged:
    """What a run logged of its judgement."""

    recipe: dict[str, Any]
    measurements: bytes
    verdict: bytes
    metrics: dict[str, float]


def judged(run_id: str) -> Judged:
    """The recipe, measurements and verdict of a run; raises InputError for a run that was not judged."""
    import mlflow

    client()
    missing = f"run {run_id}: no verdict was logged here"
    with tempfile.TemporaryDirectory() as scratch, _logged(missing, run_id):
        numbers = json.loads(manifest_file(run_id).read_text())["metrics"]
        gate = Path(
            mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path="gate", dst_path=scratch)
        )
        recipe = mlflow.artifacts.load_text(f"runs:/{run_id}/recipe.yaml")
        found = {name: (gate / f"{name}.json").read_bytes() for name in ("measurements", "verdict")}
    return Judged(yaml.safe_load(recipe), found["measurements"], found["verdict"], numbers)


@dataclass(frozen=True)
class Registered:
    """What MLflow says of a version."""

    model: str
    version: str
    run_id: str
    tags: dict[str, str]
    description: str


def registered(model: str, version: str) -> Registered:
    """A version by its number; raises InputError where there is none."""
    from mlflow.exceptions import MlflowException

    try:
        found = client().get_model_version(model, version)
    except MlflowException as error:
        if error.error_code not in GONE:
            raise
        raise InputError(f"there is no version {version} of {model} ({error.message})") from error
    return Registered(model, version, found.run_id or "", dict(found.tags), found.description or "")


def engine_of(model: str, version: str) -> Engine:
    """A version's engine, brought into the store; raises InputError when it is altered or gone."""
    client()
    with store.staging() as folder, _logged(f"version {version} of {model}"):
        return unpack(fetch(f"models:/{model}/{version}", folder / "download"), folder)


def recipe_of(run_id: str) -> Recipe:
    """The recipe that a run logged."""
    import mlflow

    client()
    with _logged(f"run {run_id}", run_id):
        return Recipe.model_validate(
            yaml.safe_load(mlflow.artifacts.load_text(f"runs:/{run_id}/recipe.yaml"))
        )


def manifest_of(run_id: str) -> dict[str, Any]:
    """The manifest that a run logged, as it lies in MLflow now."""
    import mlflow

    client()
    with _logged(f"run {run_id}", run_id):
        content: dict[str, Any] = json.loads(mlflow.artifacts.load_text(f"runs:/{run_id}/manifest.json"))
    return content


def checkpoint_digest(run_id: str) -> str:
    """The digest of the checkpoint that a run logged, as it lies in MLflow now."""
    client()
    with store.staging() as folder, _logged(f"run {run_id}", run_id):
        return store.digest(fetch(f"runs:/{run_id}/checkpoint", folder / "checkpoint"))


@contextmanager
def _logged(what: str, run_id: str | None = None) -> Iterator[None]:
    """Say in words what is not in MLflow or not whole; that MLflow does not answer stays as it is."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (FileNotFoundError, NotADirectoryError, KeyError) as error:
        raise InputError(f"{what}: an artifact is not in MLflow ({error})") from error
    except MlflowException as error:
        if error.error_code not in GONE:
            raise
        if run_id and _listed(run_id, error.message):
            raise MlflowException(f"{what}: MLflow has it and did not send it ({error.message})") from error
        raise InputError(f"{what}: an artifact is not in MLflow ({error.message})") from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{what}: an artifact cannot be read ({error})") from error


def _listed(run_id: str, message: str) -> bool:
    """Whether the run has what the message names: to MLflow a file that was not sent is a missing one."""
    from mlflow.exceptions import MlflowException

    try:
        names = [file.path for file in client().list_artifacts(run_id)]
    except MlflowException as error:
        if error.error_code in GONE:
            return False
        raise
    return any(repr(name) in message for name in names)


def gate_report(run_id: str) -> str | None:
    """The gate's report of a run, as Markdown; None for a run that was not judged."""
    import mlflow
    from mlflow.exceptions import MlflowException

    client()
    try:
        return str(mlflow.artifacts.load_text(f"runs:/{run_id}/gate/gate.md"))
    except (MlflowException, OSError):
        return None


def tag(run_id: str, tags: dict[str, str]) -> None:
    """Add tags to a run."""
    for name, value in tags.items():
        client().set_tag(run_id, name, value)


def _held_out(attempt: Attempt) -> dict[str, Any]:
    """Where test and calibration rows are kept, once for all versions that share them."""
    blob = held_out(attempt.dataset)
    tags = {"source": str(attempt.dataset.facts.get("source"))}
    return {**asdict(blob), "address": shared(blob, "row", f"rows {blob.sha256[:12]}", tags)}


def _create_version(
    mlflow: MlflowClient, model: str, uri: str, run_id: str, tags: dict[str, str], reason: str
) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        mlflow.create_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    logged = uri.removeprefix("models:/")  # a server checks that the source is this one's
    return mlflow.create_model_version(
        model, uri, run_id=run_id, tags=tags, description=reason, model_id=logged
    )


def _known(mlflow: MlflowClient, model: str, key: str) -> ModelVersion | None:
    found = mlflow.search_model_versions(f"name = '{model}' and tags.key = '{key}'")
    return mlflow.get_model_version(model, found[0].version) if found else None


def _recipe_digest(recipe: Recipe) -> str:
    return hashlib.sha256(recipe.model_dump_json().encode()).hexdigest()


def _key(attempt: Attempt, gate: str) -> str:
    engine = attempt.engines["candidate"]
    parts = [
        attempt.recipe.model_dump_json(),
        engine.plan.blob.sha256,
        engine.weights.sha256 if engine.weights else "",
        gate,
        json.dumps(asdict(attempt.verdict)) if attempt.verdict else "",
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def version_of(found: ModelVersion, model: str) -> Version:
    """What travels of MLflow's entity."""
    assert found.run_id is not None
    alias = CHAMPION if CHAMPION in found.aliases else None
    place = str(manifest_file(found.run_id))
    return Version(model, str(found.version), found.run_id, found.tags["gate"], alias, place)


def noted(run_id: str) -> dict[str, Any]:
    """The manifest that a run logged, fetched once to this machine."""
    with _logged(f"run {run_id}", run_id):
        content: dict[str, Any] = json.loads(manifest_file(run_id).read_text())
    return content


def manifest_file(run_id: str) -> Path:
    """The run's manifest as a file of this machine, fetched once; one that was cut off is fetched again."""
    import mlflow

    place = store.home() / "manifests" / f"{run_id}.json"
    if not _is_json(place):
        _write(place, mlflow.artifacts.load_text(f"runs:/{run_id}/manifest.json"))
    return place


def _is_json(place: Path) -> bool:
    try:
        json.loads(place.read_text())
    except (FileNotFoundError, ValueError):
        return False
    return True


def _write(place: Path, text: str) -> None:
    """Replace the file whole: who reads meanwhile, or after a kill or on a full disk, sees no half of it."""
    place.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=place.parent) as scratch:
        beside = Path(scratch) / place.name
        with beside.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(place)
