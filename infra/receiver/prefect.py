"""Create flow runs; a delivery that comes twice makes one run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import PrefectClient

PATIENCE = 10  # seconds; MLflow waits 30 for an answer
PAUSES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)  # seconds between tries while Prefect's database is busy


class Away(Exception):
    """Prefect does not answer, or does not know the deployment yet: worth another try."""


class Line:
    """An open line to Prefect, and what was asked of it before: a request costs one call, not five."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: PrefectClient | None = None
        self._deployments: dict[str, UUID] = {}

    async def client(self) -> PrefectClient:
        """The client of this event loop, opened once."""
        if self._client is None or self._loop is not asyncio.get_running_loop():
            from prefect import get_client

            self._client, self._loop = await get_client().__aenter__(), asyncio.get_running_loop()
            self._deployments.clear()
        return self._client

    async def deployment(self, name: str) -> UUID:
        """A deployment's id; deploying it again keeps the id."""
        if name not in self._deployments:
            self._deployments[name] = (await (await self.client()).read_deployment_by_name(name)).id
        return self._deployments[name]

    def forget(self) -> None:
        """Ask again from the start, next time."""
        self._client = None


_line = Line()


async def warm() -> None:
    """Load Prefect's client before the first request needs it; that takes seconds."""
    await asyncio.to_thread(__import__, "prefect.client.orchestration")


async def start(deployment: str, parameters: dict[str, Any], key: str, tags: Sequence[str] = ()) -> str:
    """Create a run of `flow/deployment`, or find the one of the same `key`; returns its id."""
    from httpx import HTTPError, HTTPStatusError, ReadError, RemoteProtocolError
    from prefect.exceptions import ObjectNotFound

    try:
        async with asyncio.timeout(PATIENCE):
            for pause in (*PAUSES, None):
                try:
                    return await _create(deployment, parameters, key, tags)
                except (HTTPStatusError, ReadError, RemoteProtocolError) as error:
                    if pause is None or not _passing(error):
                        raise
                    await asyncio.sleep(pause)
    except ObjectNotFound as error:
        _line.forget()
        raise Away(f"Prefect does not know the deployment {deployment}: make up applies it") from error
    except (HTTPError, OSError, RuntimeError) as error:  # Prefect's client raises RuntimeError, unconnected
        _line.forget()
        answer = getattr(error, "response", None)
        what = f"HTTP {answer.status_code}" if answer is not None else type(error).__name__
        raise Away(f"Prefect does not answer ({what})") from error
    raise AssertionError("the last try returns or raises")


def _passing(error: Exception) -> bool:
    """A line that Prefect had closed, and what it says on SQLite when two write at once: 503."""
    answer = getattr(error, "response", None)
    return answer is None or answer.status_code == 503


async def _create(deployment: str, parameters: dict[str, Any], key: str, tags: Sequence[str]) -> str:
    client, number = await _line.client(), await _line.deployment(deployment)
    run = await client.create_flow_run_from_deployment(
        number, parameters=parameters, idempotency_key=key, tags=list(tags)
    )
    return str(run.id)
