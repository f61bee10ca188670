"""The services of one machine: started, stopped, killed, started again."""

from __future__ import annotations

import socket
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from infra.recover import TAKEN_BY
from infra.services import WORKER
from tests.conftest import BRIEF
from tests.infra.stacks import MODEL, OTHER, PASSED, Stack, until

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1200)]
SERVICES = ("prefect", "mlflow", "receiver", "worker")


def flow_runs(client: SyncPrefectClient, state: str, deployment: str) -> list[Any]:
    from prefect.client.schemas import filters
    from prefect.client.schemas.objects import StateType

    kind = filters.FlowRunFilterStateType(any_=[StateType(state)])
    found = client.read_deployment_by_name(deployment)
    return client.read_flow_runs(
        flow_run_filter=filters.FlowRunFilter(
            state=filters.FlowRunFilterState(type=kind),
            deployment_id=filters.FlowRunFilterDeploymentId(any_=[found.id]),
        )
    )


def test_all_run_on_loopback_alone_and_a_second_up_leaves_them_alone(stack: Stack) -> None:
    assert stack.status() == dict.fromkeys(SERVICES, "up")
    before = {each.pid for name in ("prefect", "mlflow", "receiver") for each in stack.processes(name)}
    said = stack.up()
    assert all(address in said for address in (stack.prefect, stack.mlflow, stack.receiver))
    after = {each.pid for name in ("prefect", "mlflow", "receiver") for each in stack.processes(name)}
    assert after == before
    places = {
        connection.laddr.ip
        for name in SERVICES
        for each in stack.processes(name)
        for connection in each.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert places == {"127.0.0.1"}


def test_what_up_applied_is_there_once(stack: Stack) -> None:
    hooks = stack.api("GET", "webhooks").json()["webhooks"]
    assert [hook["name"] for hook in hooks] == ["enginehouse-champion"]
    with stack.orchestration() as client:
        for name in ("promote/champion", "reconcile/champion", "optimize/recipe", "retrain/model"):
            assert client.read_deployment_by_name(name).work_pool_name == "local"
        assert client.read_work_queue_by_name("build", work_pool_name="local").concurrency_limit == 1
        assert len(client.read_automations_by_name("enginehouse: a run without a heartbeat has crashed")) == 1


def test_a_cron_schedule_makes_runs(stack: Stack) -> None:
    """With SQLAlchemy 2.1 Prefect silently makes none."""
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import CronSchedule

    with stack.orchestration() as client:
        flow = client.read_deployment_by_name("reconcile/champion").flow_id
        hourly = DeploymentScheduleCreate(schedule=CronSchedule(cron="0 * * * *", timezone="UTC"))
        made = client.create_deployment(flow, "hourly", schedules=[hourly])
        try:
            runs = until(lambda: flow_runs(client, "SCHEDULED", "reconcile/hourly"))
            first = min(run.expected_start_time for run in runs)
            assert first.minute == 0
            assert datetime.now(UTC) < first <= datetime.now(UTC) + timedelta(hours=1)
        finally:
            client.delete_deployment(made)


def test_after_a_kill_of_everything_it_goes_on_and_no_slot_is_held(stack: Stack) -> None:
    with stack.orchestration() as client:
        made = client.read_deployment_by_name("reconcile/champion")
        client.create_flow_run_from_deployment(made.id)
        until(lambda: flow_runs(client, "RUNNING", "reconcile/champion"))
    stack.kill(*SERVICES)
    assert stack.status() == dict.fromkeys(SERVICES, "not up")
    stack.up()
    assert stack.status() == dict.fromkeys(SERVICES, "up")
    with stack.orchestration() as client:
        since = time.time()
        until(
            lambda: [
                run
                for run in flow_runs(client, "COMPLETED", "reconcile/champion")
                if run.end_time.timestamp() > since
            ],
            40,
        )
        assert not flow_runs(client, "RUNNING", "reconcile/champion")
        limits = client.read_global_concurrency_limits(limit=50, offset=0)
        assert {limit.name: limit.active_slots for limit in limits if limit.active_slots} == {}
    assert stack.agree(stack.alias() or "")


@pytest.mark.parametrize("away", SERVICES)
def test_a_promotion_is_done_once_whatever_was_away_meanwhile(stack: Stack, away: str) -> None:
    before, known = stack.alias(), stack.moves()
    after = OTHER if before == PASSED else PASSED
    if away == "mlflow":
        stack.set_alias(after)
        time.sleep(0.5)  # the webhook is out, and the flow has not looked yet
        stack.kill(away)
    else:
        stack.kill(away)
        stack.set_alias(after)
    stack.up()
    until(lambda: stack.agree(after), 120)
    made = [move for move in stack.moves()[len(known) :] if move.startswith(("promoted", "deployed"))]
    assert made == [f"promoted {before}>{after}", f"deployed {before}>{after}"]


def test_a_port_of_someone_else_is_told_before_anything_starts(tmp_path: Path) -> None:
    other = Stack(tmp_path / "home")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", other.ports["MLFLOW_PORT"]))
        taken.listen()
        done = other.run("-m", "infra", "up")
    assert done.returncode == 2
    assert f"port {other.ports['MLFLOW_PORT']} is taken" in done.stderr
    assert "MLFLOW_PORT=" in done.stderr
    assert not list((tmp_path / "home" / "services").glob("*.json"))


def test_the_worker_runs_a_recipe(stack: Stack) -> None:
    """Its stages are kept from the fixture's runs, so it finds its champion or version again."""
    with stack.orchestration() as client:
        made = client.read_deployment_by_name("optimize/recipe")
        run = client.create_flow_run_from_deployment(
            made.id, parameters={"recipe": "digits-cnn-int8-ptq", "overrides": [*BRIEF, "promote=manual"]}
        )
        ended = until(lambda: _final(client, run.id), 300)
        assert client.read_flow_run(run.id).labels[TAKEN_BY] == WORKER
    assert ended.is_completed(), ended
    assert MODEL in stack.api("GET", "registered-models/search").text


def _final(client: SyncPrefectClient, run: Any) -> Any:
    state = client.read_flow_run(run).state
    return state if state and state.is_final() else None
