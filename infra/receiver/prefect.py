"""Create flow runs; a delivery that comes twice makes one run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

PATIENCE = 10  # seconds; MLflow waits 30 for an answer


class Away(Exception):
    """Prefect does not answer, or does not know the deployment yet: worth another try."""


async def start(deployment: str, parameters: dict[str, Any], key: str, tags: Sequence[str] = ()) -> str:
    """Create a run of `flow/deployment`, or find the one of the same `key`; returns its id."""
    from httpx import HTTPError
    from prefect import get_client
    from prefect.exceptions import ObjectNotFound

    try:
        async with asyncio.timeout(PATIENCE), get_client() as client:
            found = await client.read_deployment_by_name(deployment)
            run = await client.create_flow_run_from_deployment(
                found.id, parameters=parameters, idempotency_key=key, tags=list(tags)
            )
    except ObjectNotFound as error:
        raise Away(f"Prefect does not know the deployment {deployment}: make up applies it") from error
    except (HTTPError, OSError, RuntimeError) as error:  # Prefect's client raises RuntimeError, unconnected
        raise Away(f"Prefect does not answer ({type(error).__name__})") from error
    return str(run.id)
