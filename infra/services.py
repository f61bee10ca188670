"""The four services: how each is started, and how it shows that it answers."""

from __future__ import annotations

import platform
import sys
from urllib.parse import urlsplit

from infra import database, keys
from infra.process import Command
from infra.setup import HOST, Setup

POOL = "local"
WORKER = f"{POOL}-{platform.node()}"
NAMES = ("prefect", "mlflow", "receiver", "worker")
HEALTH = {"prefect": "/api/health", "mlflow": "/health", "receiver": "/health"}


def commands(setup: Setup, search_path: str = "prefect") -> dict[str, Command]:
    """Each service by name; secrets travel in environments, never in arguments."""
    serve = ("uvicorn", "--factory", "infra.receiver.app:app", "--host", HOST, "--no-access-log")
    told = {
        "prefect": (("prefect", "server", "start"), _prefect(setup, search_path)),
        "mlflow": (("mlflow", "server", *_app(setup)), _mlflow(setup)),
        "receiver": ((*serve, "--port", str(setup.ports["receiver"])), _receiver(setup)),
        "worker": (("infra.worker",), _worker(setup)),
    }
    return {
        name: Command(name, (sys.executable, "-m", *arguments), setup.telling | environment)
        for name, (arguments, environment) in told.items()
    }


def _prefect(setup: Setup, search_path: str) -> dict[str, str]:
    own = setup.url("prefect")
    found = {
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": str(setup.ports["prefect"]),
        # A lease that outlives the server's process: a crash leaks no slot.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_SERVER_CONCURRENCY_INITIAL_DEPLOYMENT_LEASE_DURATION": "30",
        # A page elsewhere in your browser can neither read nor change anything here.
        "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": f"{own},{own.replace(HOST, 'localhost')}",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    }
    if setup.database:
        found["PREFECT_API_DATABASE_CONNECTION_URL"] = database.asyncpg_url(setup.database)
        found["PREFECT_SERVER_DATABASE_SQLALCHEMY_CONNECT_ARGS_SEARCH_PATH"] = search_path
    if setup.auth:
        found["PREFECT_SERVER_API_AUTH_STRING"] = setup.keys["PREFECT_SERVER_API_AUTH_STRING"]
    return found


def _mlflow(setup: Setup) -> dict[str, str]:
    found = {
        "MLFLOW_BACKEND_STORE_URI": setup.tracking,
        "MLFLOW_SERVE_ARTIFACTS": "true",
        "MLFLOW_ARTIFACTS_DESTINATION": (setup.home / "mlartifacts").as_uri(),
        "MLFLOW_HOST": HOST,
        "MLFLOW_PORT": str(setup.ports["mlflow"]),
        "MLFLOW_WORKERS": "1",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        # The receiver is on this machine.
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": setup.keys["MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY"],
        "MLFLOW_WEBHOOK_CACHE_TTL": "5",
    }
    if setup.auth:
        found |= {
            "MLFLOW_AUTH_CONFIG_PATH": str(setup.folder / "mlflow-auth.ini"),
            "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
            "MLFLOW_AUTH_ADMIN_PASSWORD": setup.keys["MLFLOW_AUTH_ADMIN_PASSWORD"],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": setup.keys["MLFLOW_FLASK_SERVER_SECRET_KEY"],
        }
    return found


def _app(setup: Setup) -> tuple[str, ...]:
    return ("--app-name", "basic-auth") if setup.auth else ()


def _receiver(setup: Setup) -> dict[str, str]:
    secrets = {name: value for name, value in setup.keys.items() if name.endswith("_SECRET")}
    # A caller that is told "away" comes again; waiting inside would only hold it up.
    return setup.client() | secrets | {"PREFECT_CLIENT_MAX_RETRIES": "0"}


def _worker(setup: Setup) -> dict[str, str]:
    tokens = {name: value for name, value in setup.keys.items() if name.startswith("ENGINEHOUSE_TOKEN_")}
    return (
        setup.client()
        | tokens
        | {
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            # A run whose process is gone stops sending these; an automation then calls it crashed.
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        }
    )


def write_auth_config(setup: Setup) -> None:
    """MLflow's accounts: whoever has none gets nothing, whoever has one may read."""
    place = database.sqlalchemy_url(setup.database, "mlflow_auth") if setup.database else None
    place = place or f"sqlite:///{setup.home / 'mlflow-auth.db'}"
    lines = {
        "[mlflow]\ndefault_permission": "READ",
        "database_uri": place.replace("%", "%%"),  # an ini file's way to say %
        "admin_username": "admin",
        # Else every request hashes the password anew: half a second of CPU each.
        "auth_cache_ttl_seconds": "300",
        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
    }
    keys.write(setup.folder / "mlflow-auth.ini", lines)


def port(setup: Setup, name: str) -> int | None:
    """The port a service listens on; the worker listens on none."""
    return urlsplit(setup.url(name)).port if name in HEALTH else None
