"""Choices, secrets and what clients are told: kept in one private file, made once."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from flows import settings
from flows.__main__ import main
from infra import database, keys, services, setup
from tasks.errors import InputError


@pytest.fixture(autouse=True)
def nothing_chosen(fresh_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in setup.CHOICES:
        monkeypatch.delenv(name, raising=False)


def test_secrets_are_made_once_for_this_user_alone(fresh_home: Path) -> None:
    first = setup.load(remember=True)
    assert setup.load().keys == first.keys
    place = fresh_home / "services" / "secrets.env"
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700
    assert all(len(first.keys[name]) >= 32 for name in keys.MADE)


def test_what_was_chosen_is_kept_for_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTH", "1")
    monkeypatch.setenv("MLFLOW_PORT", "5123")
    assert setup.load(remember=True).auth
    monkeypatch.delenv("AUTH")
    monkeypatch.delenv("MLFLOW_PORT")
    kept = setup.load()
    assert (kept.auth, kept.url("mlflow")) == (True, "http://127.0.0.1:5123")
    monkeypatch.setenv("AUTH", "0")
    assert not setup.load().auth


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AUTH", "perhaps"),
        ("MLFLOW_PORT", "http"),
        ("MLFLOW_PORT", "70000"),
        ("DATABASE_URL", "mysql://u:p@h/d"),
        ("DATABASE_URL", "postgresql://u:p@h"),
    ],
)
def test_a_choice_that_makes_no_sense_is_told_in_words(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=name) as told:
        setup.load()
    assert ":p@" not in str(told.value)


def test_no_secret_is_in_what_a_service_is_started_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTH", "1")
    monkeypatch.setenv("DATABASE_URL", "postgresql://user:hunter2@localhost/engines")
    chosen = setup.load()
    secrets = [*(chosen.keys[name] for name in keys.MADE), "hunter2"]
    for command in services.commands(chosen).values():
        assert not [word for word in secrets if word in " ".join(command.arguments)]
    assert "hunter2" not in repr(chosen.keys.keys())
    assert "hunter2" not in str(setup.inherited())


def test_postgresql_is_one_database_with_a_schema_for_each_server() -> None:
    url = database.checked("postgres://u:p%40w@h:1/d?sslmode=require")
    assert database.asyncpg_url(url) == "postgresql+asyncpg://u:p%40w@h:1/d?ssl=require"
    there = database.sqlalchemy_url(url, "mlflow")
    assert there == "postgresql+psycopg://u:p%40w@h:1/d?sslmode=require&options=-csearch_path%3Dmlflow"


def test_clients_use_the_services_unless_they_name_their_own(
    fresh_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"PREFECT_API_URL": "p", "MLFLOW_TRACKING_URI": "m", "ENGINEHOUSE_LEDGER": "l"}
    keys.write(keys.folder() / "client.env", told)
    for name in told:
        monkeypatch.delenv(name, raising=False)
    settings.apply()
    assert {name: os.environ[name] for name in told} == told
    for name in told:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mine")
    settings.apply()
    assert (os.environ["MLFLOW_TRACKING_URI"], os.environ["PREFECT_API_URL"]) == ("mine", "p")
    assert "ENGINEHOUSE_LEDGER" not in os.environ
    monkeypatch.delenv("PREFECT_API_URL")


def test_a_command_says_at_once_that_the_services_are_away(
    fresh_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after a restart of the machine: `up` left the addresses, and nothing listens there."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        away = f"http://127.0.0.1:{unused.getsockname()[1]}"
    ledger = f"sqlite:///{keys.folder() / 'ledger.db'}"
    told = {"PREFECT_API_URL": f"{away}/api", "MLFLOW_TRACKING_URI": away, "ENGINEHOUSE_LEDGER": ledger}
    keys.write(keys.folder() / "client.env", told)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name in told:
        monkeypatch.delenv(name, raising=False)
    try:
        settings.apply()
        for arguments in (["verify", "digits-cnn@champion"], ["optimize", "digits-cnn-int8-ptq"]):
            assert main(arguments) == 2
            assert f"nothing listens at {away}" in capsys.readouterr().err
        assert main(["history", "digits-cnn"]) == 0  # the ledger is no server's
        settings.apply()  # now the environment names them, as a worker's does: its runs wait
        settings.check_services(*told)
    finally:
        (keys.folder() / "client.env").unlink()
        for name in told:
            monkeypatch.delenv(name)
        settings.apply()
