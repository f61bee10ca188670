"""A push without services: here and now, by the commit's own code, which is a small script."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.schemas.objects import State

from flows import commit as commits
from flows.push import push
from tasks import repositories
from tasks.errors import InputError
from tests.infra.statuses import Statuses

# What stands for `python -m flows optimize RECIPE --json` in the pushed commits.
CODE = """
import json, os, sys, time
assert sys.argv[1:2] == ["optimize"] and sys.argv[3:] == ["--json"], sys.argv
recipe = sys.argv[2]
here = {"recipe": recipe, "folder": os.getcwd(), "environment": dict(os.environ)}
open(os.environ["ENGINEHOUSE_HOME"] + "/seen", "a").write(json.dumps(here) + "\\n")
print("a step", "\\r 10 %\\r 100 %", file=sys.stderr)
if recipe == "broken":
    print("error: recipes/broken.yaml: not valid\\n  quantise: unknown key", file=sys.stderr)
    sys.exit(2)
if recipe == "crash":
    raise RuntimeError("out of memory")
if recipe == "slow":
    time.sleep(60)
verdict = {"refused": "refused", "built": "built"}.get(recipe, "promoted")
reasons = ["size is 0.9"] if verdict == "refused" else []
print(json.dumps({"verdict": verdict, "model": "m", "version": "7", "run_id": "r", "reasons": reasons}))
sys.exit({"promoted": 0, "refused": 3, "built": 4}[verdict])
"""


class Zoo:
    """A repository whose commits hold the script, allowed here."""

    def __init__(self, folder: Path, home: Path, statuses: Statuses) -> None:
        self.folder, self.home, self.statuses = folder / "me" / "zoo", home, statuses
        self.folder.mkdir(parents=True)
        self.git("init", "--quiet", "--initial-branch=main")
        for name, value in {
            "user.name": "t",
            "user.email": "t@example.org",
            "commit.gpgsign": "false",
        }.items():
            self.git("config", name, value)
        self.first = self.commit({"flows/__main__.py": CODE, "flows/__init__.py": ""})
        (home / "services").mkdir(parents=True)
        self.allow(branches=["main"])

    def allow(self, **entry: Any) -> None:
        content = {"zoo": {"url": str(self.folder), "also": ["git@git.example.org:me/zoo.git"], **entry}}
        (self.home / "services" / "repositories.yaml").write_text(yaml.safe_dump(content))

    def git(self, *arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=self.folder, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def commit(self, files: dict[str, str]) -> str:
        for name, content in files.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_text(content)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "-m", "x")
        return self.git("rev-parse", "HEAD")

    def seen(self) -> list[dict[str, Any]]:
        file = self.home / "seen"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def zoo(tmp_path: Path, fresh_home: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    with Statuses() as statuses:
        monkeypatch.setenv("ENGINEHOUSE_TOKEN_127_0_0_1", "a-token")
        yield Zoo(tmp_path, fresh_home, statuses)


def pushed(zoo: Zoo, commit: str, before: str | None = None, branch: str = "main") -> State[Any]:
    state: State[Any] = push(str(zoo.folder), commit, before, branch, return_state=True)
    return state


@pytest.mark.slow
def test_a_push_runs_the_commits_own_code_where_it_lies_and_without_our_secrets(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {
        "ENGINEHOUSE_TOKEN_GITHUB_COM": "x",
        "ENGINEHOUSE_GITHUB_WEBHOOK_SECRET": "x",
        "PYTHONPATH": "/x",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    commit = zoo.commit({"recipes/a.yaml": "x: 1", "recipes/b.yaml": "watch: [data/*]"})
    later = zoo.commit({"data/x": "1", "recipes/a.yaml": "x: 2"})
    zoo.git("rm", "--quiet", "recipes/a.yaml")
    last = zoo.commit({})

    assert pushed(zoo, commit, zoo.first).message == "a @ {0}: started; b @ {0}: started".format(commit[:7])
    assert [each["recipe"] for each in zoo.seen()] == ["a", "b"]
    here = zoo.seen()[0]
    assert here["folder"] == str(zoo.home / "checkouts" / commit)
    assert not here["environment"].keys() & {*secrets, "ENGINEHOUSE_TOKEN_127_0_0_1"}
    assert json.loads(here["environment"]["MLFLOW_RUN_CONTEXT"]) == {
        "repository": "zoo", "commit": commit, "branch": "main",
    }  # fmt: skip
    assert "commit:" + commit[:7] in json.loads(here["environment"]["ENGINEHOUSE_TAGS"])

    assert "a @" in str(pushed(zoo, later, commit).message)
    assert [each["recipe"] for each in zoo.seen()[2:]] == ["a", "b"]
    assert pushed(zoo, last, later).message == "a: deleted by this push; nothing is started"
    assert pushed(zoo, last, last).message == f"{last[:7]} touches no recipe"
    assert len(zoo.seen()) == 4


@pytest.mark.slow
def test_what_is_not_allowed_does_not_run(zoo: Zoo, tmp_path: Path) -> None:
    commit = zoo.commit({"recipes/a.yaml": "x: 1"})
    zoo.git("branch", "topic")
    assert "pushes to topic start nothing" in str(pushed(zoo, commit, zoo.first, "topic").message)
    with pytest.raises(InputError, match="may not start runs here"):
        push(str(tmp_path / "fork"), commit, zoo.first, "main")
    with pytest.raises(InputError, match="40 hex digits"):
        push(str(zoo.folder), "HEAD", None, "main")
    with pytest.raises(InputError, match="not a branch's name"):
        push(str(zoo.folder), commit, None, "../main")
    # A commit that the repository holds and the branch does not: a fork's pull request, or one taken away.
    zoo.git("update-ref", "refs/pull/1/head", zoo.commit({"recipes/a.yaml": "evil"}))
    evil = zoo.git("rev-parse", "HEAD")
    zoo.git("reset", "--quiet", "--hard", commit)
    assert "is not on main" in str(pushed(zoo, evil, commit).message)
    with pytest.raises(InputError, match="not on main"):
        commits.optimize_commit("zoo", "a", evil, "main")
    with pytest.raises(InputError, match="not among its branches"):
        commits.optimize_commit("zoo", "a", commit, "topic")
    assert not zoo.seen()


@pytest.mark.parametrize(
    ("recipe", "state", "told", "words"),
    [
        ("good", "Promoted", "success", "promoted: m version 7"),
        ("refused", "Refused", "failure", "refused: m version 7: size is 0.9"),
        ("built", "Built", "pending", "built: m version 7"),
        ("broken", "Failed", "failure", "recipes/broken.yaml: not valid quantise: unknown key"),
        ("crash", "Failed", "error", "RuntimeError: out of memory (exit status 1)"),
        ("$(touch pwned)", "Failed", "failure", "a recipe's name is letters"),
        ("-h", "Failed", "failure", "a recipe's name is letters"),
    ],
)
def test_how_it_ended_stands_on_the_commit(zoo: Zoo, recipe: str, state: str, told: str, words: str) -> None:
    zoo.allow(status="gitea", api=zoo.statuses.url, branches=["main"])
    commit = zoo.commit({f"recipes/{recipe}.yaml": "x: 1"})
    ended: State[Any] = commits.optimize_commit("zoo", recipe, commit, return_state=True)
    assert ended.name == state
    first, last = zoo.statuses.told
    assert first["state"] == "pending"
    assert last["state"] == told
    assert words in last["description"]
    assert len(last["description"]) <= 140
    assert last["context"] == f"enginehouse/{recipe}"
    assert last["path"] == f"/api/v1/repos/me/zoo/statuses/{commit}"
    assert last["authorization"] == "token a-token"
    assert not list(zoo.folder.parent.rglob("pwned"))


def test_a_run_that_is_stopped_takes_its_process_along(zoo: Zoo) -> None:
    zoo.allow(status="gitea", api=zoo.statuses.url, branches=["main"])
    commit = zoo.commit({"recipes/slow.yaml": "x: 1"})
    pushed_ = commits.Pushed(repositories.find("zoo"), "slow", commit, "main")
    seen = threading.Event()

    def stop() -> None:
        while not zoo.seen():
            time.sleep(0.05)
        seen.set()

    threading.Thread(target=stop, daemon=True).start()
    from tasks import checkout

    with (
        checkout.checkout(checkout.mirror(pushed_.repository), commit) as folder,
        pytest.raises(KeyboardInterrupt),
        commits._told(pushed_),
        commits._process(
            ["python3", "-m", "flows", "optimize", "slow", "--json"], folder, commits.environment(pushed_)
        ) as process,
    ):
        assert seen.wait(30)
        raise KeyboardInterrupt
    assert process.poll() is not None
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert zoo.statuses.told[-1]["state"] == "error"
