"""The ledger: who is champion and every move that made it so, one line each, in the tracking database.

    python -m flows history NAME

Lines are only ever added (triggers refuse the rest), each holds the sha256 of the one before it, and
`promoting` and `withdrawn` decide who is champion: MLflow's alias follows the ledger.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache

import sqlalchemy as sa
from filelock import FileLock, Timeout
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import DBAPIError, IntegrityError

from tasks import store
from tasks.artifacts import Facts
from tasks.errors import InputError

PATIENCE = 600.0  # seconds: a promotion opens engines while it holds the model
DECIDED = ("promoting", "withdrawn", "abandoned")  # these say who is champion
HELD = ("promoted", "rolled-back", "put-back")  # these say who was champion
SETTLED = (*HELD, "abandoned")  # these end a `promoting`
GENESIS = "0" * 64
_TABLE = "enginehouse_ledger"
_REFUSAL = "the ledger is append-only"

_metadata = sa.MetaData()
_table = sa.Table(
    _TABLE,
    _metadata,
    sa.Column("model", sa.String(256), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("at", sa.String(40), nullable=False),
    sa.Column("event", sa.String(40), nullable=False),
    sa.Column("actor", sa.String(256), nullable=False),
    sa.Column("before", sa.String(40)),
    sa.Column("after", sa.String(40)),
    sa.Column("run_id", sa.String(64)),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("facts", sa.Text, nullable=False),
    sa.Column("previous", sa.String(64), nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
)


@dataclass(frozen=True)
class Line:
    """One move: from version `before` to version `after` (None: no champion), by whom, when and why."""

    model: str
    number: int
    at: str
    event: str
    actor: str
    before: str | None
    after: str | None
    run_id: str | None
    reason: str
    facts: Facts
    previous: str
    sha256: str = ""


class Busy(InputError):
    """Another process holds the model, and held it for as long as was waited."""


Check = Callable[[Sequence[Line]], None]


def lines(model: str) -> list[Line]:
    """The model's lines, oldest first; none where nothing was ever promoted."""
    engine = _engine(address())
    with _explained(), engine.connect().execution_options(reading=True) as connection:
        if not sa.inspect(connection).has_table(_TABLE):
            return []
        return _read(connection, model)


def runs() -> set[str]:
    """Every run that a line of any model names."""
    engine = _engine(address())
    with _explained(), engine.connect().execution_options(reading=True) as connection:
        if not sa.inspect(connection).has_table(_TABLE):
            return set()
        found = connection.execute(sa.select(_table.c.run_id).distinct())
        return {str(row.run_id) for row in found if row.run_id}


def append(
    model: str,
    event: str,
    *,
    actor: str,
    before: str | None = None,
    after: str | None = None,
    run_id: str | None = None,
    reason: str = "",
    facts: Facts | None = None,
    check: Check | None = None,
) -> Line:
    """Add a line; `check` sees the lines it would follow, in one transaction, and may raise."""
    engine = _prepared(address())
    end = time.monotonic() + PATIENCE
    while True:
        try:
            with _explained(), engine.begin() as connection:
                known = _read(connection, model)
                if check:
                    check(known)
                last = known[-1] if known else None
                line = _line(last, model, event, actor[:256], before, after, run_id, reason, facts or {})
                row = asdict(line) | {"facts": _canonical(line.facts)}
                connection.execute(_table.insert().values(**row))
                return line
        except IntegrityError:  # another process wrote this number first: look again
            if time.monotonic() > end:
                raise
            time.sleep(random.uniform(0.01, 0.1))


def champion(known: Sequence[Line]) -> str | None:
    """The version that the lines make champion, None when there is none."""
    decisions = [line for line in known if line.event in DECIDED]
    return decisions[-1].after if decisions else None


def unsettled(known: Sequence[Line]) -> Line | None:
    """The `promoting` whose alias may not have been set: its process ended in between."""
    moves = [line for line in known if line.event == "promoting" or line.event in SETTLED]
    return moves[-1] if moves and moves[-1].event == "promoting" else None


def champions(known: Sequence[Line]) -> list[str]:
    """Who was champion, oldest first; a rollback takes off what came after its target."""
    stack: list[str] = []
    for line in known:
        if line.event not in HELD:
            continue
        if line.event == "rolled-back" and line.after in stack:
            stack = stack[: stack.index(line.after)]
        gone = {line.after, line.before} if line.event == "put-back" else {line.after}
        stack = [held for held in stack if held not in gone]
        stack += [line.after] if line.after else []
    return stack


def about(known: Sequence[Line], version: str, run_id: str) -> list[Line]:
    """The lines to this very version: a model that was deleted and made again has the same numbers."""
    found, ours = [], True
    for line in known:
        if line.after == version:
            ours = line.run_id == run_id if line.run_id else ours
            found += [line] if ours else []
    return found


def override(known: Sequence[Line], version: str, run_id: str) -> Line | None:
    """The latest override that lets this very version be promoted."""
    ours = about(known, version, run_id)
    return next((line for line in reversed(ours) if line.event == "override"), None)


def was_champion(known: Sequence[Line], version: str, run_id: str) -> bool:
    """Whether this very version was champion, and not put back since."""
    ours = about(known, version, run_id)
    return version in champions(known) and any(line.event in HELD for line in ours)


def broken(known: Sequence[Line]) -> str | None:
    """What is wrong with the first line that is not as it was written; None when the chain is whole."""
    last: Line | None = None
    for line in known:
        number, previous = (last.number + 1, last.sha256) if last else (1, GENESIS)
        if line.number != number:
            return f"line {number} is missing: line {line.number} follows line {number - 1}"
        if line.previous != previous:
            return f"line {line.number} does not follow line {number - 1}: its `previous` is another sha256"
        if line.sha256 != _digest(line):
            return f"line {line.number} was altered: it no longer has its sha256"
        last = line
    return None


@contextmanager
def held(model: str, patience: float = PATIENCE) -> Iterator[None]:
    """Be the only one, among all that share the ledger, to move this model's champion.

    The hold ends with the process, so what it left undone may be finished by whoever holds next.
    """
    url = address()
    busy = Busy(f"another process has been promoting {model} for {patience:.0f} s; try again later")
    if make_url(url).get_backend_name() == "sqlite":
        try:
            with FileLock(f"{make_url(url).database}.{_key(model):016x}.lock", timeout=patience):
                yield
        except Timeout:
            raise busy from None
        return
    with _engine(url).connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text(f"SET lock_timeout = {int(patience * 1000)}"))
        key = _key(model) - (1 << 63)
        try:
            connection.execute(sa.text("SELECT pg_advisory_lock(:key)"), {"key": key})
        except DBAPIError as error:
            if "lock timeout" in str(error):
                raise busy from None
            raise
        yield  # closing the connection ends the hold


def address() -> str:
    """The database: ENGINEHOUSE_LEDGER, else MLflow's own where that is a database."""
    tracking = os.environ.get("MLFLOW_TRACKING_URI")
    url = os.environ.get("ENGINEHOUSE_LEDGER") or tracking or store.database()
    if url.startswith(("sqlite:///", "postgresql")):
        return url
    if url == tracking:
        raise InputError(
            "MLFLOW_TRACKING_URI is not a database, and the ledger lies in one: set "
            "ENGINEHOUSE_LEDGER to the database behind that server (sqlite:///… or postgresql://…)"
        )
    raise InputError(f"ENGINEHOUSE_LEDGER={url.split(':')[0]}:… is neither sqlite:///… nor postgresql://…")


def _line(
    last: Line | None,
    model: str,
    event: str,
    actor: str,
    before: str | None,
    after: str | None,
    run_id: str | None,
    reason: str,
    facts: Facts,
) -> Line:
    number, previous = (last.number + 1, last.sha256) if last else (1, GENESIS)
    at = datetime.now(UTC).isoformat(timespec="milliseconds")
    facts = json.loads(_canonical(facts))  # as it will be read
    line = Line(model, number, at, event, actor, before, after, run_id, reason, facts, previous)
    return replace(line, sha256=_digest(line))


def _read(connection: Connection, model: str) -> list[Line]:
    query = sa.select(_table).where(_table.c.model == model).order_by(_table.c.number)
    rows = connection.execute(query).mappings()
    return [Line(**{**row, "facts": json.loads(row["facts"])}) for row in rows]


def _digest(line: Line) -> str:
    content = asdict(line)
    del content["sha256"]
    return hashlib.sha256(_canonical(content).encode()).hexdigest()


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _key(model: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{_TABLE} {model}".encode()).digest()[:8], "big")


@lru_cache(maxsize=8)
def _engine(address: str) -> Engine:
    """Connections are opened for each use: a process that forks shares none."""
    url = _driver(make_url(address))
    if url.get_backend_name() != "sqlite":
        return sa.create_engine(url, poolclass=sa.NullPool)
    engine = sa.create_engine(url, poolclass=sa.NullPool, connect_args={"timeout": 60})

    @sa.event.listens_for(engine, "connect")
    def _ours(connection: sa.engine.interfaces.DBAPIConnection, _record: object) -> None:
        connection.isolation_level = None  # the driver would begin late, and not at all for a table

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        reading = connection.get_execution_options().get("reading")
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")

    return engine


def _driver(url: URL) -> URL:
    """PostgreSQL through psycopg 3, which is the one installed, unless the address names another."""
    return url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url


@lru_cache(maxsize=8)
def _prepared(address: str) -> Engine:
    """The engine, its table and triggers made in one transaction by whoever comes first."""
    engine = _engine(address)
    with _explained(), engine.begin() as connection:
        postgresql = engine.dialect.name == "postgresql"
        if postgresql:
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _key("") - (1 << 63)})
        if not sa.inspect(connection).has_table(_TABLE):
            _metadata.create_all(connection)
            for statement in _POSTGRESQL if postgresql else _SQLITE:
                connection.exec_driver_sql(statement)
    return engine


_SQLITE = tuple(
    f"CREATE TRIGGER {_TABLE}_no_{verb} BEFORE {verb} ON {_TABLE} "
    f"BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END"
    for verb in ("UPDATE", "DELETE")
)
_POSTGRESQL = (
    f"CREATE OR REPLACE FUNCTION {_TABLE}_refuse() RETURNS trigger LANGUAGE plpgsql AS "
    f"$$ BEGIN RAISE EXCEPTION '{_REFUSAL}'; END $$",
    f"CREATE TRIGGER {_TABLE}_rows BEFORE UPDATE OR DELETE ON {_TABLE} FOR EACH ROW "
    f"EXECUTE FUNCTION {_TABLE}_refuse()",
    f"CREATE TRIGGER {_TABLE}_truncate BEFORE TRUNCATE ON {_TABLE} FOR EACH STATEMENT "
    f"EXECUTE FUNCTION {_TABLE}_refuse()",
)


@contextmanager
def _explained() -> Iterator[None]:
    """A missing driver in words; what the database itself says stays as it is."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(f"the ledger's database needs {error.name}: pip install {error.name}") from error
