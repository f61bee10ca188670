"""The real thing: pushes to a bare repository reach the Prefect, MLflow, worker and receiver of `make up`.

`-s` shows the seconds from push to run and verdict, and the receiver's latency and memory under a flood.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import httpx
import psutil
import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from tests.infra.receiver.deliveries import ZEROS, Post, gitea, github, gitlab, push
from tests.infra.statuses import Statuses
from tests.infra.test_git_hook import HOOK, run

ROOT = Path(__file__).resolve().parent.parent.parent
QUICK = "digits-cnn-int8-ptq"
PATIENCE = 400  # seconds for a pipeline on a busy machine; about 40 on an idle one
pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]


class Services:
    """What `python -m infra up` started, in a state folder and on ports of its own."""

    def __init__(self, home: Path, statuses: Statuses) -> None:
        self.home, self.statuses = home, statuses
        with ExitStack() as held:
            found = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
            self.ports = [place.getsockname()[1] for place in found]
        names = ("PREFECT_PORT", "MLFLOW_PORT", "RECEIVER_PORT")
        own = {name: str(port) for name, port in zip(names, self.ports, strict=True)}
        own["PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS"] = "2"
        own |= {"ENGINEHOUSE_HOME": str(home), "OMP_NUM_THREADS": "1", "AUTH": "0", "DATABASE_URL": "sqlite"}
        self.environment = {
            n: v for n, v in os.environ.items() if not n.startswith(("PREFECT", "MLFLOW"))
        } | own

    def infra(self, verb: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "infra", verb],
            cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def settings(self, name: str) -> dict[str, str]:
        lines = (self.home / "services" / name).read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)

    @property
    def receiver(self) -> str:
        return f"http://127.0.0.1:{self.ports[2]}"

    def post(self, post: Post) -> httpx.Response:
        return httpx.post(self.receiver + post.path, content=post.body, headers=post.headers, timeout=30)

    def secret(self, host: str) -> str:
        return self.settings("secrets.env")[f"ENGINEHOUSE_{host}_WEBHOOK_SECRET"]


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    with Statuses() as statuses:
        found = Services(tmp_path_factory.mktemp("git") / "home", statuses)
        (found.home / "services").mkdir(parents=True, mode=0o700)
        (found.home / "services" / "secrets.env").write_text("ENGINEHOUSE_TOKEN_127_0_0_1=a-token\n")
        try:
            found.infra("up")
            yield found
        finally:
            found.infra("down")


@pytest.fixture(scope="module")
def prefect(services: Services) -> Iterator[SyncPrefectClient]:
    """A client of the services' Prefect, which this module's own flows use, too."""
    told = services.settings("client.env")
    updates = {PREFECT_API_URL: told["PREFECT_API_URL"]}
    if "PREFECT_API_AUTH_STRING" in told:
        updates[PREFECT_API_AUTH_STRING] = told["PREFECT_API_AUTH_STRING"]
    with temporary_settings(updates), get_client(sync_client=True) as client:
        for each in client.read_deployments():  # two cores are for what is tested here
            if "promotion" in each.tags:
                client.update_deployment(each.id, DeploymentUpdate(paused=True))
        yield client


@pytest.fixture
def here(services: Services, prefect: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process uses the services, as a worker's would."""
    monkeypatch.setenv("ENGINEHOUSE_HOME", str(services.home))
    for name, value in services.settings("client.env").items():
        if not name.startswith("PREFECT"):
            monkeypatch.setenv(name, value)


class Zoo:
    """A bare repository with the hook, and a clone of what is tracked here."""

    def __init__(self, folder: Path, services: Services, code: dict[str, bytes]) -> None:
        self.bare, self.work, self.services = folder / "zoo.git", folder / "work", services
        run("init", "--quiet", "--bare", "--initial-branch=main", str(self.bare), folder=folder)
        run("init", "--quiet", "--initial-branch=main", str(self.work), folder=folder)
        for name, value in {
            "user.name": "t",
            "user.email": "t@example.org",
            "commit.gpgsign": "false",
        }.items():
            run("config", name, value, folder=self.work)
        run("remote", "add", "origin", str(self.bare), folder=self.work)
        run("config", "enginehouse.env", str(services.home / "services" / "client.env"), folder=self.bare)
        (self.bare / "hooks").mkdir(exist_ok=True)
        self.first = self.commit(code)
        self.push()

    def allow(self, **more: Any) -> None:
        entry = {"url": str(self.bare), "also": ["https://git.example.org/me/zoo.git"], **more}
        file = self.services.home / "services" / "repositories.yaml"
        file.write_text(yaml.safe_dump({"zoo": entry}))

    def hook(self, on: bool) -> None:
        place = self.bare / "hooks" / "post-receive"
        place.symlink_to(HOOK) if on else place.unlink(missing_ok=True)

    def commit(self, files: dict[str, bytes]) -> str:
        for name, content in files.items():
            (self.work / name).parent.mkdir(parents=True, exist_ok=True)
            (self.work / name).write_bytes(content)
        run("add", "--all", folder=self.work)
        run("commit", "--quiet", "--allow-empty", "-m", "x", folder=self.work)
        return run("rev-parse", "HEAD", folder=self.work)

    def push(self) -> str:
        return run("push", "origin", "main", folder=self.work)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory, services: Services) -> Zoo:
    names = run("ls-files", "-z", folder=ROOT).rstrip("\0").split("\0")
    code = {name: (ROOT / name).read_bytes() for name in names if (ROOT / name).is_file()}
    found = Zoo(tmp_path_factory.mktemp("zoo"), services, code)
    found.allow(status="gitea", api=services.statuses.url)
    return found


def runs(prefect: SyncPrefectClient, commit: str, flow: str = "optimize-commit") -> list[FlowRun]:
    tagged = FlowRunFilter(tags=FlowRunFilterTags(all_=["push", f"commit:{commit[:7]}"]))
    named = FlowFilter(name=FlowFilterName(any_=[flow]))
    return prefect.read_flow_runs(flow_filter=named, flow_run_filter=tagged)


def ended(prefect: SyncPrefectClient, commit: str, count: int = 1) -> dict[str, FlowRun]:
    """The commit's runs by name, once all have ended."""
    deadline = time.monotonic() + PATIENCE
    while True:
        found = runs(prefect, commit)
        if len(found) >= count and all(each.state and each.state.is_final() for each in found):
            return {str(each.name): each for each in found}
        told = [(each.name, each.state_name) for each in found] + [
            (each.name, each.state and each.state.message) for each in runs(prefect, commit, "push")
        ]
        assert time.monotonic() < deadline, told
        time.sleep(0.5)


def poll(prefect: SyncPrefectClient) -> str:
    """Run the deployed poll, and wait for what it says."""
    made = prefect.create_flow_run_from_deployment(prefect.read_deployment_by_name("poll/repositories").id)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        state = prefect.read_flow_run(made.id).state
        if state and state.is_final():
            return str(state.message)
        time.sleep(0.3)
    raise AssertionError("the poll did not end")


def test_a_push_is_promoted_whichever_way_it_comes(
    zoo: Zoo, services: Services, prefect: SyncPrefectClient, here: None
) -> None:
    assert poll(prefect) == "zoo: seen for the first time, remembered"
    recipe = (ROOT / "recipes" / f"{QUICK}.yaml").read_bytes()

    # 1. The hook: another training, and a recipe that looks at a folder.
    zoo.hook(on=True)
    by_hook = zoo.commit(
        {f"recipes/{QUICK}.yaml": recipe.replace(b"epochs: 12", b"epochs: 6") + b"watch: [docs/**]\n"}
    )
    started = time.monotonic()
    assert "handed over" in zoo.push()
    zoo.hook(on=False)
    _promoted(prefect, by_hook, started, "hook")

    # 2. A webhook: what the recipe watches, and a recipe that is broken.
    by_webhook = zoo.commit({"docs/deep/new.md": b"x", "recipes/broken.yaml": b"quantise: int8\n"})
    zoo.push()
    started = time.monotonic()
    told = gitea(push(by_webhook, by_hook), secret=services.secret("GITEA"))
    assert services.post(told).status_code == 202
    broken = _promoted(prefect, by_webhook, started, "webhook", count=2)[f"broken @ {by_webhook[:7]}"]
    assert broken.state_name == "Failed"
    assert "quantise: unknown key" in str(broken.state and broken.state.message)

    # 3. The poll sees what 1. and 2. told, and one push more.
    by_poll = zoo.commit({"docs/deep/new.md": b"y"})
    zoo.push()
    started = time.monotonic()
    assert poll(prefect) == "zoo: main"
    _promoted(prefect, by_poll, started, "poll")

    # Told again by every way, nothing runs again.
    assert (
        services.post(github(push(by_poll, by_webhook), secret=services.secret("GITHUB"))).status_code == 202
    )
    assert (
        services.post(gitlab(push(by_webhook, by_hook), secret=services.secret("GITLAB"))).status_code == 202
    )
    assert poll(prefect) == "zoo: nothing moved"
    _settled(prefect, (by_hook, by_webhook, by_poll))
    assert [len(runs(prefect, each)) for each in (by_hook, by_webhook, by_poll)] == [1, 2, 1]

    _seen(prefect, services, by_hook)


def _promoted(
    prefect: SyncPrefectClient, commit: str, started: float, way: str, count: int = 1
) -> dict[str, FlowRun]:
    found = ended(prefect, commit, count)
    made = found[f"{QUICK} @ {commit[:7]}"]
    assert made.state_name == "Promoted", made.state
    assert {"push", f"recipe:{QUICK}", f"commit:{commit[:7]}", "branch:main"} <= set(made.tags)
    assert made.parameters["commit"] == commit
    assert made.start_time
    began = (datetime.now(timezone.utc) - made.start_time).total_seconds()
    total = time.monotonic() - started
    _show(f"{way}: run started after {total - began:.1f} s, verdict after {total:.1f} s")
    return found


def _show(line: str) -> None:
    sys.stdout.write(f"\n{line}\n")


def _settled(prefect: SyncPrefectClient, commits: tuple[str, ...]) -> None:
    deadline = time.monotonic() + PATIENCE
    while any(not (r.state and r.state.is_final()) for c in commits for r in runs(prefect, c, "push")):
        assert time.monotonic() < deadline
        time.sleep(0.5)


def _seen(prefect: SyncPrefectClient, services: Services, commit: str) -> None:
    """The run's page has the report and a link to MLflow; MLflow's run links back; the commit knows."""
    (made,) = runs(prefect, commit)
    shown = prefect.read_artifacts(
        artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[made.id]))
    )
    data = {str(each.key): str(each.data) for each in shown}
    assert f"# {QUICK}: passed" in data[f"gate-{QUICK}"]
    from mlflow import MlflowClient

    registry = MlflowClient(services.settings("client.env")["MLFLOW_TRACKING_URI"])
    version = registry.get_model_version_by_alias("digits-cnn", "champion")
    assert f"/#/runs/{version.run_id}" in data[f"mlflow-{QUICK}"]
    logged = registry.get_run(str(version.run_id)).data.tags
    assert logged["commit"] == commit
    assert logged["mlflow.source.git.commit"] == commit
    assert "/runs/flow-run/" in logged["prefect_flow_run"]
    told = [each for each in services.statuses.told if each["path"].endswith(commit)]
    assert [each["state"] for each in told] == ["pending", "pending", "success"]
    assert told[-1]["target_url"].endswith(f"/#/runs/{version.run_id}")
    assert {each["authorization"] for each in told} == {"token a-token"}


def test_fifty_pushes_in_a_minute_are_started_once_each(
    tmp_path: Path, services: Services, prefect: SyncPrefectClient, here: None
) -> None:
    from flows.push import push as handle

    held = [prefect.read_work_queue_by_name(name, work_pool_name="local") for name in ("push", "build")]
    for queue in held:  # what is started is counted, not run
        prefect.update_work_queue(queue.id, is_paused=True)
    try:
        zoo = Zoo(tmp_path, services, {"flows/__main__.py": b""})
        zoo.allow()
        zoo.hook(on=True)
        commits = []
        started = time.monotonic()
        for k in range(50):
            commits.append(zoo.commit({"recipes/a.yaml": b"k: %d" % k}))
            zoo.push()
        _show(f"50 pushes in {time.monotonic() - started:.0f} s")
        told = [each for commit in commits for each in runs(prefect, commit, "push")]
        assert [each.parameters["commit"] for each in told] == commits
        for each in (*told, *told[:10]):  # as the worker would; and some once more, as if told twice
            assert handle.fn(**each.parameters).is_completed()
        assert [[made.name for made in runs(prefect, each)] for each in commits] == [
            [f"a @ {each[:7]}"] for each in commits
        ]
    finally:
        for queue in held:
            prefect.update_work_queue(queue.id, is_paused=False)


def test_a_thousand_bad_calls_start_nothing_and_leave_the_receiver_as_it_was(
    zoo: Zoo, services: Services, prefect: SyncPrefectClient
) -> None:
    zoo.allow()
    process = psutil.Process(json.loads((services.home / "services" / "receiver.json").read_text())["pid"])
    before = _count(prefect)
    good = github(push("a" * 40, ref="refs/heads/unwatched"), secret=services.secret("GITHUB"))
    seconds: list[float] = []
    with httpx.Client(base_url=services.receiver, timeout=30) as client:
        for k in range(1050):
            post, wanted = _bad(k, services)
            began = time.perf_counter()
            answer = client.post(post.path, content=post.body, headers=post.headers)
            seconds.append(time.perf_counter() - began)
            assert answer.status_code in wanted, (k, answer.text)
            if k == 49:
                resting = process.memory_info().rss
        assert client.post(good.path, content=good.body, headers=good.headers).status_code == 200
    grown = process.memory_info().rss - resting
    centiles = statistics.quantiles(seconds[50:], n=100)
    milliseconds = [1000 * centiles[k] for k in (49, 98)]
    _show("p50 {:.1f} ms, p99 {:.1f} ms, ".format(*milliseconds) + f"{grown / 2**20:+.1f} MiB of memory")
    assert grown < 20 << 20
    assert _count(prefect) == before


def _count(prefect: SyncPrefectClient) -> int:
    named = FlowFilter(name=FlowFilterName(any_=["push", "optimize-commit"]))
    return len(prefect.read_flow_runs(flow_filter=named, limit=200))


def _bad(k: int, services: Services) -> tuple[Post, set[int]]:
    """Forged, replayed, late, oversized and malformed calls, in turn."""
    payload = push(secrets.token_hex(20), ZEROS)
    secret = services.secret("GITHUB")
    late = payload | {"repository": payload["repository"] | {"pushed_at": time.time() - 7 * 86400}}
    kinds: list[tuple[Post, set[int]]] = [
        (github(payload, secret="forged"), {401}),
        (gitea(payload, secret="forged"), {401}),
        (gitlab(payload, secret="forged"), {401}),
        (github(late, secret=secret), {401}),
        (github(b"{" * 1000, secret=secret), {400}),
        (github(payload, secret=secret).but(x_hub_signature_256=""), {401}),
        (gitea(payload | {"after": "HEAD"}, secret=services.secret("GITEA")), {400}),
        (Post("/github", b"x" * (5 << 20), {}) if k % 100 == 7 else Post("/nowhere", b"", {}), {413, 404}),
        (github(push("a" * 40, ref="refs/heads/unwatched"), secret=secret), {200}),
        (gitlab(payload, event="Merge Request Hook", secret=services.secret("GITLAB")), {200}),
    ]
    return kinds[k % len(kinds)]


def test_the_clocks_tick_at_their_local_time(services: Services, prefect: SyncPrefectClient) -> None:
    nightly = prefect.read_deployment_by_name("scheduled/nightly")
    (clock,) = nightly.schedules
    assert not clock.active
    prefect.update_deployment_schedule(nightly.id, clock.id, active=True)
    try:
        found: list[FlowRun] = []
        deadline = time.monotonic() + 120
        while len(found) < 3 and time.monotonic() < deadline:
            tagged = FlowRunFilter(tags=FlowRunFilterTags(all_=["schedule", "auto-scheduled"]))
            found = prefect.read_flow_runs(flow_run_filter=tagged)
            time.sleep(0.5)
        assert len(found) >= 3
        due = [each.expected_start_time for each in found if each.expected_start_time]
        assert {d.astimezone(ZoneInfo("Europe/Berlin")).strftime("%H:%M") for d in due} == {"03:30"}
        assert all(each.parameters["deployment"] == "optimize/recipe" for each in found)
    finally:
        prefect.update_deployment_schedule(nightly.id, clock.id, active=False)


def test_a_tick_starts_one_run_and_none_behind_it_or_too_late(
    services: Services, prefect: SyncPrefectClient, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.schedules import scheduled

    build = prefect.read_work_queue_by_name("build", work_pool_name="local")
    prefect.update_work_queue(build.id, is_paused=True)
    try:
        wanted = {"recipe": f"never-{secrets.token_hex(4)}"}
        assert "started optimize/recipe as" in str(scheduled.fn("optimize/recipe", wanted).message)
        behind = scheduled.fn("optimize/recipe", wanted)
        assert (behind.name, behind.message and "is not done yet" in behind.message) == ("Skipped", True)
        due = datetime(2026, 1, 1, 3, 30, tzinfo=timezone.utc)
        monkeypatch.setattr(flow_run, "scheduled_start_time", due, raising=False)
        late = scheduled.fn("optimize/recipe", {"recipe": "other"})
        assert late.name == "Skipped"
        assert "due 2026-01-01 03:30 UTC" in str(late.message)
    finally:
        prefect.update_work_queue(build.id, is_paused=False)


def test_changed_data_starts_one_run(
    tmp_path: Path, services: Services, prefect: SyncPrefectClient, here: None
) -> None:
    from flows.schedules import data_changed

    assert data_changed.fn(QUICK).name == "Unchanged"  # the test above registered it
    content = yaml.safe_load((ROOT / "recipes" / f"{QUICK}.yaml").read_text())
    rows = tmp_path / "rows.csv"
    rows.write_text("1,2\n")
    content["data"]["source"] = f"path:{rows}"
    recipe = tmp_path / "changed.yaml"
    recipe.write_text(yaml.safe_dump(content))
    build = prefect.read_work_queue_by_name("build", work_pool_name="local")
    prefect.update_work_queue(build.id, is_paused=True)
    try:
        said = [str(data_changed.fn(str(recipe), "optimize").message) for _ in range(2)]
        assert "changed: started optimize/recipe as" in said[0]
        assert "is not done yet" in said[1]
        assert said[0].split(" as ")[1] == said[1].split(" as ")[1].split()[0]
        content["model"]["name"] = "never-registered"
        recipe.write_text(yaml.safe_dump(content))
        assert data_changed.fn(str(recipe)).name == "Skipped"
    finally:
        prefect.update_work_queue(build.id, is_paused=False)
    shutil.rmtree(tmp_path)
