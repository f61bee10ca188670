"""MLflow's webhook: an alias changed, so the promotion flow has something to look at."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping

from standardwebhooks import Webhook, WebhookVerificationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from infra.receiver import prefect

SECRET = "ENGINEHOUSE_MLFLOW_WEBHOOK_SECRET"
PATH = "/mlflow"
ALIAS = "champion"
REMEMBERED = 600.0  # seconds; a signature is good for 300 either way

_seen: dict[str, float] = {}


def routes() -> list[Route]:
    """The way in for MLflow."""
    return [Route(PATH, changed, methods=["POST"])]


async def changed(request: Request) -> JSONResponse:
    """Start `promote/champion` for the model whose alias changed."""
    body = await request.body()
    delivery = verified(body, request.headers)
    data = _payload(body)
    if data["alias"] != ALIAS:
        return JSONResponse({"ignored": f"the alias {data['alias']}"})
    _remember(delivery)
    try:
        run = await prefect.start("promote/champion", {"model": data["name"]}, f"mlflow-{delivery}")
    except BaseException:
        _seen.pop(delivery, None)  # MLflow's next try carries the same delivery id
        raise
    return JSONResponse({"run": run}, 202)


def verified(body: bytes, headers: Mapping[str, str]) -> str:
    """The delivery's id, when the signature is ours and fresh; otherwise 401."""
    secret = os.environ.get(SECRET, "").encode()
    if not secret:
        raise HTTPException(401, "the receiver has no secret for MLflow: make up gives it one")
    named = {
        f"webhook-{ours}": headers.get(f"x-mlflow-{theirs}", "")
        for ours, theirs in (("id", "delivery-id"), ("timestamp", "timestamp"), ("signature", "signature"))
    }
    try:
        # The signature as bytes: MLflow signs with the secret's characters, not with what they decode to.
        Webhook(secret).verify(body, named, json_parse=False)
    except (WebhookVerificationError, ValueError, RuntimeError) as error:
        raise HTTPException(401, "not signed by this MLflow, or too old") from error
    return named["webhook-id"]


def _payload(body: bytes) -> dict[str, str]:
    try:
        content = json.loads(body)
        if content["entity"] != "model_version_alias":
            raise ValueError(content["entity"])
        return {name: str(content["data"][name]) for name in ("name", "alias")}
    except (ValueError, TypeError, KeyError) as error:
        raise HTTPException(400, "not an alias event of MLflow") from error


def _remember(delivery: str) -> None:
    """Note the delivery; one that was seen before is refused."""
    now = time.monotonic()
    for old in [key for key, then in _seen.items() if now - then > REMEMBERED]:
        del _seen[old]
    if delivery in _seen:
        raise HTTPException(409, "this delivery was taken already")
    _seen[delivery] = now
