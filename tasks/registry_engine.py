"""Engines in MLflow: versions from code, and plans that many versions share, kept once by content.

A version holds weights, preprocessor and a reference to its plan: a retrain of the same graph adds no plan.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tasks import store, types
from tasks.artifacts import Blob, Engine, Plan, Proved
from tasks.errors import InputError
from tasks.manifest import Attempt, versions

EXPERIMENT = "enginehouse"
SHARED = ("plan", "row")
"""Kinds of blobs that versions share, each in an experiment of its own: `enginehouse-plans`, `-rows`."""
SERVED = ("__init__.py", "artifacts.py", "errors.py", "predictor.py", "serving.py", "engines", "types")
SERVING_LIBRARIES = ("mlflow", "numpy", "onnx", "onnxruntime", "tokenizers", "pandas", "ml_dtypes")


def default_uri() -> str:
    """SQLite below the state folder."""
    return store.database()


def read_our_servers_artifacts() -> None:
    """Without a server, what one that `make up` started has stored is read from its folder."""
    from mlflow import get_tracking_uri
    from mlflow.store.artifact import artifact_repository_registry as known
    from mlflow.store.artifact.artifact_repo import ArtifactRepository
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
    from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository

    def repository(
        uri: str, tracking_uri: str | None = None, registry_uri: str | None = None
    ) -> ArtifactRepository:
        if (tracking_uri or get_tracking_uri()).startswith("http"):
            return MlflowArtifactsRepository(uri, tracking_uri, registry_uri)
        return LocalArtifactRepository(str(store.home() / "mlartifacts" / urlsplit(uri).path.strip("/")))

    known._artifact_repository_registry.register("mlflow-artifacts", repository)  # type: ignore[no-untyped-call]


@contextmanager
def run(name: str, status: str = "FINISHED", experiment: str = EXPERIMENT) -> Iterator[Any]:
    """An MLflow run of this name; it ends as FAILED when the block raises."""
    import mlflow

    mlflow.start_run(experiment_id=experiment_id(experiment), run_name=name)
    try:
        yield mlflow.active_run()
    except BaseException:
        mlflow.end_run("FAILED")
        raise
    mlflow.end_run(status)


def experiment_id(name: str) -> str:
    """The experiment of this name, made where it is not there."""
    import mlflow

    found = mlflow.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    local = mlflow.get_tracking_uri() == default_uri()
    place = (store.home() / "mlartifacts").as_uri() if local else None
    return str(mlflow.create_experiment(name, artifact_location=place))


def plan_address(engine: Engine) -> str | None:
    """Where MLflow keeps the engine's plan: logged once, whoever uses it; None where it holds the weights."""
    if engine.weights is None:
        return None
    plan = engine.plan
    tags = {"graph": plan.graph, "runtime": plan.runtime, "version": plan.version, "device": plan.device}
    return shared(plan.blob, "plan", f"plan {plan.graph[:12]}", tags)


def shared(blob: Blob, kind: str, name: str, tags: dict[str, str]) -> str:
    """The address of a blob that many versions refer to: logged once, found by its digest."""
    import mlflow

    experiment = f"{EXPERIMENT}-{kind}s"
    known = mlflow.search_runs(
        [experiment_id(experiment)],
        filter_string=f"tags.{kind} = '{blob.sha256}'",
        max_results=1,
        output_format="list",
    )
    if known:
        return f"runs:/{known[0].info.run_id}/{kind}"
    with run(name, experiment=experiment) as made:
        mlflow.log_artifacts(str(store.path(blob)), kind)
        mlflow.set_tags(tags)
        # The digest's tag comes last: what is found is whole.
        mlflow.set_tag(kind, blob.sha256)
    return f"runs:/{made.info.run_id}/{kind}"


def log_model(attempt: Attempt, scratch: Path, address: str | None) -> str:
    """The candidate as an MLflow model from code; returns its `models:/m-…` address."""
    import mlflow

    source = Path(__file__).resolve().parent
    code = scratch / "tasks"
    for name in SERVED:
        place = code / name
        if (source / name).is_dir():
            shutil.copytree(source / name, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            place.parent.mkdir(exist_ok=True)
            shutil.copy(source / name, place)
    pack(attempt.engines["candidate"], attempt.recipe.build.max_batch, scratch / "engine", address)
    installed = versions(SERVING_LIBRARIES)
    settings = types.settings(scratch / "engine" / "preprocessor")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        info = mlflow.pyfunc.log_model(
            name="engine",
            python_model=str(code / "serving.py"),
            artifacts={"engine": str(scratch / "engine")},
            code_paths=[str(code)],
            signature=signature(settings),
            input_example=example(settings),
            metadata={"preprocessing": settings},
            pip_requirements=[f"{name}=={number}" for name, number in installed.items()],
        )
    return str(info.model_uri)


def signature(settings: dict[str, Any]) -> Any:
    """What goes in (texts, images of one shape, or a table of both) and what comes out, by the task type."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec
    from mlflow.types.schema import Array

    task = types.load(settings["type"])
    known = {"doubles": Array(DataType.double)}
    pairs = task.COLUMN == "pair"
    outputs = Schema(
        [ColSpec(known.get(of) or DataType[of], name, not pairs) for name, of in task.ANSWER.items()]
    )
    value = task.example(settings)
    if pairs:  # a row has an image, a text, or both
        pixels = Array(Array(Array(DataType.double)))
        kinds: dict[str, Any] = {"image": pixels, "text": DataType.string}
        columns: list[Any] = [ColSpec(kind, name, required=False) for name, kind in kinds.items()]
        return ModelSignature(Schema(columns), outputs)
    if isinstance(value, str):
        return ModelSignature(Schema([ColSpec(DataType.string)]), outputs)
    return ModelSignature(Schema([TensorSpec(value.dtype, (-1, *np.shape(value)))]), outputs)


def example(settings: dict[str, Any]) -> Any:
    """One input as a user gives it."""
    import numpy as np

    value = types.load(settings["type"]).example(settings)
    if isinstance(value, dict):
        return [{"image": value["image"].tolist(), "text": value["text"]}]
    return [value] if isinstance(value, str) else np.stack([value])


def pack(engine: Engine, max_batch: int, folder: Path, address: str | None = None) -> None:
    """Lay plan (unless it lies at `address`), weights, preprocessor and `engine.json` out in one folder."""
    folder.mkdir(parents=True)
    parts = {"weights": engine.weights, "preprocessor": engine.preprocessor}
    if address is None:
        parts["plan"] = engine.plan.blob
    for name, blob in parts.items():
        if blob is not None:
            shutil.copytree(store.path(blob), folder / name)
    content = asdict(engine) | {"max_batch": max_batch, "plan_address": address}
    (folder / "engine.json").write_text(json.dumps(content))


def unpack(source: Path, folder: Path) -> Engine:
    """The engine in a downloaded model folder, brought into the store; raises InputError when altered."""
    return unpack_folder(source / "artifacts" / "engine", folder)


def unpack_folder(packed: Path, folder: Path) -> Engine:
    """The engine that `pack` laid out, brought into the store by way of the scratch `folder`."""
    content = json.loads((packed / "engine.json").read_text())
    engine = from_facts(content)
    blobs = {"plan": engine.plan.blob, "weights": engine.weights, "preprocessor": engine.preprocessor}
    for name, blob in blobs.items():
        if blob is None:
            continue
        if name == "plan" and content["plan_address"]:
            fetch(content["plan_address"], folder / "plan")
        else:
            shutil.copytree(packed / name, folder / name)
        if store.commit(folder / name).sha256 != blob.sha256:
            raise InputError(
                f"the champion's {name} in the registry is not what its digest says; roll back or rebuild"
            )
    return engine


def from_facts(content: dict[str, Any]) -> Engine:
    """An engine from `engine.json` or a manifest."""
    proved: Proved = content["proved"]
    return Engine(
        plan=Plan(**{**content["plan"], "blob": Blob(**content["plan"]["blob"])}),
        weights=Blob(**content["weights"]) if content["weights"] else None,
        preprocessor=Blob(**content["preprocessor"]),
        format=content["format"],
        proved=proved,
        facts=content["facts"],
    )


def fetch(uri: str, folder: Path) -> Path:
    """Everything at an MLflow address, copied into `folder`."""
    import mlflow

    with store.staging() as scratch:
        found = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(scratch)))
        shutil.copytree(found, folder)
    return folder
