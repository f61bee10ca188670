"""Lineage: what a registered version was made of, brought into this machine's store from the registry.

Everything is checked against the digests in the version's manifest; what the store has is not fetched.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import recipes
from recipes import Recipe
from tasks import load, registry, registry_engine, store
from tasks.artifacts import Blob, Checkpoint, Dataset, Engine, OnnxModel, Version
from tasks.errors import InputError

KEYS = {"type": "task", **{name: f"data.image.{name}" for name in ("shape", "scale", "mean", "std")}}
"""Where the recipe says what `settings.json` says under these names; the others are of `data`."""


@dataclass(frozen=True)
class Latest:
    """The newest version, whatever its gate said, and the digests of what it was made from."""

    version: Version
    recipe: str
    data: str
    checkpoint: str
    metric: str
    network: str


def latest(model: str) -> Latest | None:
    """What the last attempt at this model was made from; None for a model that is not registered."""
    mlflow = registry.client()
    found = mlflow.search_model_versions(f"name = '{model}'")
    if not found:
        return None
    newest = mlflow.get_model_version(model, str(max(int(item.version) for item in found)))
    tags = newest.tags
    names = ("recipe", "data", "checkpoint", "metric", "network")
    return Latest(
        registry.version_of(newest, model), **{name: tags.get(f"{name}_content", "") for name in names}
    )


def manifest(version: Version) -> dict[str, Any]:
    """What the version's run wrote down."""
    content: dict[str, Any] = json.loads(Path(version.manifest).read_text())
    return content


def recipe(version: Version) -> dict[str, Any]:
    """The recipe of the version as it was logged, unchecked."""
    content: dict[str, Any] = manifest(version)["recipe"]
    return content


def parsed(version: Version) -> Recipe:
    """The recipe of the version."""
    return recipes.parse(recipe(version), (), f"the recipe of {version.model} version {version.version}")


def found(version: Version) -> dict[str, str]:
    """What data, starting weights and a metric function of the user's own were, as digests."""
    digests: dict[str, str] = manifest(version).get("found", {})
    return digests


def check_inputs(version: Version, recipe: Recipe, given: bool) -> None:
    """Raise InputError where the recipe has other labels, or reads a value otherwise, than the version.

    Its network goes on with the preprocessor that it has; weights that are `given` bring their own, and are
    compared with the version's baseline, so that task, labels and shape are the version's even then.
    """
    before = parsed(version)
    old, new = (load.settings(of.data, of.task) for of in (before, recipe))
    for name in ("type", "labels", "shape") if given else sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            raise InputError(
                f"{KEYS.get(name, f'data.{name}')}: {version.model} version {version.version} was made with "
                f"{old.get(name)}, the recipe says {new.get(name)}; retrain goes on from that version: leave "
                "it as it was, or start anew with python -m flows optimize RECIPE"
            )


def checkpoint(version: Version) -> Checkpoint:
    """The trained, pruned and quantized network that the version's engine was made of."""
    facts = manifest(version)["checkpoints"]["candidate"]
    blob = _bring(Blob(**facts["blob"]), f"runs:/{version.run_id}/checkpoint", version)
    return Checkpoint(blob, facts["type"], facts["identity"], facts["facts"])


def teacher(version: Version) -> Checkpoint:
    """The FP32 baseline that the first ancestor's candidate learned from, or was made of.

    Raises InputError where neither its run nor this machine's store keeps it.
    """
    run = teacher_run(version)
    facts = registry.noted(run)["checkpoints"].get("baseline")
    blob = Blob(**facts["blob"]) if facts else None
    if blob is None or not (store.intact(blob) or registry.client().list_artifacts(run, "teacher")):
        raise InputError(
            f"{version.model} version {version.version} has no teacher to distill from: its recipe said "
            f"distill neither in qat nor in retrain, so run {run} kept none. Run a recipe that does "
            "(python -m flows optimize), or retrain without distill"
        )
    blob = _bring(blob, f"runs:/{run}/teacher", version)
    return Checkpoint(blob, facts["type"], facts["identity"], facts["facts"])


def teacher_run(version: Version) -> str:
    """The run that keeps the teacher: a version that made no baseline of its own refers to an ancestor's."""
    return str(manifest(version).get("teacher_run") or baseline_run(version))


def held_out(version: Version) -> Dataset | None:
    """The version's test and calibration rows; None where none were kept."""
    content = manifest(version)
    kept = content.get("held_out")
    if kept is None:
        return None
    blob = _bring(Blob(kept["sha256"], kept["bytes"]), kept["address"], version)
    data = content["data"]
    rows = {part: data["rows"][part] for part in ("test", "calibration")}
    return Dataset(blob, data["type"], tuple(data["labels"]), rows, data["facts"])


def baseline(version: Version) -> tuple[OnnxModel, Engine]:
    """The uncompressed network that the version was compared with, its ONNX and its engine."""
    content = manifest(version)
    retrained = content.get("retrained") or {}
    run = retrained.get("baseline_run", version.run_id)
    source = registry.noted(run) if run != version.run_id else content
    facts = source["onnx"]["baseline"]
    blob = _bring(Blob(**facts["blob"]), f"runs:/{run}/onnx/baseline", version)
    model = OnnxModel(blob, facts["format"], facts["facts"])
    engine = registry_engine.from_facts(source["engines"]["baseline"])
    blobs = (engine.plan.blob, engine.weights, engine.preprocessor)
    if not all(blob is None or store.intact(blob) for blob in blobs):
        with store.staging() as folder:
            packed = registry_engine.fetch(f"runs:/{run}/engines/baseline", folder / "download")
            engine = registry_engine.unpack_folder(packed, folder)
    return model, engine


def baseline_run(version: Version) -> str:
    """The run that holds the baseline: a retrain refers to its first ancestor's."""
    return str((manifest(version).get("retrained") or {}).get("baseline_run", version.run_id))


def build_seconds(version: Version) -> float | None:
    """What building the version's plan took, whichever ancestor built it."""
    seconds: float | None = (manifest(version).get("retrained") or {}).get("seconds", {}).get("build")
    return seconds


def _bring(blob: Blob, address: str, version: Version) -> Blob:
    """The blob, fetched from the registry unless the store has it; raises InputError when it was altered."""
    if store.intact(blob):
        return blob
    with store.staging() as folder:
        found = store.commit(registry_engine.fetch(address, folder / "fetched"))
    if found.sha256 != blob.sha256:
        raise InputError(
            f"{address} of {version.model} version {version.version} is not what its digest says "
            f"({found.sha256[:12]}, not {blob.sha256[:12]}); take another version"
        )
    return blob
