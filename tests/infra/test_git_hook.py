"""The post-receive hook: real pushes into a bare repository; Prefect's API is a small server that records."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
HOOK = ROOT / "infra" / "git" / "post-receive"
ZEROS = "0" * 40


class Api(ThreadingHTTPServer):
    """The three calls that the hook makes, with Prefect's CSRF protection and password."""

    daemon_threads = True

    def __init__(self, port: int = 0, password: str = "", status: int = 201) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.calls = 0
        self.password, self.status = password, status
        super().__init__(("127.0.0.1", port), Handler)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/api"

    def branches(self) -> list[str]:
        return [run["parameters"]["branch"] for run in self.runs.values()]


class Handler(BaseHTTPRequestHandler):
    server: Api

    def do_GET(self) -> None:
        if self.path.startswith("/api/csrf-token?client="):
            return self.answer(200, {"token": "a-token"})
        found = self.path == "/api/deployments/name/push/commit"
        return self.answer(200 if found else 404, {"id": "the-id"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.headers.get("prefect-csrf-token") != "a-token":
            return self.answer(403, {"detail": "Missing CSRF token."})
        self.server.calls += 1
        if self.server.status < 300:
            self.server.runs.setdefault(body["idempotency_key"], body)
        return self.answer(self.server.status, {"id": "a-run"})

    def answer(self, status: int, content: dict[str, Any]) -> None:
        if self.server.password and self.headers.get("authorization") != self.server.password:
            status, content = 401, {"detail": "Unauthorized"}
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: Any) -> None:
        pass


@pytest.fixture
def api() -> Iterator[Api]:
    server = Api()
    yield server
    server.shutdown()
    server.server_close()


class Repository:
    """A bare repository with the hook, and a clone to push from."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.bare, self.work = folder / "zoo.git", folder / "work"
        run("init", "--quiet", "--bare", "--initial-branch=main", *options, str(self.bare), folder=folder)
        run("init", "--quiet", "--initial-branch=main", *options, str(self.work), folder=folder)
        for name, value in {
            "user.name": "t",
            "user.email": "t@example.org",
            "commit.gpgsign": "false",
        }.items():
            run("config", name, value, folder=self.work)
        run("remote", "add", "origin", str(self.bare), folder=self.work)
        (self.bare / "hooks").mkdir(exist_ok=True)
        (self.bare / "hooks" / "post-receive").symlink_to(HOOK)
        run("config", "enginehouse.env", str(folder / "client.env"), folder=self.bare)
        run("config", "enginehouse.linger", "false", folder=self.bare)

    def to(self, url: str, **more: str) -> None:
        lines = [f"{name}={value}\n" for name, value in {"PREFECT_API_URL": url, **more}.items()]
        (self.bare.parent / "client.env").write_text("# made by up\n" + "".join(lines))

    def commit(self) -> str:
        run("commit", "--quiet", "--allow-empty", "-m", "x", folder=self.work)
        return run("rev-parse", "HEAD", folder=self.work)

    def push(self, *refs: str) -> str:
        return run("push", "origin", *refs, folder=self.work)


def run(*arguments: str, folder: Path) -> str:
    """What a git command said, on both streams; no setting of this session leads the hook elsewhere."""
    own = {
        name: v for name, v in os.environ.items() if not name.startswith(("PREFECT", "ENGINEHOUSE", "GIT_"))
    }
    done = subprocess.run(
        ["git", *arguments], cwd=folder, env=own, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return (done.stdout + done.stderr).strip()


@pytest.fixture
def zoo(tmp_path: Path, api: Api) -> Repository:
    repository = Repository(tmp_path)
    repository.to(api.url)
    return repository


def test_a_push_is_handed_over_and_told_in_a_line(zoo: Repository, api: Api) -> None:
    first = zoo.commit()
    assert f"remote: enginehouse: handed over main @ {first[:7]}" in zoo.push("main")
    second = zoo.commit()
    zoo.push("main")
    runs = list(api.runs.values())
    assert runs[0]["parameters"] == {
        "repository": str(zoo.bare), "commit": first, "before": None, "branch": "main",
    }  # fmt: skip
    assert runs[1]["parameters"]["before"] == first
    assert runs[1]["idempotency_key"] == f"push:{zoo.bare}:main:{first}:{second}"
    assert runs[1]["tags"] == ["push", "branch:main", f"commit:{second[:7]}"]


def test_the_repository_may_have_a_name_and_prefect_a_password(zoo: Repository, api: Api) -> None:
    api.password = "Basic bWU6c2VjcmV0"
    zoo.commit()
    answer = zoo.push("main")
    assert "wrong password" in answer
    assert "secret" not in answer
    zoo.to(api.url, PREFECT_API_AUTH_STRING="'me:secret'")
    run("config", "enginehouse.repository", "zoo", folder=zoo.bare)
    zoo.commit()
    zoo.push("main")
    assert [each["parameters"]["repository"] for each in api.runs.values()] == [str(zoo.bare), "zoo"]


def test_tags_and_deleted_branches_start_nothing(zoo: Repository, api: Api) -> None:
    zoo.commit()
    run("tag", "v1", folder=zoo.work)
    zoo.push("main", "main:gone", "v1")
    assert sorted(api.branches()) == ["gone", "main"]
    answer = zoo.push("--delete", "gone", "v1")
    assert "enginehouse" not in answer
    assert api.calls == 2


@pytest.mark.parametrize(
    "branch", ["$(touch pwned)x".replace(" ", "${IFS}"), "a'b\"c", "-x", "`id`;x", "ünï", "a/b"]
)
def test_odd_branch_names_are_names_and_nothing_else(zoo: Repository, api: Api, branch: str) -> None:
    zoo.commit()
    zoo.push(f"HEAD:refs/heads/{branch}")
    assert api.branches() == [branch]
    assert not list(zoo.bare.parent.rglob("pwned*"))


def test_a_branch_that_is_not_utf8_is_told_and_the_others_go_on(zoo: Repository, api: Api) -> None:
    zoo.commit()
    odd = b"refs/heads/\xff"
    done = subprocess.run(
        [b"git", b"push", b"origin", b"HEAD:" + odd, b"HEAD:refs/heads/main"],
        cwd=zoo.work, capture_output=True, check=True,
    )  # fmt: skip
    assert b"not UTF-8" in done.stderr
    assert api.branches() == ["main"]


def test_a_sha256_repository_is_told_so(tmp_path: Path, api: Api) -> None:
    zoo = Repository(tmp_path, "--object-format=sha256")
    zoo.to(api.url)
    zoo.commit()
    assert "SHA-256 repositories are not supported" in zoo.push("main")
    assert not api.runs


@pytest.mark.parametrize("status", [500, 404, 422])
def test_what_prefect_does_not_take_is_kept_for_the_next_push(zoo: Repository, api: Api, status: int) -> None:
    api.status = status
    commits = [zoo.commit()]
    assert "the push is kept" in zoo.push("main")
    commits.append(zoo.commit())
    zoo.push("main")
    assert not api.runs
    api.status = 201
    commits.append(zoo.commit())
    zoo.push("main")
    assert [each["parameters"]["commit"] for each in api.runs.values()] == commits
    assert not list((zoo.bare / "enginehouse").glob("*.json"))


@pytest.mark.slow
def test_a_pusher_does_not_wait_for_a_server_that_hangs(zoo: Repository, tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as deaf:
        zoo.to(f"http://127.0.0.1:{deaf.getsockname()[1]}/api")
        for k in range(5):
            run("branch", f"b{k}", zoo.commit(), folder=zoo.work)
        started = time.monotonic()
        assert "the push is kept" in zoo.push("--all")
        assert time.monotonic() - started < 8
    assert len(list((zoo.bare / "enginehouse").glob("*.json"))) == 6


def test_a_process_left_behind_tells_it_when_prefect_is_back(zoo: Repository, api: Api) -> None:
    run("config", "enginehouse.linger", "true", folder=zoo.bare)
    port = api.server_port
    api.shutdown()
    api.server_close()
    commit = zoo.commit()
    assert "no answer" in zoo.push("main")
    back = Api(port)
    try:
        deadline = time.monotonic() + 20
        while not back.runs and time.monotonic() < deadline:
            time.sleep(0.05)
        assert [each["parameters"]["commit"] for each in back.runs.values()] == [commit]
    finally:
        back.shutdown()
        back.server_close()


def test_without_an_address_the_push_is_kept_and_the_way_out_is_told(zoo: Repository) -> None:
    (zoo.bare.parent / "client.env").unlink()
    zoo.commit()
    assert "git config enginehouse.env FILE" in zoo.push("main")


@pytest.mark.slow
def test_twenty_pushes_are_handed_over_once_each(zoo: Repository, api: Api) -> None:
    commits = []
    for _ in range(20):
        commits.append(zoo.commit())
        zoo.push("main")
    assert [each["parameters"]["commit"] for each in api.runs.values()] == commits
    assert [each["parameters"]["before"] for each in api.runs.values()] == [None, *commits[:-1]]
    assert api.calls == 20
