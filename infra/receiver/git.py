"""Webhooks of GitHub, Gitea and Forgejo, and GitLab: a signed push becomes one flow run of `push/commit`.

Only pushes to allowed branches of allowed repositories do (docs/git.md); a pull request never does, so a
fork's code does not run.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gidgethub import BadRequest, ValidationFailure
from gidgethub.sansio import Event
from standardwebhooks import Webhook
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from infra.receiver import later
from infra.receiver.replay import Memory
from tasks import git, repositories
from tasks.errors import InputError
from tasks.repositories import Repository

GITHUB, GITEA = "ENGINEHOUSE_GITHUB_WEBHOOK_SECRET", "ENGINEHOUSE_GITEA_WEBHOOK_SECRET"
GITLAB, GITLAB_SIGNING = "ENGINEHOUSE_GITLAB_WEBHOOK_SECRET", "ENGINEHOUSE_GITLAB_SIGNING_WEBHOOK_SECRET"
OLDEST = 3 * 86400  # seconds; GitHub lets a delivery be sent again for three days
SKEW = 600  # seconds that a sender's clock may be ahead

_memory = Memory()


@dataclass(frozen=True)
class Delivery:
    """One verified call: its id, whether it tells of a push, and what it says."""

    id: str
    push: bool
    data: dict[str, Any]


class Ignored(Exception):
    """A genuine call that starts nothing; says why."""


def routes() -> list[Route]:
    """The ways in for git hosts."""
    dialects = {"/github": github, "/gitea": gitea, "/gitlab": gitlab}
    return [Route(path, _taking(verify), methods=["POST"]) for path, verify in dialects.items()]


def github(body: bytes, headers: Mapping[str, str]) -> Delivery:
    """X-Hub-Signature-256 over the body; the old SHA-1 signature is not enough."""
    if not headers.get("x-hub-signature-256", "").startswith("sha256="):
        raise ValidationFailure("no SHA-256 signature")
    event = Event.from_http(headers, body, secret=_secret(GITHUB))
    delivery = Delivery(event.delivery_id, event.event == "push", _mapping(event.data))
    if delivery.push:
        _check_age(_mapping(delivery.data.get("repository")).get("pushed_at"))
    return delivery


def gitea(body: bytes, headers: Mapping[str, str]) -> Delivery:
    """X-Forgejo-Signature or X-Gitea-Signature: the body's HMAC in hex."""
    given = headers.get("x-forgejo-signature") or headers.get("x-gitea-signature", "")
    right = hmac.new(_secret(GITEA).encode(), body, hashlib.sha256).hexdigest()
    if not hmac.compare_digest(given.encode(), right.encode()):
        raise ValidationFailure("the signature is not ours")
    event = headers.get("x-forgejo-event") or headers["x-gitea-event"]
    number = headers.get("x-forgejo-delivery") or headers["x-gitea-delivery"]
    return Delivery(number, event == "push", _mapping(json.loads(body)))


def gitlab(body: bytes, headers: Mapping[str, str]) -> Delivery:
    """A signature with a time where a signing token is configured, otherwise X-Gitlab-Token."""
    signing = os.environ.get(GITLAB_SIGNING)
    if signing:
        key = signing if signing.startswith("whsec_") else signing.encode()
        Webhook(key).verify(body, dict(headers), json_parse=False)
    elif not hmac.compare_digest(headers.get("x-gitlab-token", "").encode(), _secret(GITLAB).encode()):
        raise ValidationFailure("the token is not ours")
    number = next(
        (headers[n] for n in ("webhook-id", "idempotency-key", "x-gitlab-event-uuid") if n in headers), ""
    )
    return Delivery(number, headers["x-gitlab-event"] == "Push Hook", _mapping(json.loads(body)))


def _taking(verify: Callable[[bytes, Mapping[str, str]], Delivery]) -> Callable[[Request], Any]:
    async def take(request: Request) -> JSONResponse:
        body = await request.body()
        try:
            delivery = _verified(verify, body, request.headers)
            parameters = read(delivery)
        except Ignored as why:
            return JSONResponse({"ignored": str(why)})
        marks = (f"{verify.__name__}:{delivery.id}".encode(), body)
        _memory.note(*marks)
        try:
            tags = ("push", f"branch:{parameters['branch']}", f"commit:{parameters['commit'][:7]}")
            call = later.Call("push/commit", parameters, git.push_key(**parameters), tags)
            run = await later.start(call)
        except BaseException:
            _memory.forget(*marks)
            raise
        return JSONResponse({"run": run} if run else {"kept": call.key}, 202)

    return take


def _verified(
    verify: Callable[[bytes, Mapping[str, str]], Delivery], body: bytes, headers: Mapping[str, str]
) -> Delivery:
    try:
        return verify(body, headers)
    except HTTPException:
        raise
    except (KeyError, RecursionError, json.JSONDecodeError, BadRequest) as error:
        raise HTTPException(400, "not a call that this way in understands") from error
    except Exception as error:  # whatever a forger's headers make the libraries raise
        raise HTTPException(401, "not signed with our secret, or too old") from error


def read(delivery: Delivery) -> dict[str, Any]:
    """The parameters of `push/commit`; raises `Ignored` with the reason."""
    if not delivery.push:
        raise Ignored("only pushes start runs")
    data = delivery.data
    ref, after, before = (data.get(name) for name in ("ref", "after", "before"))
    if not isinstance(ref, str) or not isinstance(after, str):
        raise HTTPException(400, "a push without ref or commit")
    if not ref.startswith("refs/heads/"):
        raise Ignored("only branches start runs")
    if re.fullmatch("0+", after):
        raise Ignored("the branch was deleted")
    try:
        commit, branch = git.commit_id(after), git.branch_name(ref.removeprefix("refs/heads/"))
        known = git.commit_id(before) if isinstance(before, str) and before.strip("0") else None
    except InputError as error:
        raise HTTPException(400, str(error)) from error
    repository = _allowed(data)
    if not repository.allows(branch):
        raise Ignored(f"{repository.name}: pushes to this branch start nothing")
    return {"repository": repository.name, "commit": commit, "before": known, "branch": branch}


def _allowed(data: dict[str, Any]) -> Repository:
    told = _mapping(data.get("repository")) | _mapping(data.get("project"))
    names = ("clone_url", "ssh_url", "html_url", "git_http_url", "git_ssh_url", "web_url")
    addresses = [told[name] for name in names if isinstance(told.get(name), str)]
    try:
        for repository in repositories.configured():
            if any(repository.known_as(address) for address in addresses):
                return repository
    except InputError as error:
        raise HTTPException(503, "the allow list of repositories cannot be read") from error
    raise Ignored("this repository may not start runs here")


def _check_age(pushed: object) -> None:
    age = time.time() - pushed if isinstance(pushed, (int, float)) else None
    if age is None or not -SKEW < age < OLDEST:
        raise HTTPException(401, "the push is too old, or does not say when it was")


def _secret(name: str) -> str:
    found = os.environ.get(name, "")
    if not found:
        raise HTTPException(403, f"this way in is closed: {name} is not set")
    return found


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
