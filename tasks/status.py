"""A commit's status on its host, GitHub's way and Gitea's (Forgejo's); told where a token is configured."""

from __future__ import annotations

import os
import re
import textwrap
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx

from tasks.repositories import Place, Repository
from tasks.stage import say

State = Literal["pending", "success", "failure", "error"]
LONGEST = 140  # characters of a description; GitHub refuses more
TRIES = 3


def tell(
    repository: Repository,
    commit: str,
    recipe: str,
    state: State,
    description: str,
    target: str | None = None,
) -> bool:
    """Post the status `enginehouse/RECIPE`; whether it arrived. A host that is away fails no run."""
    secret = os.environ.get(variable(repository), "") if repository.status else ""
    if not secret:
        return False
    content = {
        "state": state,
        "context": f"enginehouse/{recipe}"[:100],
        "description": textwrap.shorten(description, LONGEST, placeholder=" …"),
        "target_url": target or "",
    }
    for _ in range(TRIES):
        try:
            answer = httpx.post(
                address(repository, commit), json=content, headers=_headers(repository, secret), timeout=10
            )
        except httpx.HTTPError as error:
            problem = type(error).__name__
            continue
        if answer.status_code < 300:
            return True
        problem = f"HTTP {answer.status_code}"
        if answer.status_code < 500:
            break
    say(f"the commit's status could not be told to {urlsplit(_api(repository)).hostname}: {problem}")
    return False


def variable(repository: Repository) -> str:
    """The environment variable that holds the token of the repository's host."""
    host = urlsplit(_api(repository)).hostname or ""
    name = "github.com" if host == "api.github.com" else host
    return "ENGINEHOUSE_TOKEN_" + re.sub(r"\W", "_", name.upper())


def address(repository: Repository, commit: str) -> str:
    """Where the host takes a commit's status."""
    return f"{_api(repository)}/repos/{_place(repository).name}/statuses/{commit}"


def _api(repository: Repository) -> str:
    if repository.api:
        return repository.api.rstrip("/")
    site = _place(repository).site
    if repository.status == "github" and urlsplit(site).hostname in ("github.com", "ssh.github.com"):
        return "https://api.github.com"
    return f"{site}/api/{'v3' if repository.status == 'github' else 'v1'}"


def _place(repository: Repository) -> Place:
    assert repository.place, "with a status there is one"
    return repository.place


def _headers(repository: Repository, secret: str) -> dict[str, Any]:
    if repository.status == "github":
        return {"Authorization": f"Bearer {secret}", "Accept": "application/vnd.github+json"}
    return {"Authorization": f"token {secret}"}
