"""The git hosts' ways in, without a Prefect server: whom they believe, and what starts nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from infra.receiver import app, git, later, prefect, replay
from tests.infra.receiver.deliveries import (
    SECRET,
    SIGNING,
    ZEROS,
    Post,
    gitea,
    github,
    gitlab,
    push,
    signed_gitlab,
)

A, B = "a" * 40, "b" * 40
DIALECTS: dict[str, Callable[..., Post]] = {
    "github": github,
    "gitea": gitea,
    "forgejo": lambda *a, **k: gitea(*a, **k, name="forgejo"),
    "gitlab": gitlab,
}


@pytest.fixture
def client(fresh_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    for name in (git.GITHUB, git.GITEA, git.GITLAB):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setattr(git, "_memory", replay.Memory())
    (fresh_home / "services").mkdir(parents=True)
    (fresh_home / "services" / "repositories.yaml").write_text(
        "zoo: {url: /srv/zoo.git, also: [git@git.example.org:me/zoo.git], branches: [main, 'release/*']}"
    )
    with TestClient(app.app(), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The parameters of the runs that the receiver asked Prefect for."""
    calls: list[dict[str, Any]] = []

    async def start(deployment: str, parameters: dict[str, Any], key: str, tags: Any = ()) -> str:
        assert deployment == "push/commit"
        calls.append(parameters)
        return "a-run"

    monkeypatch.setattr(prefect, "start", start)
    return calls


def send(client: TestClient, post: Post) -> int:
    return client.post(post.path, content=post.body, headers=post.headers).status_code


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_genuine_push_starts_one_run(client: TestClient, started: list[Any], dialect: str) -> None:
    assert send(client, DIALECTS[dialect](push(A, B))) == 202
    assert started == [{"repository": "zoo", "commit": A, "before": B, "branch": "main"}]
    assert (
        send(client, DIALECTS[dialect](push(B, ZEROS, "refs/heads/release/$(x) `y`".replace(" ", "")))) == 202
    )
    assert started[1] == {"repository": "zoo", "commit": B, "before": None, "branch": "release/$(x)`y`"}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_delivery_is_taken_once_whatever_it_calls_itself(
    client: TestClient, started: list[Any], dialect: str
) -> None:
    post = DIALECTS[dialect](push(A))
    assert [send(client, post), send(client, post)] == [202, 409]
    renamed = {
        name: "another" for name in post.headers if "delivery" in name or name.endswith(("key", "uuid"))
    }
    assert send(client, Post(post.path, post.body, post.headers | renamed)) == 409
    assert len(started) == 1


FORGED: dict[str, Callable[[], Post]] = {
    "another secret": lambda: github(push(A), secret="another"),
    "no secret": lambda: github(push(A), secret=""),
    "no signature": lambda: github(push(A)).but(x_hub_signature_256=""),
    "only SHA-1": lambda: github(push(A)).but(x_hub_signature_256="", x_hub_signature="sha1=" + "0" * 40),
    "SHA-1 in its place": lambda: github(push(A)).but(x_hub_signature_256="sha1=" + "0" * 40),
    "another body": lambda: Post("/github", github(push(B)).body, github(push(A)).headers),
    "a body with a space more": lambda: Post("/github", github(push(A)).body + b" ", github(push(A)).headers),
    "not hex": lambda: github(push(A)).but(x_hub_signature_256="sha256=zz"),
    "Gitea, another secret": lambda: gitea(push(A), secret="another"),
    "Gitea, none": lambda: gitea(push(A)).but(x_gitea_signature=""),
    "Gitea, GitHub's form": lambda: gitea(push(A)).but(x_gitea_signature="sha256=" + "0" * 64),
    "Forgejo, bad beside Gitea's good": lambda: gitea(push(A)).but(x_forgejo_signature="0" * 64),
    "GitLab, another token": lambda: gitlab(push(A), secret="another"),
    "GitLab, none": lambda: gitlab(push(A)).but(x_gitlab_token=""),
    "too old": lambda: github(push(A, repository={"clone_url": "x", "pushed_at": time.time() - 4 * 86400})),
    "from the future": lambda: github(
        push(A, repository={"clone_url": "x", "pushed_at": time.time() + 7200})
    ),
    "without a time": lambda: github(push(A, repository={"clone_url": "x"})),
}


@pytest.mark.parametrize("forgery", FORGED)
def test_what_is_not_signed_or_too_old_starts_nothing(
    client: TestClient, started: list[Any], forgery: str
) -> None:
    assert send(client, FORGED[forgery]()) == 401
    assert not started


def test_a_signature_that_is_not_ascii_is_a_wrong_one(client: TestClient, started: list[Any]) -> None:
    for post, name in ((github(push(A)), "x-hub-signature-256"), (gitea(push(A)), "x-gitea-signature"),
                       (gitlab(push(A)), "x-gitlab-token")):  # fmt: skip
        headers = {k.encode(): v.encode() for k, v in post.headers.items()} | {
            name.encode(): "sha256=é".encode()
        }
        assert client.post(post.path, content=post.body, headers=headers).status_code == 401
    assert not started


def test_gitlab_with_a_signing_token_wants_a_fresh_signature(
    client: TestClient, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(git.GITLAB_SIGNING, SIGNING)
    assert send(client, gitlab(push(A))) == 401  # the old token is not enough any more
    assert send(client, signed_gitlab(push(A), age=301)) == 401
    assert send(client, signed_gitlab(push(A), age=-301)) == 401
    assert send(client, signed_gitlab(push(A)).but(webhook_id="another")) == 401
    assert send(client, signed_gitlab(push(A)).but(webhook_signature="v1")) == 401
    assert not started
    assert [send(client, post) for post in [signed_gitlab(push(A))] * 2] == [202, 409]


@pytest.mark.parametrize("name", [git.GITHUB, git.GITEA, git.GITLAB])
def test_a_way_in_without_a_secret_is_closed(
    client: TestClient, started: list[Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv(name)
    make = {git.GITHUB: github, git.GITEA: gitea, git.GITLAB: gitlab}[name]
    assert send(client, make(push(A), secret="")) in (401, 403)
    assert send(client, make(push(A))) == 403
    assert not started


FORK = {"clone_url": "https://git.example.org/you/zoo.git", "pushed_at": 0, "fork": True}
EVIL = "https://evil.example.org/git.example.org/me/zoo.git"
NOTHING: dict[str, Callable[[], Post]] = {
    "a tag": lambda: github(push(A, ref="refs/tags/v1")),
    "a deleted branch": lambda: github(push(ZEROS, A)),
    "a deleted branch, GitLab": lambda: gitlab(push(ZEROS, A)),
    "another branch": lambda: github(push(A, ref="refs/heads/topic")),
    "a branch that only begins so": lambda: github(push(A, ref="refs/heads/main2")),
    "a pull request's ref": lambda: github(push(A, ref="refs/pull/1/head")),
    "a ping": lambda: github({"zen": "x"}, event="ping"),
    "a fork's pull request": lambda: github({"action": "opened", "number": 1}, "pull_request"),
    "the same with secrets": lambda: github(push(A), event="pull_request_target"),
    "a fork's merge request": lambda: gitlab(push(A), event="Merge Request Hook"),
    "a tag, GitLab": lambda: gitlab(push(A), event="Tag Push Hook"),
    "a fork's own push": lambda: gitea(push(A, repository=FORK, project={})),
    "an address that only ends so": lambda: gitea(push(A, repository={"clone_url": EVIL}, project={})),
}  # fmt: skip


@pytest.mark.parametrize("what", NOTHING)
def test_genuine_calls_that_start_nothing(client: TestClient, started: list[Any], what: str) -> None:
    post = NOTHING[what]()
    answer = client.post(post.path, content=post.body, headers=post.headers)
    assert answer.status_code == 200
    assert answer.json()["ignored"]
    assert not started


MALFORMED = [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'"' + b"x" * 1000 + b'"',
    b'{"ref": 1, "after": 2}', b'{"ref": "refs/heads/main", "after": "HEAD"}',
]  # fmt: skip
BRANCHES = ["a b", "a\nb", "../main", "main/../x", "a\x00", "", "main.lock", "a" * 2000]


@pytest.mark.parametrize("make", [github, gitea, gitlab])
def test_what_is_signed_and_makes_no_sense_is_refused(
    client: TestClient, started: list[Any], make: Callable[..., Post]
) -> None:
    for body in MALFORMED:
        assert send(client, make(body)) in (400, 401), body[:20]
    for after in ("", "abc", "A" * 40, "a" * 64, "a" * 39 + "\n", None, 7):
        assert send(client, make(push(after))) == 400, after
    for branch in BRANCHES:
        assert send(client, make(push(A, ref=f"refs/heads/{branch}"))) == 400, branch
    assert send(client, make(push(A)).but(content_type="text/plain; charset=bogus")) in (400, 401, 202)
    assert len(started) <= 1  # two of the three do not care what the body calls itself


def test_what_is_too_large_is_refused_before_it_is_read(client: TestClient, started: list[Any]) -> None:
    assert send(client, github(push(A, padding="x" * (app.MOST + 1)))) == 413
    assert send(client, github(push(A)).but(content_length="9" * 30)) in (400, 413)
    assert not started


def test_while_prefect_is_away_the_sender_is_asked_to_come_again(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.client.orchestration import PrefectClient

    monkeypatch.setattr("prefect.get_client", lambda: PrefectClient("http://127.0.0.1:9/api"))
    monkeypatch.setattr(later, "SOON", 9)  # a refused connection needs a millisecond, an idle machine given
    post = github(push(A))
    answer = client.post(post.path, content=post.body, headers=post.headers)
    assert answer.status_code == 503
    assert answer.headers["retry-after"]

    async def start(*_call: Any) -> str:
        return "a-run"

    monkeypatch.setattr(prefect, "start", start)
    assert send(client, post) == 202  # the same delivery again is not a replay


def test_who_calls_does_not_wait_for_a_slow_prefect_and_nothing_is_lost(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[str] = []

    async def start(_deployment: str, _parameters: Any, key: str, _tags: Any) -> str:
        tries.append(key)
        await asyncio.sleep(0.3)
        if len(tries) == 1:
            raise prefect.Away("the database is locked")
        return "a-run"

    monkeypatch.setattr(prefect, "start", start)
    monkeypatch.setattr(later, "PAUSES", (0.05,))
    began = time.monotonic()
    assert send(client, github(push(A))) == 202
    assert time.monotonic() - began < 0.25
    assert len(list(later.folder().glob("*.json"))) == 1
    deadline = time.monotonic() + 10
    while list(later.folder().glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(tries) == 2
    assert len(set(tries)) == 1


def test_what_was_kept_is_handed_over_by_the_next_process(client: TestClient, started: list[Any]) -> None:
    call = later.Call("push/commit", {"commit": A}, "key", ("push",))
    later._keep(call)
    with TestClient(app.app()):
        deadline = time.monotonic() + 10
        while list(later.folder().glob("*.json")) and time.monotonic() < deadline:
            time.sleep(0.02)
    assert started == [{"commit": A}]


def test_an_allow_list_that_cannot_be_read_loses_nothing(
    client: TestClient, started: list[Any], fresh_home: Path
) -> None:
    (fresh_home / "services" / "repositories.yaml").write_text("zoo: {uurl: x}")
    assert send(client, github(push(A))) == 503
    assert not started


def test_the_memory_of_deliveries_is_bounded() -> None:
    memory = replay.Memory(most=4)
    for k in range(100):
        memory.note(b"%d" % k)
    assert len(memory._seen) == 4
