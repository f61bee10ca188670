"""Detached processes that are ours by a mark in their environment, so that no stranger is ever ended."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

MARK = "ENGINEHOUSE_SERVICE"
LOG_MOST = 8 << 20  # bytes; one older log of that size is kept beside it
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Command:
    """What to run, under which name, and what it must find in its environment."""

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Record:
    """A started process: its id, when it started (ids are used again), and what it was told."""

    pid: int
    started: float
    told: str


def start(command: Command, folder: Path, secret: str, inherited: Mapping[str, str]) -> None:
    """Start it in a session of its own, its output appended to NAME.log."""
    log = folder / f"{command.name}.log"
    bound(log)
    environment = dict(inherited) | dict(command.environment) | {MARK: _mark(command.name, folder)}
    with os.fdopen(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab") as out:
        child = subprocess.Popen(
            command.arguments, env=environment, cwd=ROOT, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    record = Record(child.pid, psutil.Process(child.pid).create_time(), told(command, secret))
    place = folder / f"{command.name}.json"
    place.with_suffix(".part").write_text(json.dumps(asdict(record)))
    place.with_suffix(".part").replace(place)


def told(command: Command, secret: str) -> str:
    """A digest of command and environment that gives nothing of them away."""
    content = json.dumps([command.arguments, sorted(command.environment.items())])
    return hmac.new(secret.encode(), content.encode(), hashlib.sha256).hexdigest()


def running(name: str, folder: Path) -> Record | None:
    """The record of a service whose process lives; None for one that ended, or whose id was used again."""
    try:
        record = Record(**json.loads((folder / f"{name}.json").read_text()))
        process = psutil.Process(record.pid)
        same = abs(process.create_time() - record.started) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, ValueError, TypeError, psutil.NoSuchProcess):
        return None
    return record if same and process in members(name, folder) else None


def members(name: str, folder: Path) -> list[psutil.Process]:
    """Every live process that carries the service's mark: itself and what it started."""
    mark, found = _mark(name, folder), []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                found.append(process)
        except (psutil.Error, OSError):
            continue  # gone meanwhile, or another user's
    return found


def end(name: str, folder: Path, patience: float = 15.0) -> None:
    """Ask the service to end, then what it started, then make them; its record goes last."""
    record = running(name, folder)
    leader = [process for process in members(name, folder) if record and process.pid == record.pid]
    _terminate(leader, patience)
    _terminate(members(name, folder), 5.0)
    for process in members(name, folder):
        _quietly(process, kill=True)
    psutil.wait_procs(members(name, folder), 5.0)
    (folder / f"{name}.json").unlink(missing_ok=True)


def bound(log: Path) -> None:
    """Keep a log below its size: its content moves to NAME.log.1, the file itself stays open."""
    if not log.exists() or log.stat().st_size < LOG_MOST:
        return
    with log.open("rb") as source, log.with_suffix(".log.1").open("wb") as older:
        source.seek(-LOG_MOST, os.SEEK_END)
        older.write(source.read(LOG_MOST))
    os.truncate(log, 0)


def memory(processes: list[psutil.Process]) -> int:
    """Bytes of memory: what is shared counts by its share (PSS)."""
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except (psutil.Error, OSError, AttributeError):
            continue
    return total


def _mark(name: str, folder: Path) -> str:
    return f"{name}@{folder}"


def _terminate(processes: list[psutil.Process], patience: float) -> None:
    for process in processes:
        _quietly(process, kill=False)
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and any(_lives(process) for process in processes):
        time.sleep(0.05)


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _quietly(process: psutil.Process, kill: bool) -> None:
    try:
        process.kill() if kill else process.terminate()
    except psutil.NoSuchProcess:
        return
