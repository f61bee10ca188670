"""What this machine's services are told: addresses, databases, secrets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flows import settings
from infra import database, keys
from tasks import store
from tasks.errors import InputError

PORTS = {"PREFECT_PORT": "4200", "MLFLOW_PORT": "5000", "RECEIVER_PORT": "8090"}
CHOICES = ("AUTH", "DATABASE_URL", *PORTS)
CLIENT = (
    *("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_API_KEY", "PREFECT_PROFILE"),
    *("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    *("MLFLOW_REGISTRY_URI", "ENGINEHOUSE_LEDGER"),
)
HOST = "127.0.0.1"
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Setup:
    """Choices and secrets, and what follows from them."""

    home: Path
    folder: Path
    auth: bool
    database: str | None
    ports: Mapping[str, int]
    keys: Mapping[str, str] = field(repr=False)

    def url(self, service: str) -> str:
        """Where a service answers: prefect, mlflow or receiver."""
        return f"http://{HOST}:{self.ports[service]}"

    @property
    def tracking(self) -> str:
        """MLflow's database; the ledger lives in it, too."""
        if self.database:
            return database.sqlalchemy_url(self.database, "mlflow")
        return f"sqlite:///{self.home / 'mlflow.db'}"

    def client(self) -> dict[str, str]:
        """What whoever uses the services finds in its environment."""
        found = {
            "PREFECT_API_URL": f"{self.url('prefect')}/api",
            "MLFLOW_TRACKING_URI": self.url("mlflow"),
            "ENGINEHOUSE_LEDGER": self.tracking,
        }
        if self.auth:
            found |= {
                "PREFECT_API_AUTH_STRING": self.keys["PREFECT_SERVER_API_AUTH_STRING"],
                "MLFLOW_TRACKING_USERNAME": "admin",
                "MLFLOW_TRACKING_PASSWORD": self.keys["MLFLOW_AUTH_ADMIN_PASSWORD"],
            }
        return found

    @property
    def telling(self) -> dict[str, str]:
        """What every service is told, whatever it is."""
        quiet = settings.defaults(self.home) | {"PREFECT_LOGGING_LEVEL": "INFO", "PYTHONUNBUFFERED": "1"}
        return quiet | {"ENGINEHOUSE_HOME": str(self.home), "PYTHONPATH": str(ROOT)}


def inherited() -> dict[str, str]:
    """Your environment, without what would lead a service elsewhere and without secrets it needs not."""
    without = (*CHOICES, *keys.MADE, *CLIENT)
    return {name: value for name, value in os.environ.items() if name not in without}


def load(remember: bool = False) -> Setup:
    """What was chosen in the environment, else at the last `up`, else the defaults."""
    chosen = {name: os.environ[name] for name in CHOICES if os.environ.get(name)}
    known = dict(PORTS) | keys.load(chosen, remember)
    place = known.get("DATABASE_URL", "sqlite")
    return Setup(
        home=store.home(),
        folder=keys.folder(),
        auth=_yes(known.get("AUTH", "0")),
        database=None if place == "sqlite" else database.checked(place),
        ports={name.split("_")[0].lower(): _port(name, known[name]) for name in PORTS},
        keys=known,
    )


def _yes(word: str) -> bool:
    if word.lower() not in ("1", "true", "yes", "on", "0", "false", "no", "off"):
        raise InputError(f"AUTH={word}: say AUTH=1 or AUTH=0")
    return word.lower() in ("1", "true", "yes", "on")


def _port(name: str, word: str) -> int:
    if not word.isdigit() or not 0 < int(word) < 65536:
        raise InputError(f"{name}={word}: a port is a number from 1 to 65535")
    return int(word)
