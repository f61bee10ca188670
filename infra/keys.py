"""Secrets and choices of this machine's services: one file, mode 600, each secret made once."""

from __future__ import annotations

import base64
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

from tasks import store

HOSTS = ("GITHUB", "GITEA", "GITLAB")

MADE: dict[str, Callable[[], str]] = {
    # MLflow encrypts the webhook's secret with this one: with another, every request to it fails.
    "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": lambda: base64.urlsafe_b64encode(os.urandom(32)).decode(),
    "ENGINEHOUSE_MLFLOW_WEBHOOK_SECRET": lambda: secrets.token_urlsafe(32),
    **{f"ENGINEHOUSE_{host}_WEBHOOK_SECRET": lambda: secrets.token_urlsafe(32) for host in HOSTS},
    "MLFLOW_FLASK_SERVER_SECRET_KEY": lambda: secrets.token_urlsafe(32),
    "MLFLOW_AUTH_ADMIN_PASSWORD": lambda: secrets.token_urlsafe(24),
    "PREFECT_SERVER_API_AUTH_STRING": lambda: f"enginehouse:{secrets.token_urlsafe(24)}",
}


def root() -> Path:
    """Where the services keep process records, logs and secrets, be it made or not."""
    return store.home() / "services"


def folder() -> Path:
    """That folder, made for this user alone; raises InputError as `store.prepare` does."""
    store.prepare()
    root().mkdir(mode=0o700, exist_ok=True)
    return root()


def load(chosen: Mapping[str, str], remember: bool) -> dict[str, str]:
    """Everything in secrets.env, what is missing made, what was chosen now put in; kept with `remember`."""
    place = folder() / "secrets.env"
    known = read(place)
    wanted = {name: make() for name, make in MADE.items()} | known | dict(chosen)
    if remember and wanted != known:
        write(place, wanted)
    return wanted


def read(place: Path) -> dict[str, str]:
    """NAME=VALUE lines; nothing when there is no file."""
    if not place.exists():
        return {}
    lines = [line for line in place.read_text().splitlines() if "=" in line and not line.startswith("#")]
    return {name.strip(): value for name, value in (line.split("=", 1) for line in lines)}


def write(place: Path, content: Mapping[str, str]) -> None:
    """Replace the file whole; nobody else can read it at any moment."""
    beside = place.with_suffix(".part")
    beside.unlink(missing_ok=True)
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.writelines(f"{name}={value}\n" for name, value in content.items())
        file.flush()
        os.fsync(file.fileno())
    beside.replace(place)
