"""The receiver: what every way in shares. Run by `python -m infra up`, on loopback.

python -m uvicorn --factory infra.receiver.app:app --port 8090
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infra import keys, process
from infra.receiver import later, mlflow, prefect
from infra.receiver.prefect import Away

MOST = 4 << 20  # bytes of one request; a push of two thousand commits is about 3 MB
SLOWEST = 10  # seconds for a request to arrive whole
AGAIN = "5"  # seconds until a caller may try again
PAUSE = 60.0  # seconds between two looks at the logs

_log = logging.getLogger("uvicorn.error")


def app() -> Starlette:
    """Every way in, behind one size limit."""
    return Starlette(
        routes=[Route("/health", _health), *_ways_in()],
        middleware=[Middleware(Bounded)],
        exception_handlers={Away: _away, HTTPException: _refused, Exception: _broken},
        lifespan=_housekeeping,
    )


def _ways_in() -> list[Route]:
    found = mlflow.routes()
    if importlib.util.find_spec("infra.receiver.git"):
        found += importlib.import_module("infra.receiver.git").routes()
    return found


@asynccontextmanager
async def _housekeeping(_app: Starlette) -> AsyncIterator[None]:
    """The one process of ours that always runs keeps every service's log below its size."""
    keeping = asyncio.create_task(_bound_logs())
    loading = asyncio.create_task(prefect.warm())
    await later.resume()
    yield
    loading.cancel()
    keeping.cancel()


async def _bound_logs() -> None:
    while True:
        bound_logs()
        await asyncio.sleep(PAUSE)


def bound_logs() -> None:
    """Keep every service's log below its size; one that cannot be, on a full disk, is told of."""
    for log in keys.root().glob("*.log"):
        try:
            process.bound(log)
        except OSError as error:
            _log.warning("%s could not be kept below its size: %s", log.name, error)


class Bounded:
    """Reads a request's body before anyone else does: at most MOST bytes, within SLOWEST seconds."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 413 or 408, or hand the whole body on."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            async with asyncio.timeout(SLOWEST):
                body = await _body(scope, receive)
        except TimeoutError:
            return await _error(408, "the request came too slowly")(scope, receive, send)
        if body is None:
            return await _error(413, f"more than {MOST} bytes")(scope, receive, send)
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return waiting.pop() if waiting else await receive()

        return await self.app(scope, replay, send)


async def _body(scope: Scope, receive: Receive) -> bytes | None:
    """The body; None when it is too large, told by its header or by itself."""
    announced = dict(scope["headers"]).get(b"content-length", b"0")
    if not announced.isdigit() or int(announced) > MOST:
        return None
    body, more = bytearray(), True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MOST:
            return None
    return bytes(body)


async def _health(_request: Request) -> JSONResponse:
    return JSONResponse({"status": "ok"})


async def _away(_request: Request, error: Exception) -> Response:
    return _error(503, str(error), {"Retry-After": AGAIN})


async def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail, dict(error.headers or {}))


async def _broken(_request: Request, error: Exception) -> Response:
    return _error(500, f"the receiver failed ({type(error).__name__}); its log says more")


def _error(status: int, reason: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": reason}, status, headers)
