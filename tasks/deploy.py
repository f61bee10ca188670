"""The serving folder: versions side by side, and a link to the one that serves, replaced at once.

    ENGINEHOUSE_HOME/serving/MODEL/current -> versions/N     plan, weights, preprocessor, engine.json
    ENGINEHOUSE_HOME/serving/triton/MODEL                    the same as a Triton model repository

An engine is opened and proved before the switch, and asked again through `current` after it.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from recipes.schema import Deploy, Triton
from tasks import store, triton, types
from tasks.artifacts import Engine
from tasks.engines.common import RefitError
from tasks.errors import InputError
from tasks.predictor import Predictor, Runner
from tasks.registry_engine import pack
from tasks.running import opened

SMOKE, CONFIG = "smoke.json", "config.pbtxt"


class Unfit(Exception):
    """The version cannot serve here, and the fault is its own: says why."""


@dataclass(frozen=True)
class Switched:
    """A switch of `current` from version `before` to version `after`."""

    before: str | None
    after: str
    folder: str
    seconds: float


def root() -> Path:
    """The serving folder of this machine: ENGINEHOUSE_SERVING, else below the state folder."""
    return Path(os.environ.get("ENGINEHOUSE_SERVING") or store.home() / "serving").expanduser().absolute()


def place() -> str:
    """This machine's serving folder, told apart from every other's."""
    return f"{platform.node()}:{root()}"


def current(model: str) -> str | None:
    """The version that serves here, None before the first."""
    link = root() / model / "current"
    return os.readlink(link).rsplit("/", 1)[-1] if link.is_symlink() else None


def predict(model: str, values: Sequence[Any]) -> list[dict[str, Any]]:
    """What the deployed version answers; InputError when none is."""
    if current(model) is None:
        raise InputError(
            f"no version of {model} is deployed in {root()}; promote one, or set ENGINEHOUSE_SERVING"
        )
    return Predictor(root() / model / "current").predict(values)


def intact(model: str, version: str, digests: dict[str, str]) -> bool:
    """Whether this version lies in the serving folder, whole, with the digests of its registered engine."""
    folder = root() / model / "versions" / version
    if not folder.is_dir() or damage(folder, digests):
        return False
    return all(
        (repository / version).is_dir()
        for part, repository in triton.repositories(folder, root() / "triton" / model).items()
        if _config(folder, part)
    )


def _config(folder: Path, part: str) -> str:
    """What Triton is told of a served version's part; empty where it serves none."""
    file = folder / f"{part}{CONFIG}"
    return file.read_text() if file.is_file() else ""


def damage(folder: Path, digests: dict[str, str] | None = None) -> str | None:
    """The first part of a served version that is not what its digest says, or is not of these `digests`."""
    try:
        about = json.loads((folder / "engine.json").read_text())
        blobs = {
            "plan": about["plan"]["blob"],
            "weights": about["weights"],
            "preprocessor": about["preprocessor"],
        }
        (folder / SMOKE).stat()
    except (OSError, ValueError, KeyError) as error:
        return f"{folder} is not whole: {error}"
    for name, blob in blobs.items():
        if blob and digests and digests.get(name) != blob["sha256"]:  # another registry had this number
            return f"{folder / name} is of another engine than the one that is registered"
        if blob and store.digest(folder / name) != blob["sha256"]:
            return f"{folder / name} is not what its digest says"
    return None


def prepare(
    model: str, version: str, engine: Engine, max_batch: int, section: Deploy, threads: int | None
) -> None:
    """Lay the version out beside the one that serves, and prove it; raises Unfit, and changes nothing."""
    with _alone(model) as folder:
        if intact(model, version, engine.digests):
            return
        fresh = folder / "versions" / f".{version}-{os.getpid()}"
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            pack(engine, max_batch, fresh)
            with _at_fault():
                _prove(engine, fresh)
                if section.triton:
                    _for_triton(fresh, model, version, section.triton, threads)
            shutil.rmtree(folder / "versions" / version, ignore_errors=True)
            store.rename(fresh, folder / "versions" / version)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def switch(model: str, version: str, section: Deploy) -> Switched:
    """Let a prepared version serve, and ask it; raises Unfit after putting the one before back."""
    started = time.perf_counter()
    with _alone(model) as folder:
        before = current(model)
        _link(model, version)
        try:
            with _at_fault():
                smoke(model)
        except Unfit:
            _link(model, before)
            raise
        os.utime(folder / "versions" / version)
        _prune(model, section.keep)
    return Switched(before, version, str(folder / "versions" / version), time.perf_counter() - started)


def smoke(model: str) -> None:
    """Ask the deployed version what it was asked when it was prepared; raises Unfit for another answer."""
    folder = root() / model / "current"
    if problem := damage(folder):
        raise Unfit(problem)
    predictor = Predictor(folder)
    wanted = np.asarray(json.loads((folder / SMOKE).read_text()))
    found = predictor.output(predictor.kind.smoke(predictor.preprocessor))
    if not triton.close(wanted, found):
        raise Unfit(f"a smoke request through {folder} was answered {found.tolist()}, not {wanted.tolist()}")


def ask(engine: Engine) -> np.ndarray:
    """What an engine in the store answers to the smoke values."""
    preprocessor = store.path(engine.preprocessor)
    kind = types.load(types.settings(preprocessor)["type"])
    examples = kind.encode(preprocessor, kind.smoke(preprocessor))
    with opened(engine) as session:
        return Runner(session, kind)(examples)


def _prove(engine: Engine, folder: Path) -> None:
    """The engine as it lies in `folder` answers like the version's own, and only finite numbers."""
    predictor = Predictor(folder)
    found, wanted = predictor.output(predictor.kind.smoke(predictor.preprocessor)), ask(engine)
    if not np.isfinite(found).all():
        raise Unfit(f"a smoke request was answered {found.tolist()}")
    if not triton.close(wanted, found):
        raise Unfit(f"a smoke request was answered {found.tolist()}, by the version itself {wanted.tolist()}")
    (folder / SMOKE).write_text(json.dumps(found.astype(np.float64).tolist()))


def _for_triton(folder: Path, model: str, version: str, section: Triton, threads: int | None) -> None:
    """The version in Triton's repository, a model for each of its graphs, not yet switched to."""
    for part, repository in triton.repositories(folder, root() / "triton" / model).items():
        text = triton.write(folder, version, repository, section, threads, part)
        (folder / f"{part}{CONFIG}").write_text(text)


def _link(model: str, version: str | None) -> None:
    """Replace `current`, then Triton's config (of each part), each by one rename."""
    folder, place = root() / model, root() / "triton" / model
    if version is None:
        (folder / "current").unlink(missing_ok=True)
        for repository in triton.known(place):
            shutil.rmtree(repository, ignore_errors=True)
        return
    fresh = folder / f".current-{os.getpid()}"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(Path("versions") / version)
    fresh.replace(folder / "current")
    served = folder / "versions" / version
    models = triton.repositories(served, place)
    told = {repository: text for part, repository in models.items() if (text := _config(served, part))}
    for repository, text in told.items():
        (repository / f".{CONFIG}").write_text(text)
        (repository / f".{CONFIG}").replace(repository / CONFIG)
    for repository in triton.known(place):
        if repository not in told:  # what it holds is not what serves
            shutil.rmtree(repository, ignore_errors=True)


def _prune(model: str, keep: int) -> None:
    """Remove all but the `keep` versions that served last."""
    versions = [p for p in (root() / model / "versions").iterdir() if not p.name.startswith(".")]
    now = current(model)
    versions.sort(key=lambda folder: (folder.name == now, folder.stat().st_mtime), reverse=True)
    for folder in versions[keep:]:
        shutil.rmtree(folder)
        for repository in triton.known(root() / "triton" / model):
            shutil.rmtree(repository / folder.name, ignore_errors=True)
            for file in repository.glob(f"warmup/{folder.name}-*"):
                file.unlink()


@contextmanager
def _alone(model: str) -> Iterator[Path]:
    """The model's serving folder, held by one process."""
    folder = root() / model
    with store.explained(folder):
        (folder / "versions").mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            yield folder


@contextmanager
def _at_fault() -> Iterator[None]:
    """What goes wrong while an engine is opened and asked is the version's fault, unless the disk is why."""
    try:
        yield
    except (InputError, RefitError) as error:
        if store.at_fault(error):
            raise
        raise Unfit(str(error)) from error
