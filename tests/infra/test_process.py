"""Detached processes: only ours are found and ended, whatever became of their ids."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from starlette.testclient import TestClient

from infra import process
from infra.process import Command
from infra.receiver import app
from tasks import store

SECRET = "key"
# A child that does not listen to SIGTERM, as a library's might.
STUBBORN = (
    "import signal, subprocess, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
    "deaf = 'import signal as s, time; s.signal(s.SIGTERM, s.SIG_IGN); print(1, flush=True); time.sleep(9)'\n"
    "subprocess.Popen([sys.executable, '-c', deaf])\n"
    "print('started', flush=True)\n"
    "time.sleep(99)"
)


def command(code: str, **environment: str) -> Command:
    return Command("service", (sys.executable, "-c", code), environment)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    process.end("service", tmp_path, patience=1)


def log_says(folder: Path, word: str) -> None:
    for _ in range(500):
        if word in (folder / "service.log").read_text():
            return
        time.sleep(0.02)
    raise AssertionError((folder / "service.log").read_text())


@pytest.mark.slow
def test_a_service_is_found_again_and_ended_with_all_it_started(folder: Path) -> None:
    process.start(command(STUBBORN), folder, SECRET, {})
    log_says(folder, "1")
    log_says(folder, "started")
    record = process.running("service", folder)
    assert record is not None
    assert len(process.members("service", folder)) == 2
    process.end("service", folder, patience=3)
    assert process.running("service", folder) is None
    assert process.members("service", folder) == []
    assert not (folder / "service.json").exists()


def test_a_stranger_that_got_the_id_is_neither_taken_for_ours_nor_ended(folder: Path) -> None:
    stranger = subprocess.Popen(("sleep", "60"))
    try:
        record = {"pid": stranger.pid, "started": psutil.Process(stranger.pid).create_time(), "told": ""}
        (folder / "service.json").write_text(json.dumps(record))
        assert process.running("service", folder) is None
        process.end("service", folder)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.slow
def test_what_a_killed_service_left_behind_is_found(folder: Path) -> None:
    process.start(command(STUBBORN), folder, SECRET, {})
    log_says(folder, "1")
    record = process.running("service", folder)
    assert record is not None
    psutil.Process(record.pid).kill()
    psutil.Process(record.pid).wait(5)
    assert process.running("service", folder) is None
    assert len(process.members("service", folder)) == 1
    process.end("service", folder, patience=1)
    assert process.members("service", folder) == []


def test_another_environment_is_told_apart_and_given_away_by_nothing() -> None:
    one, two = command("", PASSWORD="one"), command("", PASSWORD="two")
    assert process.told(one, SECRET) == process.told(command("", PASSWORD="one"), SECRET)
    assert process.told(one, SECRET) != process.told(two, SECRET)
    assert process.told(one, SECRET) != process.told(one, "another key")


def test_the_receiver_keeps_bounding_logs_on_a_full_disk_and_past_one_that_fails(
    fresh_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "LOG_MOST", 1000)
    monkeypatch.setattr(store, "LEAST_FREE", 1 << 62)
    monkeypatch.setattr(app, "PAUSE", 0.01)
    services = fresh_home / "services"
    (services / "broken.log.1").mkdir(parents=True)
    (services / "broken.log").write_text("x" * 3000)
    with TestClient(app.app()):
        for name in ("one.log", "other.log", "one.log"):
            log = services / name
            log.write_text("x" * 3000)
            deadline = time.monotonic() + 10
            while log.stat().st_size >= 1000 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert log.stat().st_size == 0
            assert (services / f"{name}.1").stat().st_size == 1000


def test_a_log_stays_below_its_size_while_it_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "LOG_MOST", 1000)
    log = folder / "service.log"
    with log.open("ab") as out:
        for number in range(300):
            out.write(f"line {number}\n".encode())
            out.flush()
            process.bound(log)
    assert log.stat().st_size < 1000
    assert log.read_text().endswith("line 299\n")
    assert (folder / "service.log.1").stat().st_size <= 1000
