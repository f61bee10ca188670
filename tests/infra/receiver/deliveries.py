"""Webhooks as GitHub, Gitea, Forgejo and GitLab send them, genuine or not."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
import uuid
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

from standardwebhooks import Webhook

SECRET = "correct horse battery staple"
SIGNING = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
ZEROS = "0" * 40
ADDRESS = "https://git.example.org/me/zoo.git"


@dataclass(frozen=True)
class Post:
    """One request: where to, what, and how it is signed."""

    path: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)

    def but(self, **headers: str) -> Post:
        """The same with other headers (`x_y` for `x-y`); an empty one is left out."""
        named = self.headers | {name.replace("_", "-"): value for name, value in headers.items()}
        return replace(self, headers={name: value for name, value in named.items() if value})


def push(after: str, before: str = ZEROS, ref: str = "refs/heads/main", **more: Any) -> dict[str, Any]:
    """What a push's payload says in all dialects."""
    repository = {"clone_url": ADDRESS, "full_name": "me/zoo", "pushed_at": int(time.time())}
    project = {"git_http_url": ADDRESS}
    return {"ref": ref, "before": before, "after": after, "repository": repository, "project": project} | more


def github(payload: Any, event: str = "push", secret: str = SECRET) -> Post:
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    headers = {
        "content-type": "application/json",
        "x-github-event": event,
        "x-github-delivery": str(uuid.uuid4()),
        "x-hub-signature-256": "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest(),
    }
    return Post("/github", body, headers)


def gitea(payload: Any, event: str = "push", secret: str = SECRET, name: str = "gitea") -> Post:
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    headers = {
        "content-type": "application/json",
        f"x-{name}-event": event,
        f"x-{name}-delivery": str(uuid.uuid4()),
        f"x-{name}-signature": hmac.new(secret.encode(), body, hashlib.sha256).hexdigest(),
    }
    return Post("/gitea", body, headers)


def gitlab(payload: Any, event: str = "Push Hook", secret: str = SECRET) -> Post:
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    number = str(uuid.uuid4())
    headers = {
        "content-type": "application/json",
        "x-gitlab-event": event,
        "x-gitlab-event-uuid": number,
        "idempotency-key": number,
        "x-gitlab-token": secret,
    }
    return Post("/gitlab", body, headers)


def signed_gitlab(payload: Any, age: float = 0, key: str = SIGNING) -> Post:
    """Newer GitLab: id, time and body are signed."""
    post = gitlab(payload).but(x_gitlab_token="")
    moment = datetime.fromtimestamp(time.time() - age, timezone.utc)
    signature = Webhook(key).sign("a-delivery", moment, post.body.decode())
    named = {"webhook-id": "a-delivery", "webhook-timestamp": str(int(moment.timestamp()))}
    return replace(post, headers=post.headers | named | {"webhook-signature": signature})
