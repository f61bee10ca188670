"""The receiver without a Prefect server: whom it believes, what it says while Prefect is away."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from infra.receiver import app, mlflow, prefect

SECRET = "correct horse battery staple"


@pytest.fixture
def client(fresh_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setenv(mlflow.SECRET, SECRET)
    with TestClient(app.app(), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the receiver asked Prefect for."""
    calls: list[tuple[Any, ...]] = []

    async def start(*call: Any) -> str:
        calls.append(call)
        return "a-run"

    monkeypatch.setattr(prefect, "start", start)
    return calls


def event(alias: str = "champion", **changes: Any) -> bytes:
    data = {"name": "digits", "alias": alias, "version": "2"}
    return json.dumps({"entity": "model_version_alias", "action": "created", "data": data} | changes).encode()


def signed(body: bytes, delivery: str = "delivery-1", secret: str = SECRET, age: float = 0) -> dict[str, str]:
    """The headers that MLflow sends (mlflow/webhooks/delivery.py)."""
    moment = str(int(time.time() - age))
    digest = hmac.new(secret.encode(), f"{delivery}.{moment}.".encode() + body, hashlib.sha256).digest()
    return {
        "X-MLflow-Delivery-Id": delivery,
        "X-MLflow-Timestamp": moment,
        "X-MLflow-Signature": f"v1,{base64.b64encode(digest).decode()}",
    }


def post(client: TestClient, body: bytes, headers: dict[str, str]) -> int:
    return client.post("/mlflow", content=body, headers=headers).status_code


def test_a_signed_alias_starts_the_promotion_of_its_model_once(
    client: TestClient, started: list[Any]
) -> None:
    body = event()
    headers = signed(body, "only-once")
    assert post(client, body, headers) == 202
    assert started == [("promote/champion", {"model": "digits"}, "mlflow-only-once")]
    assert post(client, body, headers) == 409
    assert len(started) == 1


def test_another_alias_starts_nothing(client: TestClient, started: list[Any]) -> None:
    body = event("candidate")
    assert post(client, body, signed(body)) == 200
    assert not started


FORGERIES: dict[str, Callable[[], dict[str, str]]] = {
    "no headers": dict,
    "another secret": lambda: signed(event(), secret="another secret"),
    "another body": lambda: signed(event("other")),
    "too old": lambda: signed(event(), age=301),
    "too early": lambda: signed(event(), age=-360),
    "not base64": lambda: signed(event()) | {"X-MLflow-Signature": "v1,not base64!"},
    "no comma": lambda: signed(event()) | {"X-MLflow-Signature": "v1"},
    "another scheme": lambda: signed(event()) | {"X-MLflow-Signature": "v2,AAAA"},
    "no time": lambda: signed(event()) | {"X-MLflow-Timestamp": "nan"},
    "another id": lambda: signed(event()) | {"X-MLflow-Delivery-Id": "another"},
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_what_mlflow_did_not_sign_just_now_starts_nothing(
    client: TestClient, started: list[Any], forgery: str
) -> None:
    assert post(client, event(), FORGERIES[forgery]()) == 401
    assert not started


def test_without_a_secret_nobody_is_believed(
    client: TestClient, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(mlflow.SECRET)
    assert post(client, event(), signed(event(), secret="")) == 401
    assert not started


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b"null", event(entity="prompt"), event(data=[])])
def test_what_is_signed_but_not_an_alias_event_is_malformed(
    client: TestClient, started: list[Any], body: bytes
) -> None:
    assert post(client, body, signed(body)) in (400, 401)
    assert not started


def test_while_prefect_is_away_the_caller_is_asked_to_come_again(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_call: Any) -> str:
        raise prefect.Away("Prefect does not answer")

    body = event()
    headers = signed(body, "patient")
    monkeypatch.setattr(prefect, "start", away)
    answer = client.post("/mlflow", content=body, headers=headers)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, app.AGAIN)

    async def back(*_call: Any) -> str:
        return "a-run"

    monkeypatch.setattr(prefect, "start", back)
    assert post(client, body, headers) == 202  # MLflow tries again with the same delivery id


def test_prefect_away_is_noticed_for_real(fresh_home: Path) -> None:
    """Nothing listens on port 1."""
    import subprocess
    import sys

    code = (
        "import asyncio\nfrom infra.receiver import prefect\n"
        "try: asyncio.run(prefect.start('promote/champion', {}, 'key'))\n"
        "except prefect.Away as away: print('away:', away)"
    )
    environment = {
        "PATH": "/usr/bin",
        "PREFECT_API_URL": "http://127.0.0.1:1/api",
        "PREFECT_HOME": str(fresh_home / "prefect"),
        "PREFECT_CLIENT_MAX_RETRIES": "0",
    }
    root = Path(app.__file__).parents[2]
    told = subprocess.run(
        (sys.executable, "-c", code), cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert told.stdout.startswith("away: "), told


def test_too_much_is_refused_unread_whatever_the_way_in(client: TestClient, started: list[Any]) -> None:
    big = b"x" * (app.MOST + 1)
    for path in ("/mlflow", "/health", "/nowhere"):
        assert client.post(path, content=big).status_code == 413
    parts = (b"x" * 65536 for _ in range(app.MOST // 65536 + 2))
    assert client.post("/mlflow", content=parts).status_code == 413  # no length announced
    assert client.post("/mlflow", content=b"", headers={"Content-Length": "-1"}).status_code == 413
    assert not started


def test_it_says_that_it_is_there(client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/mlflow").status_code == 405
    assert client.get("/nowhere").json() == {"error": "Not Found"}


def test_an_error_tells_a_caller_nothing(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_call: Any) -> str:
        raise ZeroDivisionError("/a/path/of/ours")

    monkeypatch.setattr(prefect, "start", broken)
    body = event()
    answer = client.post("/mlflow", content=body, headers=signed(body, "broken"))
    assert answer.status_code == 500
    assert "path" not in answer.text
