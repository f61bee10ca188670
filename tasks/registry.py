"""The registry: runs, versions, aliases, champions. With registry_engine all that talks to MLflow.

python -m flows optimize RECIPE     (stages `find champion`, `register` and `promote`)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from prefect import task

from recipes.schema import Recipe
from tasks import store
from tasks.artifacts import Engine, Version
from tasks.errors import InputError
from tasks.manifest import Attempt, manifest, metrics
from tasks.measurements import measurements_from_json
from tasks.previous import held_out
from tasks.registry_engine import default_uri, fetch, log_model, pack, plan_address, run, shared, unpack
from tasks.report import report
from tasks.running import labels
from tasks.stage import NETWORK

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"


def client() -> MlflowClient:
    """MLflow's client, on MLFLOW_TRACKING_URI or else on SQLite below the state folder."""
    import mlflow

    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        store.prepare()
        uri = default_uri()
    mlflow.set_tracking_uri(uri)
    return mlflow.MlflowClient()


@dataclass(frozen=True)
class Champion:
    """The version that carries the alias, its engine, and the digest of the recipe that made it."""

    version: Version
    engine: Engine
    recipe: str


@task(name="find champion", persist_result=False, **NETWORK)
def champion(model: str) -> Champion | None:
    """The champion, its files checked against their digests; None without one."""
    mlflow = client()
    version = _aliased(mlflow, model, CHAMPION)
    if version is None:
        return None
    with store.staging() as folder:
        source = fetch(f"models:/{model}/{version.version}", folder / "download")
        return Champion(
            version_of(version, model), unpack(source, folder), version.tags.get("recipe_sha256", "")
        )


def made_by(champion: Champion, recipe: Recipe, engine: Engine) -> bool:
    """Whether the champion is this engine, from this very recipe, and passed its gate."""
    passed = champion.version.gate == "passed"
    return passed and same_engine(champion.engine, engine) and champion.recipe == _recipe_digest(recipe)


def same_engine(one: Engine, other: Engine) -> bool:
    """Whether plan and weights are the same, byte for byte."""
    return (one.plan.blob, one.weights) == (other.plan.blob, other.weights)


def unmeasurable(champion: Champion, candidate: Engine) -> str | None:
    """Why the champion cannot be measured beside the candidate here; None when it can."""
    here, there = candidate.plan, champion.engine.plan
    name = f"version {champion.version.version}"
    if champion.version.gate != "passed":
        return f"{name} carries the alias with gate={champion.version.gate}; remove the alias"
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
    found = _aliased(client(), model, CHAMPION)
    return version_of(found, model) if found else None


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
        _log(attempt, content, Path(scratch))
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


@task(name="promote", persist_result=False, **NETWORK)
def promote(version: Version, judged_against: str | None) -> Version:
    """Give the version the champion alias; it must have passed the gate, against today's champion."""
    assert version.gate == "passed", f"version {version.version} has gate={version.gate}"
    mlflow = client()
    holder = _aliased(mlflow, version.model, CHAMPION)
    now = str(holder.version) if holder else None
    if now not in (judged_against, version.version):
        raise InputError(
            f"{version.model} version {version.version} passed against champion {judged_against}, and "
            f"version {now} took the alias meanwhile; run again to be judged against it"
        )
    mlflow.set_registered_model_alias(version.model, CHAMPION, version.version)
    return version_of(mlflow.get_model_version(version.model, version.version), version.model)


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
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as scratch:
        try:
            client()
            numbers = json.loads(manifest_file(run_id).read_text())["metrics"]
            gate = Path(
                mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path="gate", dst_path=scratch)
            )
            recipe = mlflow.artifacts.load_text(f"runs:/{run_id}/recipe.yaml")
            found = {name: (gate / f"{name}.json").read_bytes() for name in ("measurements", "verdict")}
        except (MlflowException, OSError) as error:
            raise InputError(f"run {run_id}: no verdict was logged here ({error})") from error
    return Judged(yaml.safe_load(recipe), found["measurements"], found["verdict"], numbers)


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


def record_failure(recipe: dict[str, Any], error: BaseException) -> str:
    """Log a run that ended in an error; nothing is registered. Returns the run's id."""
    import mlflow

    client()
    with run(str(recipe.get("name")), status="FAILED") as made:
        mlflow.log_text(yaml.safe_dump(recipe, sort_keys=False), "recipe.yaml")
        mlflow.log_text(f"{type(error).__name__}: {error}\n", "error.txt")
        mlflow.set_tags({"recipe": recipe.get("name"), "error": str(error)[:4000]})
    return str(made.info.run_id)


def _log(attempt: Attempt, content: dict[str, Any], scratch: Path) -> None:
    import mlflow

    mlflow.log_params(_flat(attempt.recipe.model_dump(mode="json")))
    mlflow.log_metrics(_flat(metrics(attempt)))
    mlflow.log_metrics(
        {f"seconds_{t.stage.replace(' ', '_')}_{k}": t.seconds for k, t in enumerate(attempt.timeline)}
    )
    for name, checkpoint in attempt.checkpoints.items():
        for point in checkpoint.facts.get("curve", []):
            mlflow.log_metric(f"{name}_loss", point["loss"], step=int(point["step"]))
    mlflow.log_text(yaml.safe_dump(attempt.recipe.model_dump(mode="json"), sort_keys=False), "recipe.yaml")
    mlflow.log_dict(content, "manifest.json")
    if attempt.measurements and attempt.measurements.blob:
        mlflow.log_artifacts(str(store.path(attempt.measurements.blob)), "gate")
        _report(attempt, store.path(attempt.measurements.blob), scratch / "report")
        mlflow.log_artifacts(str(scratch / "report"), "gate")
    mlflow.log_artifacts(str(store.path(attempt.checkpoints["candidate"].blob)), "checkpoint")
    if attempt.retrained:  # the rest lies with the version that it came from, or can be made again
        return
    for name, model in attempt.onnx.items():
        mlflow.log_artifacts(str(store.path(model.blob)), f"onnx/{name}")
    for name, engine in attempt.engines.items():
        if name != "candidate":
            pack(engine, attempt.recipe.build.max_batch, scratch / name)
            mlflow.log_artifacts(str(scratch / name), f"engines/{name}")


def _held_out(attempt: Attempt) -> dict[str, Any]:
    """Where test and calibration rows are kept, once for all versions that share them."""
    blob = held_out(attempt.dataset)
    tags = {"source": str(attempt.dataset.facts.get("source"))}
    return {**asdict(blob), "address": shared(blob, "row", f"rows {blob.sha256[:12]}", tags)}


def _report(attempt: Attempt, judged: Path, folder: Path) -> None:
    assert attempt.verdict is not None
    folder.mkdir()
    found = measurements_from_json((judged / "measurements.json").read_bytes())
    report(attempt.verdict, found, attempt.recipe.gate, folder, attempt.recipe.name)


def _create_version(
    mlflow: MlflowClient, model: str, uri: str, run_id: str, tags: dict[str, str], reason: str
) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        mlflow.create_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # A tracking server wants the id beside the address that holds it.
    return mlflow.create_model_version(
        model, uri, run_id=run_id, tags=tags, description=reason, model_id=uri.removeprefix("models:/")
    )


def _aliased(mlflow: MlflowClient, model: str, alias: str) -> ModelVersion | None:
    from mlflow.exceptions import MlflowException

    try:
        return mlflow.get_model_version_by_alias(model, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


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


def manifest_of(run_id: str) -> dict[str, Any]:
    """What a run wrote down of everything that it made."""
    content: dict[str, Any] = json.loads(manifest_file(run_id).read_text())
    return content


def manifest_file(run_id: str) -> Path:
    """The run's manifest as a file of this machine, fetched once."""
    import mlflow

    place = store.home() / "manifests" / f"{run_id}.json"
    if not place.exists():
        place.parent.mkdir(exist_ok=True)
        place.write_text(mlflow.artifacts.load_text(f"runs:/{run_id}/manifest.json"))
    return place


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            flat[re.sub(r"[^\w./ -]", "_", f"{prefix}{name}")] = value
    return flat
