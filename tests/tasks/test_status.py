"""Commit statuses, told to a server that records them; and the addresses of the hosts."""

from __future__ import annotations

import pytest

from tasks.repositories import Repository
from tasks.status import address, tell, variable
from tests.infra.statuses import Statuses

COMMIT = "a" * 40


HUB, OWN = "https://github.com/me/zoo.git", "https://x:y@git.example.org/me/zoo"


@pytest.mark.parametrize(
    ("url", "dialect", "api", "wanted", "token"),
    [
        (HUB, "github", None, "https://api.github.com/repos/me/zoo", "GITHUB_COM"),
        (OWN, "gitea", None, "https://git.example.org/api/v1/repos/me/zoo", "GIT_EXAMPLE_ORG"),
        (OWN, "github", None, "https://git.example.org/api/v3/repos/me/zoo", "GIT_EXAMPLE_ORG"),
        (OWN, "gitea", "http://b:1/api/v1/", "http://b:1/api/v1/repos/me/zoo", "B"),
    ],
)
def test_where_a_status_goes(url: str, dialect: str, api: str | None, wanted: str, token: str) -> None:
    repository = Repository.model_validate({"name": "zoo", "url": url, "status": dialect, "api": api})
    assert address(repository, COMMIT) == f"{wanted}/statuses/{COMMIT}"
    assert variable(repository) == f"ENGINEHOUSE_TOKEN_{token}"


@pytest.mark.parametrize(("dialect", "scheme"), [("github", "Bearer"), ("gitea", "token")])
def test_a_status_is_told_in_both_dialects(
    dialect: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Statuses(503) as host:  # away for a moment
        repository = _repository(dialect, host)
        monkeypatch.setenv(variable(repository), "a-token")
        assert tell(repository, COMMIT, "r", "failure", "why " * 100, "http://x/run")
    (told,) = host.told
    assert told["authorization"] == f"{scheme} a-token"
    assert told["state"] == "failure"
    assert told["target_url"] == "http://x/run"
    assert len(told["description"]) <= 140


def test_nothing_is_told_without_a_token_or_a_dialect() -> None:
    with Statuses() as host:
        assert not tell(_repository("gitea", host), COMMIT, "r", "success", "")
        assert not tell(Repository(name="zoo", url=host.url), COMMIT, "r", "success", "")
    assert not host.told


@pytest.mark.parametrize("answers", [(401,), (500, 500, 500)])
def test_a_host_that_refuses_fails_no_run_and_no_secret_is_said(
    answers: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Statuses(*answers) as host:
        repository = _repository("gitea", host)
        monkeypatch.setenv(variable(repository), "a-token")
        assert not tell(repository, COMMIT, "r", "success", "")
    said = capsys.readouterr().err
    assert f"HTTP {answers[0]}" in said
    assert "a-token" not in said


def _repository(dialect: str, host: Statuses) -> Repository:
    entry = {"name": "zoo", "url": "https://git.example.org/me/zoo.git", "status": dialect, "api": host.url}
    return Repository.model_validate(entry)
