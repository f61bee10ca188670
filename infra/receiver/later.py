"""Answer now, work later: what Prefect does not take at once is kept on disk and handed over in time."""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from infra.receiver import prefect
from tasks import store

SOON = 0.07  # seconds that a caller waits for Prefect
PAUSES = (1, 2, 5, 10, 30)  # seconds between tries, the last one again and again

_working: set[asyncio.Task[Any]] = set()


@dataclass(frozen=True)
class Call:
    """One flow run to create."""

    deployment: str
    parameters: dict[str, Any]
    key: str
    tags: tuple[str, ...]


async def start(call: Call) -> str | None:
    """The run's id; None where it is kept and follows. Raises `Away` when Prefect says so at once."""
    task = _work(prefect.start(call.deployment, call.parameters, call.key, call.tags))
    done, _ = await asyncio.wait({task}, timeout=SOON)
    if done:
        return str(task.result())
    _work(_follow(_keep(call), call, task))
    return None


async def resume() -> None:
    """Go on with what an earlier process kept."""
    for file in sorted(folder().glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        _work(_follow(file, Call(**content | {"tags": tuple(content["tags"])})))


def folder() -> Path:
    """Where calls wait."""
    place = store.home() / "services" / "inbox"
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    return place


def _keep(call: Call) -> Path:
    """On the disk, whole, before the caller hears of it."""
    file = folder() / f"{uuid.uuid4().hex}.json"
    with file.with_suffix(".part").open("w", encoding="utf-8") as part:
        json.dump(asdict(call), part)
        part.flush()
        os.fsync(part.fileno())
    file.with_suffix(".part").rename(file)
    return file


async def _follow(file: Path, call: Call, first: asyncio.Task[str] | None = None) -> None:
    """Try until Prefect has it."""
    for k in range(1_000_000):
        try:
            await (first or prefect.start(call.deployment, call.parameters, call.key, call.tags))
        except prefect.Away:
            first = None
            await asyncio.sleep(PAUSES[min(k, len(PAUSES) - 1)])
        else:
            file.unlink(missing_ok=True)
            return


def _work(work: Any) -> asyncio.Task[Any]:
    """A task that the garbage collector leaves alone."""
    task = asyncio.create_task(work)
    _working.add(task)
    task.add_done_callback(_working.discard)
    return task
