"""One job at a time on a device: a lock file on this host, and Prefect's concurrency limit on its server."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

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
    with _locked(device, "works on it"), _limit(f"{device}-{platform.node()}"):
        yield


@contextmanager
def alone(name: str) -> Iterator[None]:
    """Hold this name on this host and on the server; says so when another process has it, and waits."""
    with _locked(name, "is at it"), _limit(name):
        yield


@contextmanager
def _locked(name: str, does: str) -> Iterator[None]:
    """Hold the lock file; `does` is what to say of the process that has it."""
    from tasks.stage import say  # a stage takes its slot from here

    lock = FileLock(store.prepare() / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"{name}: another process {does}; waiting for it to end (Ctrl-C to give up)")
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
