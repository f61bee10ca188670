"""Commit statuses, told to a server that records them; and the addresses of the hosts."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tasks import repositories
from tasks.errors import InputError
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
        ("git@github.com:me/zoo.git", "github", None, "https://api.github.com/repos/me/zoo", "GITHUB_COM"),
        (
            "ssh://git@ssh.github.com:443/me/zoo",
            "github",
            None,
            "https://api.github.com/repos/me/zoo",
            "GITHUB_COM",
        ),
        (
            "ssh://git@own.org:2222/me/zoo.git",
            "gitea",
            None,
            "https://own.org/api/v1/repos/me/zoo",
            "OWN_ORG",
        ),
        ("own.org:me/zoo", "gitea", None, "https://own.org/api/v1/repos/me/zoo", "OWN_ORG"),
        ("http://own.org:3000/me/zoo/", "gitea", None, "http://own.org:3000/api/v1/repos/me/zoo", "OWN_ORG"),
        ("https://own.org/git/me/zoo", "gitea", None, "https://own.org/git/api/v1/repos/me/zoo", "OWN_ORG"),
    ],
)
def test_where_a_status_goes(url: str, dialect: str, api: str | None, wanted: str, token: str) -> None:
    repository = Repository.model_validate({"name": "zoo", "url": url, "status": dialect, "api": api})
    assert address(repository, COMMIT) == f"{wanted}/statuses/{COMMIT}"
    assert variable(repository) == f"ENGINEHOUSE_TOKEN_{token}"


@pytest.mark.parametrize(
    "url",
    ["/srv/git/zoo.git", "file:///srv/git/zoo.git", "ssh://me@own.org/srv/git/zoo.git", "own.org:zoo.git"],
)
def test_the_first_address_of_a_host_names_the_repository(url: str) -> None:
    also = ["../zoo", "git@own.org:me/zoo.git", HUB]
    repository = Repository.model_validate({"name": "zoo", "url": url, "also": also, "status": "gitea"})
    assert address(repository, COMMIT) == f"https://own.org/api/v1/repos/me/zoo/statuses/{COMMIT}"


@pytest.mark.parametrize("url", ["/srv/git/zoo.git", "git@own.org:zoo.git", "https://own.org/zoo"])
def test_a_status_without_owner_and_name_is_the_user_s_to_fix(
    url: str, fresh_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ENGINEHOUSE_REPOSITORIES", raising=False)
    repositories.file().parent.mkdir(parents=True)
    entry = {"url": url, "status": "gitea", "api": "https://own.org/api/v1"}
    repositories.file().write_text(yaml.safe_dump({"zoo": entry}))
    with pytest.raises(InputError, match=r"(?s)OWNER/NAME.*also: \[https://HOST/OWNER/NAME\]"):
        repositories.find("zoo")
    repositories.file().write_text(yaml.safe_dump({"zoo": {"url": url}}))
    assert not tell(repositories.find("zoo"), COMMIT, "r", "success", "")


def test_the_example_in_the_docs_is_told_where_it_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "git.md").read_text(encoding="utf-8")
    example = text.split("# ~/.enginehouse/services/repositories.yaml")[1].split("\n", 1)[1].split("```")[0]
    (tmp_path / "list.yaml").write_text(example)
    monkeypatch.setenv("ENGINEHOUSE_REPOSITORIES", str(tmp_path / "list.yaml"))
    (found,) = repositories.configured()
    assert address(found, COMMIT) == f"https://git.example.org:3000/api/v1/repos/me/zoo/statuses/{COMMIT}"
    assert variable(found) == "ENGINEHOUSE_TOKEN_GIT_EXAMPLE_ORG"


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
