"""What a key starts on a Prefect server that nobody works for: this test says how each run ends."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.sorting import FlowRunSort
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import AwaitingRetry, Cancelled, Completed, Crashed, Failed, Running

from flows import keyed
from flows.push import poll
from flows.schedules import data_changed
from recipes import load as recipe
from tasks import lineage
from tasks.artifacts import Version
from tasks.load import content
from tests.flows.test_push import Zoo
from tests.infra.statuses import Statuses

pytestmark = pytest.mark.slow
DEPLOYMENTS = ("push/commit", "optimize/recipe", "retrain/model")


@pytest.fixture
def server(prefect_server: str) -> Iterator[SyncPrefectClient]:
    """The deployments, on a server without a worker."""
    with temporary_settings({PREFECT_API_URL: prefect_server}), get_client(sync_client=True) as client:
        for name in DEPLOYMENTS:
            flow, deployment = name.split("/")
            client.create_deployment(client.create_flow_from_name(flow), deployment)
        yield client


def runs(client: SyncPrefectClient, deployment: str) -> list[FlowRun]:
    found = client.read_deployment_by_name(deployment)
    return [run for run in client.read_flow_runs() if run.deployment_id == found.id]


def end(client: SyncPrefectClient, run: FlowRun, state: State[Any]) -> None:
    client.set_flow_run_state(run.id, state, force=True)


def test_fifty_that_ask_for_the_same_get_one_run(server: SyncPrefectClient) -> None:
    key = str(uuid.uuid4())
    found = [keyed.start("push/commit", {}, key, []) for _ in range(50)]
    assert len({each.run.id for each in found}) == 1
    assert [each.fresh for each in found] == [True] + [False] * 49
    assert found[0].words == f"started push/commit as {found[0].run.name}"
    assert "is not done yet" in found[1].words


@pytest.mark.parametrize("state", [Running(), AwaitingRetry(), Completed(), Cancelled()])
def test_a_run_that_did_not_fail_keeps_its_key(server: SyncPrefectClient, state: State[Any]) -> None:
    key = str(uuid.uuid4())
    first = keyed.start("push/commit", {}, key, [])
    end(server, first.run, state)
    again = keyed.start("push/commit", {}, key, [])
    assert (again.run.id, again.fresh, again.failed) == (first.run.id, False, False)
    assert again.done == state.is_final()


def test_a_run_that_failed_is_tried_again_and_given_up_after_three(server: SyncPrefectClient) -> None:
    key = str(uuid.uuid4())
    tried = []
    for state in (Failed(), Crashed(), Failed()):
        found = keyed.start("push/commit", {}, key, [])
        assert found.fresh
        tried.append(found.run.id)
        end(server, found.run, state)
    assert len(set(tried)) == 3
    for _ in range(3):
        last = keyed.start("push/commit", {}, key, [])
        assert (last.run.id, last.fresh, last.failed) == (tried[-1], False, True)
    assert f"failed 3 times, last as {last.run.name}" in last.words
    assert str(last.run.id) in last.words


class Rows:
    """A recipe's data, which changes, and its model's newest version."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.file, self.recipe, self.patch = folder / "rows.csv", folder / "changed.yaml", patch
        shipped = Path(__file__).resolve().parent.parent.parent / "recipes" / "digits-cnn-int8-ptq.yaml"
        made = yaml.safe_load(shipped.read_text())
        made["data"]["source"] = f"path:{self.file}"
        self.recipe.write_text(yaml.safe_dump(made))

    def are(self, text: str) -> None:
        self.file.write_text(text)

    def register(self, number: str) -> None:
        """This version was made of the rows as they are."""
        digest = content(recipe(str(self.recipe)).data)
        version = Version("digits-cnn", number, "run", "passed", None, "manifest")
        latest = lineage.Latest(version, "recipe", digest, "checkpoint", "", "")
        self.patch.setattr(lineage, "latest", lambda model: latest)

    def tick(self) -> State[Any]:
        return data_changed.fn(str(self.recipe))


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rows:
    return Rows(tmp_path, monkeypatch)


def test_a_retrain_for_new_data_that_failed_is_tried_again(server: SyncPrefectClient, rows: Rows) -> None:
    rows.are("1,2\n")
    rows.register("1")
    assert rows.tick().name == "Unchanged"
    rows.are("1,3\n")
    before = len(runs(server, "retrain/model"))
    for attempt in range(1, 4):
        assert "changed: started retrain/model as" in str(rows.tick().message)
        waits = rows.tick()
        assert (waits.name, "started" in str(waits.message)) == ("Skipped", False)
        made = runs(server, "retrain/model")
        assert len(made) == before + attempt
        for run in made:
            end(server, run, Failed(message="MLflow is away"))
    given_up = rows.tick()
    assert given_up.is_failed()
    assert "failed 3 times" in str(given_up.message)
    assert len(runs(server, "retrain/model")) == before + 3


def test_data_that_comes_back_is_new_again(server: SyncPrefectClient, rows: Rows) -> None:
    rows.are("one\n")
    rows.register("1")
    before = len(runs(server, "retrain/model"))
    for number, text in enumerate(("two\n", "one\n", "two\n"), start=2):
        rows.are(text)
        assert rows.tick().name == "Completed", text
        for run in runs(server, "retrain/model"):
            end(server, run, Completed())
        rows.register(str(number))
        assert rows.tick().name == "Unchanged"
    assert len(runs(server, "retrain/model")) == before + 3


@pytest.fixture
def zoo(tmp_path: Path, fresh_home: Path) -> Iterator[Zoo]:
    with Statuses() as statuses:
        yield Zoo(tmp_path, fresh_home, statuses)


def pushes(client: SyncPrefectClient, commit: str) -> list[FlowRun]:
    named = FlowRunFilter(name=FlowRunFilterName(like_=commit[:7]))
    return client.read_flow_runs(flow_run_filter=named, sort=FlowRunSort.EXPECTED_START_TIME_DESC)


def test_the_poll_remembers_a_push_only_once_it_has_done_its_work(
    server: SyncPrefectClient, zoo: Zoo
) -> None:
    assert poll.fn().message == "zoo: seen for the first time, remembered"
    lost = zoo.commit({"recipes/a.yaml": "x: 1"})
    for attempt in range(1, 4):
        assert poll.fn().message == "zoo: main"
        assert "is not done yet" in str(poll.fn().message)
        made = pushes(server, lost)
        assert len(made) == attempt
        end(server, made[0], Crashed(message="no heartbeat for 90 seconds"))
    failed = poll.fn()
    assert failed.is_failed()
    assert "push/commit failed 3 times" in str(failed.message)
    assert len(pushes(server, lost)) == 3

    later = zoo.commit({"recipes/b.yaml": "x: 1"})
    assert poll.fn().message == "zoo: main"
    (run,) = pushes(server, later)
    assert run.parameters["before"] == zoo.first, "the push that was lost is part of the next one"
    end(server, run, Completed())
    assert poll.fn().message == "zoo: nothing moved"
    last = zoo.commit({})
    assert poll.fn().message == "zoo: main"
    (run,) = pushes(server, last)
    assert run.parameters["before"] == later
