"""Defaults for Prefect and MLflow; they must be in place before either is imported, and yours win."""

from __future__ import annotations

import os
from pathlib import Path


def apply() -> None:
    """Set what is not set: the services that `make up` started, else none; quiet, no telemetry."""
    home = Path(os.environ.get("ENGINEHOUSE_HOME", "~/.enginehouse")).expanduser().absolute()
    for name, value in (_services(home) | defaults(home)).items():
        os.environ.setdefault(name, value)


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
