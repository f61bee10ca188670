"""AUTH=1 on PostgreSQL and on SQLite: all works for whoever has the password and for nobody else."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import psycopg
import pytest

from infra import keys
from tests.infra.stacks import MODEL, OTHER, PASSED, Stack, free_ports, until

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1200)]
SERVICES = ("prefect", "mlflow", "receiver", "worker")


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """A server of our own: on loopback, with a password, as a user without rights; its address."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or [Path(shutil.which("initdb") or "")]
    if not found[-1].name:
        pytest.skip("no PostgreSQL (.ci/run installs it)")
    folder = Path(tempfile.mkdtemp(prefix="enginehouse-postgresql-"))
    # It refuses to run as root.
    user = {"user": "nobody"} if os.geteuid() == 0 else {}
    if user:
        shutil.chown(folder, "nobody")
    password, (port,) = secrets.token_urlsafe(16), free_ports(1)
    (folder / "password").write_text(password)
    (folder / "password").chmod(0o644)
    make = ("-D", folder / "data", "-U", "engines", "-A", "scram-sha-256", "--pwfile", folder / "password")
    subprocess.run((found[-1], *make, "-E", "UTF8", "--no-sync"), check=True, capture_output=True, **user)
    serve = ("-D", folder / "data", "-p", str(port), "-h", "127.0.0.1", "-k", folder, "-F")
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            (found[-1].with_name("postgres"), *serve), stdout=log, stderr=log, cwd=folder, **user
        )
    url = f"postgresql://engines:{password}@127.0.0.1:{port}/postgres"
    try:
        until(lambda: _lets_in(url), 30)
        yield url
    finally:
        server.terminate()
        server.wait(30)
        shutil.rmtree(folder)


def _lets_in(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


def test_on_sqlite_it_is_as_closed_and_our_commands_have_the_password(tmp_path: Path) -> None:
    """`make up AUTH=1` as it is, over what was made before."""
    stack = Stack(tmp_path / "home", AUTH="1")
    stack.optimize("promoted", "registered")
    stack.up()
    try:
        assert stack.status() == dict.fromkeys(SERVICES, "up")
        assert (stack.home / "mlflow-auth.db").is_file()
        strangers_are_refused(stack)
        assert stack.agree(PASSED)
        done = stack.run("-m", "flows", "rollback", MODEL, "--to", OTHER, "--by", "Ada", "--reason", "a test")
        assert done.returncode == 0, done.stdout + done.stderr
        assert stack.agree(OTHER)
        stack.set_alias(PASSED)  # as MLflow's page does it: the webhook and the worker have passwords, too
        until(lambda: stack.agree(PASSED), 60)
    finally:
        stack.down()
    assert stack.status() == dict.fromkeys(SERVICES, "not up")


@pytest.fixture(scope="module")
def secure(postgresql: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Services with authentication on PostgreSQL; version 1 serves, 2 passed."""
    made = Stack(tmp_path_factory.mktemp("secure") / "home", AUTH="1", DATABASE_URL=postgresql)
    made.up()
    try:
        made.optimize("promoted", "registered")
        yield made
    finally:
        made.down()


def test_a_promotion_works_as_it_does_without(secure: Stack) -> None:
    assert secure.status() == dict.fromkeys(SERVICES, "up")
    before = secure.alias()
    after = _another(before)
    secure.set_alias(after)
    until(lambda: secure.agree(after), 60)
    until(lambda: secure.moves()[-2:] == [f"promoted {before}>{after}", f"deployed {before}>{after}"])
    checked = secure.run("-m", "flows", "verify", f"{MODEL}@champion")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_everything_is_in_postgresql(secure: Stack, postgresql: str) -> None:
    with psycopg.connect(postgresql) as connection:
        rows = connection.execute("SELECT schemaname || '.' || tablename FROM pg_tables").fetchall()
    tables = {row[0] for row in rows}
    assert {"mlflow.runs", "mlflow.enginehouse_ledger", "prefect.flow_run", "mlflow_auth.users"} <= tables
    assert not [table for table in tables if table.startswith("public.")]
    assert not list(secure.home.rglob("*.db"))


def test_whoever_has_no_password_sets_no_alias_and_starts_no_run(secure: Stack) -> None:
    before = secure.alias() or ""
    strangers_are_refused(secure)
    assert secure.agree(before)


def strangers_are_refused(stack: Stack) -> None:
    """By MLflow and by Prefect, without an account and with a wrong one."""
    body = {"name": MODEL, "alias": "champion", "version": _another(stack.alias())}
    alias = f"{stack.mlflow}/api/2.0/mlflow/registered-models/alias"
    for account in (None, ("admin", "password1234"), ("nobody", "")):
        for path in (alias, alias.replace("/api/", "/ajax-api/")):
            assert httpx.post(path, json=body, auth=account).status_code == 401
    with stack.orchestration() as client:
        deployment = client.read_deployment_by_name("promote/champion").id
    run = f"{stack.prefect}/api/deployments/{deployment}/create_flow_run"
    for account in (None, ("enginehouse", "wrong")):
        answer = httpx.post(run, json={"parameters": {"model": MODEL}}, auth=account)
        assert answer.status_code in (401, 403), answer.text  # no password, and no token to send with it
        token = httpx.get(f"{stack.prefect}/api/csrf-token", params={"client": "me"}, auth=account)
        assert token.status_code == 401
        assert httpx.get(f"{stack.prefect}/api/deployments/{deployment}", auth=account).status_code == 401


def _another(version: str | None) -> str:
    return OTHER if version == PASSED else PASSED


def test_an_account_of_a_reader_reads_and_moves_nothing(secure: Stack) -> None:
    before = secure.alias()
    reader = ("reader", "a password of 12 or more")
    made = {"username": reader[0], "password": reader[1]}
    secure.api("POST", "users/create", json=made).raise_for_status()
    asked = {"name": MODEL, "alias": "champion"}
    place = f"{secure.mlflow}/api/2.0/mlflow/registered-models/alias"
    assert httpx.get(place, params=asked, auth=reader).json()["model_version"]["version"] == before
    assert httpx.post(place, json=asked | {"version": _another(before)}, auth=reader).status_code == 403
    assert httpx.request("DELETE", place, json=asked, auth=reader).status_code == 403
    assert secure.alias() == before


def test_no_secret_is_in_an_argument_a_log_or_a_manifest(secure: Stack, postgresql: str) -> None:
    folder = secure.home / "services"
    known = keys.read(folder / "secrets.env")
    hidden = [known[name] for name in keys.MADE] + [postgresql.split(":")[2].split("@")[0]]
    hidden.append(known["PREFECT_SERVER_API_AUTH_STRING"].split(":")[1])
    processes = [each for name in SERVICES for each in secure.processes(name)]
    spoken = [" ".join(each.cmdline()) for each in processes]
    assert len(spoken) >= 5
    written = [*folder.glob("*.log"), *(secure.home / "manifests").iterdir(), *folder.glob("*.json")]
    written += [file for file in (secure.home / "mlartifacts").rglob("*.json") if file.is_file()]
    assert len(written) >= 10
    spoken += [file.read_text(errors="replace") for file in written]
    assert not [word for word in hidden for text in spoken if word in text]
    for name in ("secrets.env", "client.env", "mlflow-auth.ini"):
        assert (folder / name).stat().st_mode & 0o077 == 0


def test_after_a_kill_nothing_is_lost(secure: Stack) -> None:
    before, champion = secure.moves(), secure.alias() or ""
    secure.kill(*SERVICES)
    secure.up()
    assert secure.moves() == before
    assert secure.agree(champion)
    other = _another(champion)
    secure.set_alias(other)  # signed with the key of before
    until(lambda: secure.agree(other), 60)
