"""Flow runs whose process is gone: handed out again, or called crashed, so that nothing waits for them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from infra import process
from infra.services import POOL, WORKER

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun, State

TAKEN_BY = "prefect.worker.name"  # a label that Prefect's worker gives a run before it starts its process


def orphans(folder: Path) -> int:
    """Deal with every run that was under way here when the worker died; returns how many.

    Call it while no worker runs here; what another machine's worker took is left alone. A run whose process
    outlived the worker goes on; one that was scheduled comes again by itself; any other starts again, and its
    finished stages are kept.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas import filters
    from prefect.client.schemas.objects import StateType

    under_way = filters.FlowRunFilterStateType(
        any_=[StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
    )
    pool = filters.WorkPoolFilter(name=filters.WorkPoolFilterName(any_=[POOL]))
    alive = _alive(folder)
    with get_client(sync_client=True) as client:
        state = filters.FlowRunFilterState(type=under_way)
        runs = client.read_flow_runs(
            flow_run_filter=filters.FlowRunFilter(state=state), work_pool_filter=pool
        )
        alone = not _others(client)
        lost = [run for run in runs if str(run.id) not in alive and _ours(run, alone)]
        for run in lost:
            # Setting a state frees the run's concurrency slot at once.
            client.set_flow_run_state(run.id, _next(run), force=True)
    return len(lost)


def _ours(run: FlowRun, alone: bool) -> bool:
    """Whether this machine's worker took the run; one that no worker has marked may be any worker's."""
    worker = run.labels.get(TAKEN_BY)
    return alone if worker is None else worker == WORKER


def _others(client: SyncPrefectClient) -> list[str]:
    """The workers of other machines that are online."""
    from prefect.client.schemas.objects import WorkerStatus

    workers = client.read_workers_for_work_pool(POOL)
    return [each.name for each in workers if each.name != WORKER and each.status == WorkerStatus.ONLINE]


def _next(run: FlowRun) -> State[None]:
    from prefect.states import AwaitingRetry, Cancelled, Crashed

    assert run.state is not None
    if run.state.is_cancelling():
        return Cancelled(message="its process is gone")
    if run.auto_scheduled:
        return Crashed(message="its process is gone; the schedule brings the next one")
    return AwaitingRetry(message="its process is gone; it starts again, finished stages are kept")


def _alive(folder: Path) -> set[str]:
    """Ids of the runs that have a process."""
    found = set()
    for member in process.members("worker", folder):
        try:
            found.add(member.environ().get("PREFECT__FLOW_RUN_ID", ""))
        except (psutil.Error, OSError):
            continue
    return found
