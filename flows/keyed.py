"""Runs that stand for a key: one, however often it is asked for; another only where the last one failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterIdempotencyKey
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.utilities.urls import url_for

from tasks.errors import InputError

ATTEMPTS = 3  # for one key: a failure that repeats is a person's to look at


@dataclass(frozen=True)
class Keyed:
    """The newest run of a key, and whether it was started just now."""

    deployment: str
    run: FlowRun
    fresh: bool

    @property
    def failed(self) -> bool:
        """Whether it failed and is not tried again: not by Prefect, and not by us."""
        return _failed(self.run)

    @property
    def done(self) -> bool:
        """Whether it has ended, and did not fail."""
        return bool(self.run.state and self.run.state.is_final()) and not self.failed

    @property
    def words(self) -> str:
        """What became of the key."""
        name = f"{self.deployment} as {self.run.name}"
        if self.fresh:
            return f"started {name}"
        if self.failed:
            page = url_for("flow-run", self.run.id) or "Prefect's page of that run"
            return f"{self.deployment} failed {ATTEMPTS} times, last as {self.run.name}; {page} says why"
        return f"{name} has done it" if self.done else f"{name} is not done yet"


def start(
    deployment: str, parameters: dict[str, Any], key: str, tags: Sequence[str], name: str | None = None
) -> Keyed:
    """Start the deployment, unless a run of this key is under way, did not fail, or ATTEMPTS of them did."""
    keys = [key, *(f"{key}:{attempt}" for attempt in range(2, ATTEMPTS + 1))]
    known = _runs(keys)
    used = {run.idempotency_key for run in known}
    free = [each for each in keys if each not in used]
    if known and not (free and _failed(known[0])):
        return Keyed(deployment, known[0], fresh=False)
    try:
        run = run_deployment(
            deployment,
            parameters=parameters, flow_run_name=name, idempotency_key=free[0], tags=tags, timeout=0,
        )  # fmt: skip
    except ObjectNotFound:
        raise InputError(f"Prefect does not know the deployment {deployment}: `make up` applies it") from None
    assert isinstance(run, FlowRun)
    return Keyed(deployment, run, fresh=True)


def taken(keys: list[str]) -> str | None:
    """The name of a run that one of these keys started, whatever became of it."""
    found = _runs(keys)
    return found[0].name if found else None


def _runs(keys: list[str]) -> list[FlowRun]:
    """Newest first."""
    keyed = FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=keys))
    with get_client(sync_client=True) as client:
        return client.read_flow_runs(flow_run_filter=keyed, sort=FlowRunSort.EXPECTED_START_TIME_DESC)


def _failed(run: FlowRun) -> bool:
    return bool(run.state and (run.state.is_failed() or run.state.is_crashed()))
