"""The worker, and beside it a look at MLflow's aliases every few seconds, which finds what no webhook told.

A flow run costs seconds of CPU to start, a look costs milliseconds: so the schedule of `reconcile` is slow,
and this is quick. It lives here because without a worker nothing could be promoted anyway.

python -m infra.worker
"""

from __future__ import annotations

import importlib
import logging
import os
import runpy
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from typing import Any

import httpx

from infra.receiver.mlflow import ALIAS
from infra.services import POOL, WORKER

LOOK = 5.0  # seconds between two looks; what both saw is acted on
PAGE = 200

Aliases = Mapping[str, str]
"""Model -> the version that carries the alias; models without it are left out."""

_log = logging.getLogger("prefect.infra.worker")


class Watch:
    """What the last looks saw, and what was handed on."""

    def __init__(self, now: Aliases) -> None:
        self._before: Aliases = dict(now)
        self._known = dict(now)

    def moved(self, now: Aliases) -> list[str]:
        """Models whose alias is where it was at the last look, and not where it was handed on."""
        before, self._before = self._before, now
        models = {*self._known, *now}
        return sorted(m for m in models if before.get(m) == now.get(m) != self._known.get(m))

    def handed_on(self, model: str, now: Aliases) -> None:
        """Prefect was told of this model as it is now."""
        self._known.pop(model, None)
        self._known |= {model: now[model]} if model in now else {}


def main() -> None:
    """Watch in a thread; the worker has the process and its signals."""
    importlib.import_module("prefect.main")  # before there are two threads that import it
    threading.Thread(target=_watch, name="aliases", daemon=True).start()
    pool = ["--pool", POOL, "--type", "process", "--name", WORKER, "--install-policy", "never"]
    sys.argv = ["prefect", "worker", "start", *pool]
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)


def _watch() -> None:
    watch, told = None, ""
    with httpx.Client(base_url=os.environ["MLFLOW_TRACKING_URI"], auth=_account(), timeout=10) as mlflow:
        while True:
            try:
                watch, told = look(watch, aliases(mlflow)), ""
            except Exception as error:  # MLflow or Prefect is away; the next look sees as much
                words = f"{type(error).__name__}: {error}"
                if words != told:
                    _log.warning("looking at MLflow's aliases: %s", words)
                told = words
            time.sleep(LOOK)


def look(watch: Watch | None, now: Aliases) -> Watch:
    """Hand on what moved; at the first look, everything."""
    if watch is None:
        start("reconcile/champion", {})
        return Watch(now)
    for model in watch.moved(now):
        start("promote/champion", {"model": model})
        watch.handed_on(model, now)
    return watch


def aliases(mlflow: httpx.Client) -> Aliases:
    """Where the alias is, for every model."""
    found: dict[str, str] = {}
    token = ""
    while True:
        asked = {"max_results": str(PAGE), "page_token": token}
        answer = (
            mlflow.get("/api/2.0/mlflow/registered-models/search", params=asked).raise_for_status().json()
        )
        for model in answer.get("registered_models", []):
            held = [each["version"] for each in model.get("aliases", []) if each["alias"] == ALIAS]
            found.update((model["name"], str(version)) for version in held)
        token = answer.get("next_page_token", "")
        if not token:
            return found


def start(deployment: str, parameters: dict[str, Any]) -> None:
    """Create a flow run."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        found = client.read_deployment_by_name(deployment)
        client.create_flow_run_from_deployment(
            found.id, parameters=parameters, idempotency_key=f"look-{uuid.uuid4()}", tags=["look"]
        )


def _account() -> tuple[str, str] | None:
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    return (user, os.environ["MLFLOW_TRACKING_PASSWORD"]) if user else None


if __name__ == "__main__":
    main()
