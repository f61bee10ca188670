"""Up, down, status: the order in which services start, answer and are told things."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from infra import apply, database, keys, process, recover, services
from infra.process import Command
from infra.setup import HOST, Setup, inherited
from tasks.errors import InputError

PATIENCE = 180.0  # seconds for a service to answer; a first start makes databases


def up(setup: Setup, tell: Callable[[str], None]) -> None:
    """Bring back what is missing or was told something else; what runs as it should is left alone."""
    began = time.time()
    search_path = database.prepare(setup.database) if setup.database else ""
    if setup.auth:
        services.write_auth_config(setup)
    commands = services.commands(setup, search_path)
    _free(setup, commands)
    keys.write(setup.folder / "client.env", setup.client())
    os.environ.update(setup.client())
    for name in ("prefect", "mlflow", "receiver"):
        if not _as_told(setup, commands[name]):
            tell(f"starting {name} …")
            process.end(name, setup.folder)
            _start(setup, commands[name])
    _wait(setup, "prefect", lambda: _answers(setup, "prefect"))
    tell("applying infra/prefect.yaml …")
    apply.prefect()
    apply.deployments()
    fresh = _worker(setup, commands["worker"])
    _wait(setup, "mlflow", lambda: _answers(setup, "mlflow"))
    apply.webhook(setup)
    _wait(setup, "receiver", lambda: _answers(setup, "receiver"))
    _wait(setup, "worker", lambda: _polls(since=began if fresh else 0))


def down(folder: Path) -> None:
    """End the services, the one that uses the others first; clients are on their own again."""
    (folder / "client.env").unlink(missing_ok=True)
    for name in reversed(services.NAMES):
        process.end(name, folder)


def addresses(setup: Setup) -> str:
    """Where to look, once all answers."""
    lines = [f"{name:9} {setup.url(name)}" for name in services.HEALTH]
    lines += [f"models    {setup.url('mlflow')}/#/models"]  # MLflow's front page does not lead there
    lines += [f"state     {setup.home}", f"logs      {setup.folder}/*.log"]
    if setup.auth:
        lines.append(f"passwords {setup.folder / 'secrets.env'} (MLflow's user is admin)")
    return "\n".join(lines)


def status(setup: Setup) -> tuple[list[str], bool]:
    """A line for each service, and whether all run and answer."""
    lines, well = [], True
    os.environ.update(setup.client() | {"PREFECT_CLIENT_MAX_RETRIES": "0"})
    for name in services.NAMES:
        record = process.running(name, setup.folder)
        answers = bool(record) and _healthy(setup, name)
        size = process.memory(process.members(name, setup.folder)) >> 20
        word = "up" if answers else "does not answer" if record else "down"
        place = setup.url(name) if name in services.HEALTH else f"pool {services.POOL}"
        told = f"pid {record.pid}, {size} MiB" if record else ""
        lines.append(f"{name:9} {word:16} {place:24} {told}".rstrip())
        well = well and answers
    return lines, well


def _free(setup: Setup, commands: dict[str, Command]) -> None:
    """Raise InputError when a port that we need is someone else's."""
    for name in services.HEALTH:
        if process.running(name, setup.folder) or process.members(name, setup.folder):
            continue
        port = setup.ports[name]
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError as error:
                raise InputError(
                    f"port {port} is taken by another program, and {name} needs it: end that one, or choose "
                    f"another port with {name.upper()}_PORT=… make up"
                ) from error


def _worker(setup: Setup, command: Command) -> bool:
    """Start the worker unless it runs as told; what an earlier one left undone is handed out first."""
    if _as_told(setup, command):
        return False
    if process.running(command.name, setup.folder):
        process.end(command.name, setup.folder)  # a dead worker's runs may finish; a living one's start again
    recover.orphans(setup.folder)
    _start(setup, command)
    return True


def _as_told(setup: Setup, command: Command) -> bool:
    record = process.running(command.name, setup.folder)
    return record is not None and record.told == process.told(command, _secret(setup))


def _start(setup: Setup, command: Command) -> None:
    process.start(command, setup.folder, _secret(setup), inherited())


def _secret(setup: Setup) -> str:
    return setup.keys["MLFLOW_FLASK_SERVER_SECRET_KEY"]


def _wait(setup: Setup, name: str, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ready():
        ended = process.running(name, setup.folder) is None
        if ended or time.monotonic() > deadline:
            word = "ended at once" if ended else f"does not answer after {PATIENCE:.0f} s"
            log = setup.folder / f"{name}.log"
            last = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-15:])
            raise InputError(f"{name} {word}; {log} ends with:\n{last}")
        time.sleep(0.2)


def _healthy(setup: Setup, name: str) -> bool:
    return _answers(setup, name) if name in services.HEALTH else _polls()


def _answers(setup: Setup, name: str) -> bool:
    try:
        answer = httpx.get(setup.url(name) + services.HEALTH[name], auth=_account(setup, name), timeout=5)
        return answer.status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def _account(setup: Setup, name: str) -> tuple[str, str] | None:
    if not setup.auth or name != "prefect":
        return None
    user, word = setup.keys["PREFECT_SERVER_API_AUTH_STRING"].split(":", 1)
    return (user, word)


def _polls(since: float = 0) -> bool:
    """Whether the worker asked for work, at all or since it was started."""
    from prefect.client.orchestration import get_client

    try:
        with get_client(sync_client=True) as client:
            found = client.read_workers_for_work_pool(services.POOL)
    except httpx.HTTPError:
        return False
    seen = [each.last_heartbeat_time for each in found if each.name == services.WORKER]
    return any(when is not None and when.timestamp() > since for when in seen)
