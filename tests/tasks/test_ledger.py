"""The ledger on SQLite and on a real PostgreSQL: append-only, chained, one champion among many processes."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from tasks import ledger
from tasks.errors import InputError

ROOT = Path(__file__).resolve().parent.parent.parent
POSTGRESQL = Path("/usr/lib/postgresql/15/bin")


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of this module's own, run by a user that is not root."""
    if not (POSTGRESQL / "initdb").exists():
        pytest.skip("PostgreSQL 15 is not installed here")
    if os.getuid() == 0 and not shutil.which("runuser"):
        pytest.skip("PostgreSQL refuses root, and there is no runuser")
    # Below /tmp itself: pytest's own folders are closed to other users.
    folder = Path(subprocess.check_output(["mktemp", "-d", "/tmp/enginehouse-pg-XXXXXX"], text=True).strip())
    user = ["runuser", "-u", "nobody", "--"] if os.getuid() == 0 else []
    if user:
        shutil.chown(folder, "nobody")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    control = [*user, str(POSTGRESQL / "pg_ctl"), "-D", str(folder / "data"), "-w", "-l", str(folder / "log")]
    init = [str(POSTGRESQL / "initdb"), "-D", str(folder / "data"), "-U", "ledger", "-A", "trust"]
    subprocess.run([*user, *init], check=True, capture_output=True, cwd="/")
    subprocess.run([*control, "-o", options, "start"], check=True, stdout=subprocess.DEVNULL, cwd="/")
    try:
        yield f"postgresql://ledger@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*control, "-m", "fast", "stop"], check=True, capture_output=True, cwd="/")
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgresql")
    monkeypatch.setenv("ENGINEHOUSE_LEDGER", url)
    yield url
    engine = ledger._engine(url)
    ledger._metadata.drop_all(engine)
    ledger._prepared.cache_clear()


def promoted(model: str, before: str | None, after: str, event: str = "promoted") -> None:
    ledger.append(model, "promoting", actor="test", before=before, after=after, facts={"as": event})
    ledger.append(model, event, actor="test", before=before, after=after)


def test_lines_are_chained_and_say_who_is_champion(database: str) -> None:
    assert ledger.lines("m") == []
    assert ledger.champion([]) is None
    promoted("m", None, "1")
    line = ledger.append(
        "m", "refused", actor="ü", before="1", after="2", reason="slow", facts={"x": [1, 2.5]}
    )
    assert (line.number, ledger.lines("m")[-1]) == (3, line)
    promoted("m", "1", "3")
    known = ledger.lines("m")
    assert [entry.number for entry in known] == [1, 2, 3, 4, 5]
    assert ledger.champion(known) == "3"
    assert ledger.broken(known) is None
    assert ledger.lines("other") == []
    ledger.append("m", "withdrawn", actor="test", before="3")
    assert ledger.champion(ledger.lines("m")) is None


def test_the_database_refuses_changes_and_the_chain_shows_them(database: str) -> None:
    for version in ("1", "2", "3"):
        promoted("m", None, version)
    engine = ledger._engine(database)
    words = [
        "UPDATE enginehouse_ledger SET reason = 'x' WHERE number = 2",
        "DELETE FROM enginehouse_ledger WHERE number = 2",
    ]
    if database.startswith("postgresql"):
        words.append("TRUNCATE enginehouse_ledger")
    for statement in words:
        with pytest.raises(sa.exc.DBAPIError, match="append-only"), engine.begin() as connection:
            connection.exec_driver_sql(statement)
    known = ledger.lines("m")
    assert ledger.broken(known) is None
    altered = [*known[:1], replace(known[1], reason="x"), *known[2:]]
    assert "line 2 was altered" in str(ledger.broken(altered))
    assert "line 2 is missing" in str(ledger.broken([known[0], *known[2:]]))
    forged = replace(known[1], reason="x")
    forged = replace(forged, sha256=ledger._digest(forged))
    assert "line 3 does not follow" in str(ledger.broken([known[0], forged, *known[2:]]))


def test_an_intent_without_its_end_is_found(database: str) -> None:
    promoted("m", None, "1")
    assert ledger.unsettled(ledger.lines("m")) is None
    line = ledger.append("m", "promoting", actor="test", before="1", after="2", facts={"as": "promoted"})
    assert ledger.unsettled(ledger.lines("m")) == line
    ledger.append("m", "refused", actor="test", before="2", after="9")
    assert ledger.unsettled(ledger.lines("m")) == line
    ledger.append("m", "abandoned", actor="test", before="2", after="1")
    assert ledger.unsettled(ledger.lines("m")) is None
    assert ledger.champion(ledger.lines("m")) == "1"


def test_a_rollback_goes_one_back_each_time(database: str) -> None:
    for before, after in ((None, "1"), ("1", "2"), ("2", "4")):
        promoted("m", before, after)
    assert ledger.champions(ledger.lines("m")) == ["1", "2", "4"]
    promoted("m", "4", "2", "rolled-back")
    assert ledger.champions(ledger.lines("m")) == ["1", "2"]
    promoted("m", "2", "1", "rolled-back")
    promoted("m", "1", "5")
    assert ledger.champions(ledger.lines("m")) == ["1", "5"]


def test_a_model_that_was_made_again_has_other_versions_of_the_same_numbers(database: str) -> None:
    for run in ("old", "new"):
        ledger.append("m", "promoted", actor="test", after="1", run_id=run)
        ledger.append("m", "deployed", actor="test", after="1", facts={"place": run})
        ledger.append("m", "promoted", actor="test", after="2", run_id="other")
    for run in ("old", "new"):
        told = ledger.about(ledger.lines("m"), "1", run)
        assert [line.event for line in told] == ["promoted", "deployed"]
        assert told[-1].facts == {"place": run}


def test_what_was_allowed_a_version_is_not_allowed_another_of_its_number(database: str) -> None:
    allowed = ledger.append("m", "override", actor="Ada", after="1", run_id="old", reason="small enough")
    promoted("m", None, "1")
    known = ledger.lines("m")
    assert ledger.override(known, "1", "old") == allowed
    assert ledger.was_champion(known, "1", "old")
    ledger.append("m", "refused", actor="test", after="1", run_id="new")
    known = ledger.lines("m")
    assert ledger.override(known, "1", "old") == allowed
    assert ledger.override(known, "1", "new") is None
    assert not ledger.was_champion(known, "1", "new")


CONTENDER = """
def append(mine, against):
    against = None if against == "-" else against

    def check(known):
        if ledger.champion(known) != against:
            raise InputError(f"version {ledger.champion(known)} is champion")

    try:
        ledger.append("m", "promoting", actor=mine, before=against, after=mine, check=check)
        ledger.append("m", "promoted", actor=mine, before=against, after=mine)
        return "won"
    except InputError as error:
        return str(error)
"""
# Each pair in a process of its own, forked when all is imported and let go when all are there.
TOGETHER = """
import multiprocessing, sys
from tasks import ledger
from tasks.errors import InputError

{code}

def run(pair):
    gate.wait()
    return append(*pair)

pairs = [word.split(":") for word in sys.argv[1:]]
fork = multiprocessing.get_context("fork")
gate = fork.Barrier(len(pairs))
with fork.Pool(len(pairs)) as pool:
    for (own, _), said in zip(pairs, pool.map(run, pairs, chunksize=1)):
        print(own, said)
"""


@pytest.mark.slow
def test_of_twenty_processes_at_once_one_wins_and_the_chain_is_whole(database: str) -> None:
    """All judged against no champion; then twenty more, half of them against the wrong one."""
    first = contend([(str(k), "-") for k in range(1, 21)])
    (winner,) = [version for version, said in first.items() if said == "won"]
    assert all(said == f"version {winner} is champion" for v, said in first.items() if v != winner)
    second = contend([(str(k), winner if k % 2 else "-") for k in range(21, 41)])
    (later,) = [version for version, said in second.items() if said == "won"]
    assert int(later) % 2
    known = ledger.lines("m")
    assert ledger.champion(known) == later
    assert ledger.broken(known) is None
    assert len(known) == 4


@pytest.mark.slow
def test_twenty_processes_that_all_may_write_lose_no_line(database: str) -> None:
    code = """
def append(mine, _):
    for k in range(5):
        ledger.append("m", "override", actor=mine, after=str(k))
    return "done"
"""
    assert set(contend([(str(k), "-") for k in range(20)], code).values()) == {"done"}
    known = ledger.lines("m")
    assert len(known) == 100
    assert ledger.broken(known) is None


def contend(arguments: list[tuple[str, str]], code: str = CONTENDER) -> dict[str, str]:
    """What each process said, by its first argument; all are let go at the same moment."""
    command = [sys.executable, "-c", TOGETHER.format(code=code), *map(":".join, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert list(said) == [own for own, _ in arguments]
    return said


def test_one_process_holds_a_model_until_it_ends(database: str) -> None:
    code = """
import time
from tasks import ledger
with ledger.held("m"):
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match="another process"), ledger.held("m", patience=0.2):
        pass
    with ledger.held("other", patience=5):
        pass
    holder.kill()
    holder.wait()
    with ledger.held("m", patience=20), pytest.raises(ledger.Busy), ledger.held("m", patience=0.01):
        pass


def test_without_a_database_it_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENGINEHOUSE_LEDGER", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    with pytest.raises(InputError, match="set ENGINEHOUSE_LEDGER"):
        ledger.lines("m")
    monkeypatch.setenv("ENGINEHOUSE_LEDGER", "mysql://user:secret@host/db")
    with pytest.raises(InputError, match="neither sqlite") as told:
        ledger.lines("m")
    assert "secret" not in str(told.value)
