"""Defaults for Prefect and MLflow; they must be in place before either is imported, and yours win."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from tasks.errors import InputError

_started: dict[str, str] = {}  # the addresses of `make up` that this process uses


def apply() -> None:
    """Set what is not set: the services that `make up` started, else none; quiet, no telemetry."""
    home = Path(os.environ.get("ENGINEHOUSE_HOME", "~/.enginehouse")).expanduser().absolute()
    services = _services(home)
    _started.clear()
    _started.update({name: value for name, value in services.items() if name not in os.environ})
    for name, value in (services | defaults(home)).items():
        os.environ.setdefault(name, value)


def check_services(*names: str) -> None:
    """Raise InputError where nothing listens at an address that `make up` left, as after a restart of the
    machine: clients would try again for four minutes. A server of your own is not looked at.
    """
    for address in (_started[name] for name in names if name in _started):
        if _refused(address):
            raise InputError(
                f"the services that `make up` started are away (nothing listens at {address}): `make up` "
                "brings them back, `make down` goes on without them"
            )


def _refused(address: str) -> bool:
    place = urlsplit(address)
    try:
        socket.create_connection((place.hostname, place.port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    except OSError:  # too busy to answer: the client waits for it
        return False
    return False


def defaults(home: Path) -> dict[str, str]:
    """Results as JSON in the state folder; nothing is reported to anyone."""
    return {
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_LOCAL_STORAGE_PATH": str(home / "results"),
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # The ephemeral server needs more than its 20 s on a busy machine.
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
        # An error is told once, in words, by the command; a worker sets its own level before this.
        "PREFECT_LOGGING_LEVEL": "CRITICAL",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "DO_NOT_TRACK": "true",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _services(home: Path) -> dict[str, str]:
    """What `make up` wrote for clients; a server of your own in the environment is used instead, whole."""
    try:
        lines = (home / "services" / "client.env").read_text().splitlines()
    except OSError:
        return {}
    found = dict(line.split("=", 1) for line in lines if "=" in line)
    if "PREFECT_API_URL" in os.environ:
        found = {name: value for name, value in found.items() if not name.startswith("PREFECT_")}
    if "MLFLOW_TRACKING_URI" in os.environ:
        found = {name: value for name, value in found.items() if name.startswith("PREFECT_")}
    return found
