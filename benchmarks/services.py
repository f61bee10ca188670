"""How long a promotion takes from the alias to the switch, and what the idle services cost.

python -m benchmarks.services MODEL VERSION VERSION     with the services up, and two versions that passed

The alias is set through MLflow's REST API (what a click sends) and the serving folder is watched; then with
the webhook off, so that only the look beside the worker finds it. The table is in docs/services.md.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from typing import Any

import httpx
import psutil

from flows import settings  # noqa: F401  tells the services' addresses
from infra import keys, process, services
from tasks import store

ROUNDS, IDLE = 3, 120.0


def main() -> None:
    """Print a line for each figure."""
    model, *versions = sys.argv[1:]
    with _mlflow() as mlflow:
        print("alias to switch, webhook:", _rounds(mlflow, model, versions))
        hook = mlflow.get("webhooks").json()["webhooks"][0]["webhook_id"]
        mlflow.patch(f"webhooks/{hook}", json={"status": "DISABLED"}).raise_for_status()
        try:
            time.sleep(6)  # the server keeps its list of webhooks for 5 s
            print("alias to switch, no webhook:", _rounds(mlflow, model, versions))
        finally:
            mlflow.patch(f"webhooks/{hook}", json={"status": "ACTIVE"}).raise_for_status()
    time.sleep(30)  # until the last runs have ended
    before = _seconds()
    time.sleep(IDLE)
    after = _seconds()
    for name in services.NAMES:
        used = sum(value - before.get(key, 0.0) for key, value in after.items() if key[0] == name)
        size = process.memory(process.members(name, keys.folder())) >> 20
        print(f"{name}: {size} MiB, {100 * used / IDLE:.1f} % of a core")


def _mlflow() -> httpx.Client:
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    account = (user, os.environ["MLFLOW_TRACKING_PASSWORD"]) if user else None
    return httpx.Client(
        base_url=f"{os.environ['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/", auth=account, timeout=60
    )


def _rounds(mlflow: httpx.Client, model: str, versions: list[str]) -> str:
    found = []
    for k in range(ROUNDS):
        time.sleep(20)
        serving = os.readlink(store.home() / "serving" / model / "current").rsplit("/", 1)[-1]
        found.append(_switch(mlflow, model, versions[0] if serving == versions[1] else versions[1]))
        print(f"  round {k + 1}: {found[-1]:.1f} s", flush=True)
    return f"median {statistics.median(found):.1f} s, {min(found):.1f} to {max(found):.1f}"


def _switch(mlflow: httpx.Client, model: str, version: str) -> float:
    """Seconds from the request to the moment that the link names the version."""
    body: dict[str, Any] = {"name": model, "alias": "champion", "version": version}
    started = time.perf_counter()
    mlflow.post("registered-models/alias", json=body).raise_for_status()
    while not os.readlink(store.home() / "serving" / model / "current").endswith(f"/{version}"):
        if time.perf_counter() - started > 300:
            raise SystemExit(f"{model} was not switched to version {version} within 300 s")
        time.sleep(0.02)
    return time.perf_counter() - started


def _seconds() -> dict[tuple[str, int], float]:
    """CPU seconds of each process, and of its children that have ended."""
    found = {}
    for name in services.NAMES:
        for each in process.members(name, keys.folder()):
            try:
                times = each.cpu_times()
            except psutil.Error:
                continue
            found[name, each.pid] = sum(times[:4])
    return found


if __name__ == "__main__":
    main()
