"""Services on free ports with a state folder of their own, and three versions to promote."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil

from infra import process
from tests.conftest import BRIEF

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = "digits-cnn"
PASSED, OTHER, REFUSED = "1", "2", "3"
RECIPES = {
    "promoted": [],
    "registered": ["promote=manual", "benchmark.rounds=7"],
    "refused": ["gate.max_size_ratio=0.01"],
}
OPTIMIZE = (
    "from flows.optimize import optimize\nprint('verdict', optimize('digits-cnn-int8-ptq', {!r}).verdict)"
)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def until(what: Callable[[], Any], seconds: float = 90.0) -> Any:
    """What it returns once that is true; fails when it never is."""
    deadline = time.monotonic() + seconds
    while True:
        found = what()
        if found:
            return found
        assert time.monotonic() < deadline, f"not so within {seconds:.0f} s: {what}"
        time.sleep(0.2)


class Stack:
    """The services of one state folder."""

    def __init__(self, home: Path, **chosen: str) -> None:
        self.home = home
        ports = free_ports(3)
        names = ("PREFECT_PORT", "MLFLOW_PORT", "RECEIVER_PORT")
        self.ports = dict(zip(names, ports, strict=True))
        self.chosen = chosen
        self.mlflow = f"http://127.0.0.1:{self.ports['MLFLOW_PORT']}"
        self.prefect = f"http://127.0.0.1:{self.ports['PREFECT_PORT']}"
        self.receiver = f"http://127.0.0.1:{self.ports['RECEIVER_PORT']}"

    def environment(self) -> dict[str, str]:
        """A clean shell on this state folder."""
        unset = ("PREFECT_", "MLFLOW_", "ENGINEHOUSE_", "DATABASE_URL", "AUTH")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(unset)}
        chosen = {name: str(port) for name, port in self.ports.items()} | self.chosen
        return kept | chosen | {"ENGINEHOUSE_HOME": str(self.home), "ENGINEHOUSE_TRACEBACK": "1"}

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A Python command of this checkout."""
        return subprocess.run(
            (sys.executable, *arguments), cwd=ROOT, env=self.environment() | environment,
            capture_output=True, text=True, check=False, timeout=900,
        )  # fmt: skip

    def up(self, **chosen: str) -> str:
        self.chosen |= chosen
        done = self.run("-m", "infra", "up")
        assert done.returncode == 0, done.stdout + done.stderr + self.logs()
        return done.stdout

    def down(self) -> None:
        done = self.run("-m", "infra", "down")
        assert done.returncode == 0, done.stderr

    def status(self) -> dict[str, str]:
        """The word for each service, as `status` prints it."""
        lines = self.run("-m", "infra", "status").stdout.splitlines()
        return {line.split()[0]: "up" if line.split()[1] == "up" else "not up" for line in lines}

    def optimize(self, *verdicts: str) -> None:
        """Register a version for each verdict: 1 promoted, 2 registered, 3 refused."""
        self.home.mkdir(parents=True, exist_ok=True)
        code = "\n".join(OPTIMIZE.format([*BRIEF, *RECIPES[verdict]]) for verdict in verdicts)
        done = self.run("-c", code)
        words = [line for line in done.stdout.splitlines() if line.startswith("verdict")]
        assert words == [f"verdict {verdict}" for verdict in verdicts], (done.stdout + done.stderr)[-3000:]

    def client(self) -> dict[str, str]:
        """What `up` wrote for clients."""
        lines = (self.home / "services" / "client.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def api(self, method: str, path: str, **call: Any) -> httpx.Response:
        """MLflow's REST API, with the password where there is one."""
        told = self.client()
        account = (told.get("MLFLOW_TRACKING_USERNAME", ""), told.get("MLFLOW_TRACKING_PASSWORD", ""))
        url = f"{self.mlflow}/api/2.0/mlflow/{path}"
        return httpx.request(method, url, auth=account if account[0] else None, timeout=30, **call)

    def set_alias(self, version: str) -> None:
        body = {"name": MODEL, "alias": "champion", "version": version}
        self.api("POST", "registered-models/alias", json=body).raise_for_status()

    def alias(self) -> str | None:
        asked = {"name": MODEL, "alias": "champion"}
        answer = self.api("GET", "registered-models/alias", params=asked)
        return str(answer.json()["model_version"]["version"]) if answer.is_success else None

    def tags(self, version: str) -> dict[str, str]:
        asked = {"name": MODEL, "version": version}
        found = self.api("GET", "model-versions/get", params=asked).raise_for_status().json()
        return {tag["key"]: tag["value"] for tag in found["model_version"]["tags"]}

    def serves(self) -> str | None:
        """The version that the serving folder's link names."""
        link = self.home / "serving" / MODEL / "current"
        return os.readlink(link).rsplit("/", 1)[-1] if link.is_symlink() else None

    def agree(self, version: str) -> bool:
        """Alias and deployment are on this version."""
        return (self.alias(), self.serves()) == (version, version)

    def moves(self) -> list[str]:
        """What the ledger holds, oldest first, as `event from>to`."""
        done = self.run("-m", "flows", "history", MODEL)
        rows = [re.split(r"\s{2,}", line) for line in done.stdout.splitlines() if line[:1].isdigit()]
        return [f"{row[2]} {row[4]}>{row[5]}" for row in rows if len(row) > 5][::-1]

    @contextmanager
    def orchestration(self) -> Iterator[SyncPrefectClient]:
        """Prefect's client, on this stack's server."""
        from prefect.client.orchestration import get_client
        from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

        told = self.client()
        auth = {PREFECT_API_AUTH_STRING: told.get("PREFECT_API_AUTH_STRING")}
        with (
            temporary_settings({PREFECT_API_URL: told["PREFECT_API_URL"]} | auth),
            get_client(sync_client=True) as client,
        ):
            yield client

    def processes(self, name: str) -> list[psutil.Process]:
        """Every process of a service."""
        return process.members(name, self.home / "services")

    def kill(self, *names: str) -> None:
        """As the kernel does it when memory is out."""
        found = [each for name in names for each in self.processes(name)]
        assert found
        for each in found:
            each.kill()
        psutil.wait_procs(found, 5)

    def logs(self) -> str:
        """The end of every service's log."""
        found = sorted((self.home / "services").glob("*.log"))
        return "".join(f"\n--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in found)
