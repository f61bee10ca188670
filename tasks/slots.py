"""One job at a time, on a device or for a result: a lock file on this host, which ends with its process.

Devices also have Prefect's concurrency limit on its server.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

from filelock import FileLock, Timeout

from tasks import store
from tasks.engines import tensorrt_api


@contextmanager
def gpus(count: int) -> Iterator[None]:
    """Hold the first `count` GPUs that this process sees, where there is one."""
    with ExitStack() as held:
        for name in _visible(count) if count and tensorrt_api.gpu() else ():
            held.enter_context(slot(f"gpu-{name}"))
        yield


def _visible(count: int) -> list[str]:
    """Sorted: of two processes that want several, one has to have none while it waits for the first."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = [name.strip() for name in named.split(",")] if named else [str(k) for k in range(count)]
    return sorted(seen[:count])


@contextmanager
def slot(device: str) -> Iterator[None]:
    """Wait for the device and hold it. `prefect gcl create DEVICE-HOST --limit 1` adds the second guard."""
    busy = f"{device}: another process works on it"
    with _locked(_file(device), busy), _limit(f"{device}-{platform.node()}"):
        yield


@contextmanager
def alone(name: str) -> Iterator[None]:
    """Hold this name on this host and on the server; says so when another process has it, and waits."""
    with _locked(_file(name), f"{name}: another process is at it"), _limit(name):
        yield


@contextmanager
def making(what: str, key: str) -> Iterator[None]:
    """Hold the key of a result: of two processes that want the same at once one makes it, the other waits."""
    folder = store.home() / "making"
    with store.explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    file = folder / key
    with _locked(file, f"{what}: another process makes this very result"):
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def _file(name: str) -> Path:
    return store.prepare() / f"{name}.lock"


@contextmanager
def _locked(file: Path, held: str) -> Iterator[None]:
    """Hold the lock file; `held` is what to say where another process has it."""
    from tasks.stage import say  # a stage takes its slot from here

    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"{held}; waiting for it to end (Ctrl-C to give up)")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _limit(name: str) -> AbstractContextManager[None]:
    """Prefect's limit of this name, where a server keeps one."""
    from prefect.concurrency.sync import concurrency
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        return nullcontext()
    # Losing touch with the server must not end a running build; the lock file still holds.
    return concurrency(name, strict=False, raise_on_lease_renewal_failure=False)
