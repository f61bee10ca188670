"""What makes a plain function a stage of the pipeline: a Prefect task whose result is kept by content.

The key of a result is the digest of the arguments (artifacts count by their content, sections by their
values), of the source the function runs (its module and the `tasks` modules that one imports), and of the
versions of the libraries it uses. A stage whose kept artifact is bad or gone runs again.
"""

from __future__ import annotations

import ast
import atexit
import functools
import gc
import hashlib
import importlib.metadata
import inspect
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

import prefect
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.results import get_result_store

from tasks import slots, store
from tasks.artifacts import Blob, Checkpoint, Engine
from tasks.errors import InputError

P = ParamSpec("P")
T = TypeVar("T")
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Timing:
    """One stage of this run: its name, its seconds without waits for others, whether a kept result served."""

    stage: str
    seconds: float
    reused: bool


timeline: list[Timing] = []
"""The stages of this process's current run, in order; the flow clears it at its start."""


Listener = Callable[[str, str, int, dict[str, float]], None]
listeners: list[Listener] = []
"""Who is told of a training's losses while it runs; the flow says who."""


def tell(key: str, what: str, step: int, losses: dict[str, float]) -> None:
    """Hand the losses after a step to who listens; without any the training has ended.

    `key` is the stage's, `what` a few words on what is trained.
    """
    for listener in tuple(listeners):
        listener(key, what, step, losses)


class Stage(Generic[P, T]):
    """A Prefect task that verifies what its cache returns; `fn` is the plain function."""

    def __init__(
        self,
        fn: Callable[P, T],
        uses: tuple[str, ...],
        gpu: bool | Callable[..., int],
        options: dict[str, Any],
    ) -> None:
        self.fn, self.uses, self.gpu = fn, uses, gpu
        policy = CacheKeyFnPolicy(cache_key_fn=lambda _context, inputs: cache_key(fn, uses, inputs))
        decorate = prefect.task(cache_policy=policy, persist_result=True, result_serializer="json", **options)
        self.task: Any = decorate(fn)
        functools.update_wrapper(self, fn)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run as a task, or take the kept result, which needs no GPU; the time goes to `timeline`.

        What another process makes right now is waited for, not made again.
        """
        say(f"{self.task.name} …")
        gpus = self.gpu(*args, **kwargs) if callable(self.gpu) else int(self.gpu)
        key = self.key(*args, **kwargs)
        with slots.making(self.task.name, key):
            kept = gpus > 0 and self._kept(key)
            value, timing = self._run(self.task, 0 if kept else gpus, *args, **kwargs)
            if timing.reused and not all(store.intact(blob) for blob in _blobs(value)):
                say(f"{self.task.name}: the kept artifact is bad or gone, running again")
                value, timing = self._run(self.task.with_options(refresh_cache=True), gpus, *args, **kwargs)
        timeline.append(timing)
        say(f"{timing.stage}: {'reused' if timing.reused else f'{timing.seconds:.1f} s'}")
        return value

    def _kept(self, key: str) -> bool:
        results: Any = get_result_store()
        return bool(results.update_for_task(self.task, _sync=True).exists(key))

    def _run(self, task: Any, gpus: int, *args: P.args, **kwargs: P.kwargs) -> tuple[T, Timing]:
        """The task's value; timeout, seconds and the look for a kept result begin once it has its GPUs.

        Memory is given back before they are.
        """
        with slots.gpus(gpus):
            started = time.perf_counter()
            state = task(*args, return_state=True, **kwargs)
            value: T = state.result()
            reused = state.name == "Cached"
            if not reused:
                _free()
            return value, Timing(self.task.name, time.perf_counter() - started, reused)

    def key(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """The digest that stands for this call."""
        bound = inspect.signature(self.fn).bind(*args, **kwargs)
        bound.apply_defaults()
        return cache_key(self.fn, self.uses, dict(bound.arguments))


def stage(
    *, uses: tuple[str, ...] = (), gpu: bool | Callable[..., int] = False, **options: Any
) -> Callable[[Callable[P, T]], Stage[P, T]]:
    """Decorate a plain function as a stage.

    `uses` names the distributions whose versions matter; with `gpu` it runs alone on the host's GPU, or on as
    many as `gpu` says of the call; `options` are Prefect's.
    """
    return lambda fn: Stage(fn, uses, gpu, options)


def passing(_task: Any, _run: Any, state: Any) -> bool:
    """Whether a failure may pass by itself: a lost connection, a slow service, a locked database."""
    error = state.result(raise_on_failure=False)
    if isinstance(error, InputError):
        return False
    names: set[str] = set()
    while error is not None:  # MLflow tells of a lost connection by an error of its own
        names |= {kind.__name__ for kind in type(error).__mro__}
        error = error.__cause__ or error.__context__
    return bool(
        names & {"ConnectionError", "TimeoutError", "OperationalError", "RestException", "HfHubHTTPError"}
    )


NETWORK: dict[str, Any] = {"retries": 2, "retry_delay_seconds": 5, "retry_condition_fn": passing}
"""Options of a stage that talks to a service."""


def say(line: str) -> None:
    """One line of progress, on stderr."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201


def cache_key(fn: Callable[..., Any], uses: tuple[str, ...], inputs: dict[str, Any]) -> str:
    """Digest of a call: which function, on what, with which code and libraries."""
    facts = {
        "function": f"{fn.__module__}.{fn.__qualname__}",
        "inputs": {name: _identity(value) for name, value in sorted(inputs.items())},
        "source": source_digest(Path(inspect.getfile(fn))),
        "versions": {name: _version(name) for name in uses},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@functools.cache
def source_digest(file: Path) -> str:
    """Digest of a module's source and of every `tasks` and `recipes` module it imports, however deep."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(sources(file)))).hexdigest()


@functools.cache
def sources(file: Path) -> frozenset[Path]:
    """The module's file and those of every `tasks` and `recipes` module it imports, however deep."""
    machinery = Path(__file__).resolve()  # how a stage is kept says nothing of what it computes
    seen: set[Path] = {machinery}
    waiting = [file.resolve()]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting += _imports(current)
    return frozenset(seen - {machinery})


def _imports(file: Path) -> list[Path]:
    names: list[str] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            # A module of a package is itself; what the package has of its own may choose any of them.
            names += [name if _files(name) else node.module for name in inner]
    return [found for name in names if name.split(".")[0] in ("tasks", "recipes") for found in _files(name)]


def _files(name: str) -> list[Path]:
    """A module's file; all files of a package, whose modules are chosen at run time."""
    place = _ROOT / name.replace(".", "/")
    if place.with_suffix(".py").is_file():
        return [place.with_suffix(".py")]
    return sorted(place.rglob("*.py")) if place.is_dir() and "." in name else []


def _identity(value: Any) -> Any:
    """JSON that is equal when the value's content is: an artifact's digest, a section's values."""
    if isinstance(value, Checkpoint):
        return value.identity
    if isinstance(value, Engine):  # without the seconds that its build took
        parts = (value.plan.blob, value.weights, value.preprocessor, value.format, value.proved)
        return [_identity(part) for part in parts] + [value.facts.get("proof")]
    if isinstance(value, Blob):
        return value.sha256
    if is_dataclass(value) and not isinstance(value, type):
        # An artifact's facts say how it came about; what is in it is its blob and its other fields.
        told = {"facts"} if hasattr(value, "blob") else set()
        names = value.__dataclass_fields__.keys() - told
        return {name: _identity(getattr(value, name)) for name in names}
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {str(key): _identity(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_identity(item) for item in value]
    return value


def _free() -> None:
    """Networks hang in cycles, and the next stage needs their memory; what is left then is libraries.

    PyTorch gives back what it keeps of the GPU, which other processes need, too. Frozen, the million objects
    of libraries are not looked through again after every stage, half a second each time.
    """
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    gc.freeze()


atexit.register(gc.unfreeze)  # else nanobind takes for leaks what Python's end did not collect


def _blobs(value: Any) -> list[Blob]:
    if isinstance(value, Blob):
        return [value]
    if is_dataclass(value) and not isinstance(value, type):
        return [blob for name in value.__dataclass_fields__ for blob in _blobs(getattr(value, name))]
    if isinstance(value, (list, tuple)):
        return [blob for item in value for blob in _blobs(item)]
    return []


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
