"""Runs that were under way when a worker died, told from those of another machine's worker."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun, State
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling, Pending, Running

from infra import process
from infra.recover import orphans
from infra.services import POOL, WORKER

pytestmark = pytest.mark.slow
OTHER = f"{POOL}-another-machine"


@pytest.fixture
def server(prefect_server: str) -> Iterator[SyncPrefectClient]:
    """The work pool of `make up`, and nobody who works for it."""
    with temporary_settings({PREFECT_API_URL: prefect_server}), get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        yield client
        client.delete_work_pool(POOL)


def made(client: SyncPrefectClient, worker: str | None, *states: State[Any]) -> FlowRun:
    """A run that this worker has taken; with None no worker has said so."""
    flow = client.create_flow_from_name("optimize")
    deployment = client.create_deployment(flow, "recover", work_pool_name=POOL)
    run = client.create_flow_run_from_deployment(deployment)
    if worker:
        client.update_flow_run_labels(run.id, {"prefect.worker.name": worker})
    for state in states or (Running(),):
        client.set_flow_run_state(run.id, state, force=True)
    return run


def state(client: SyncPrefectClient, run: FlowRun) -> str | None:
    return client.read_flow_run(run.id).state_name


def heartbeat(client: SyncPrefectClient, worker: str) -> None:
    client.send_worker_heartbeat(POOL, worker, heartbeat_interval_seconds=30)


def test_a_run_whose_process_is_gone_starts_again(server: SyncPrefectClient, tmp_path: Path) -> None:
    heartbeat(server, WORKER)
    running, pending = made(server, WORKER), made(server, None, Pending())
    cancelling = made(server, WORKER, Running(), Cancelling())
    assert orphans(tmp_path) == 3
    found = [state(server, run) for run in (running, pending, cancelling)]
    assert found == ["AwaitingRetry", "AwaitingRetry", "Cancelled"]


def test_a_run_of_another_machines_worker_goes_on(server: SyncPrefectClient, tmp_path: Path) -> None:
    heartbeat(server, WORKER)
    heartbeat(server, OTHER)
    ours, theirs, unmarked = (made(server, worker) for worker in (WORKER, OTHER, None))
    assert orphans(tmp_path) == 1
    found = [state(server, run) for run in (ours, theirs, unmarked)]
    assert found == ["AwaitingRetry", "Running", "Running"]


def test_a_run_whose_process_outlived_its_worker_goes_on(server: SyncPrefectClient, tmp_path: Path) -> None:
    run = made(server, WORKER)
    environment = os.environ | {"PREFECT__FLOW_RUN_ID": str(run.id)}
    command = process.Command("worker", (sys.executable, "-c", "input()"), environment)
    marked = environment | {process.MARK: process._mark(command.name, tmp_path)}
    with subprocess.Popen(command.arguments, env=marked, stdin=subprocess.PIPE) as alive:
        assert orphans(tmp_path) == 0
        alive.communicate(b"\n")
    assert state(server, run) == "Running"
