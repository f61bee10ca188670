"""What the servers must know: work pool, queues, limits, deployments, and MLflow's webhook. Repeatable."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import httpx

from infra.process import ROOT
from infra.receiver import mlflow as hook
from infra.services import POOL
from infra.setup import Setup
from tasks.errors import InputError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

QUEUES = {"build": 1, "push": 2}  # work queue: how many runs at once
WEBHOOK = "enginehouse-champion"
EVENTS = ("created", "deleted")  # MLflow says `created` for an alias that moves, too
AUTOMATION = "enginehouse: a run without a heartbeat has crashed"


def prefect() -> None:
    """Work pool, queues, limits and the automation for crashed runs."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        _pool(client)
        for name in _gpus():
            client.upsert_global_concurrency_limit_by_name(name, 1)
        _automation(client)


def deployments() -> None:
    """Apply infra/prefect.yaml."""
    arguments = ("--no-prompt", "deploy", "--all", "--prefect-file", str(ROOT / "infra" / "prefect.yaml"))
    done = subprocess.run(
        (sys.executable, "-m", "prefect", *arguments), cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise InputError(f"infra/prefect.yaml could not be applied:\n{(done.stdout + done.stderr)[-3000:]}")


def webhook(setup: Setup) -> None:
    """Register the signed webhook for aliases, or bring the one that is there up to date."""
    with httpx.Client(base_url=f"{setup.url('mlflow')}/api/2.0/mlflow", auth=_account(setup)) as client:
        known = _ok(client.get("/webhooks", params={"max_results": 100})).get("webhooks", [])
        ours = [each["webhook_id"] for each in known if each["name"] == WEBHOOK]
        if ours:
            _ok(client.patch(f"/webhooks/{ours[0]}", json=_webhook(setup)))
        else:
            _ok(client.post("/webhooks", json=_webhook(setup)))


def _webhook(setup: Setup) -> dict[str, Any]:
    return {
        "name": WEBHOOK,
        "url": setup.url("receiver") + hook.PATH,
        "events": [{"entity": "MODEL_VERSION_ALIAS", "action": action.upper()} for action in EVENTS],
        "secret": setup.keys[hook.SECRET],
        "status": "ACTIVE",
        "description": "starts the promotion flow; made by make up",
    }


def _account(setup: Setup) -> tuple[str, str] | None:
    client = setup.client()
    return ("admin", client["MLFLOW_TRACKING_PASSWORD"]) if setup.auth else None


def _ok(answer: httpx.Response) -> dict[str, Any]:
    if answer.is_error:
        raise InputError(
            f"MLflow refused {answer.request.url.path} ({answer.status_code}): {answer.text[:500]}"
        )
    found: dict[str, Any] = answer.json() if answer.content else {}
    return found


def _pool(client: SyncPrefectClient) -> None:
    """Runs are processes of this checkout and this Python, whatever the worker's folder."""
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    variables = template["variables"]["properties"]
    variables["command"]["default"] = f"{sys.executable} -m prefect.engine"
    variables["working_dir"]["default"] = str(ROOT)
    pool = WorkPoolCreate(name=POOL, type="process", base_job_template=template)
    client.create_work_pool(pool, overwrite=True)
    for name, limit in QUEUES.items():
        try:
            queue = client.read_work_queue_by_name(name, work_pool_name=POOL)
        except ObjectNotFound:
            queue = client.create_work_queue(name, work_pool_name=POOL)
        client.update_work_queue(queue.id, concurrency_limit=limit)


def _automation(client: SyncPrefectClient) -> None:
    """A run that was killed together with its worker would stay Running for good, and hold its place."""
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    beat, ends = "prefect.flow-run.heartbeat", ("Completed", "Failed", "Cancelled", "Crashed")
    wanted = AutomationCore(
        name=AUTOMATION,
        trigger=EventTrigger(
            after={beat},
            expect={beat, *(f"prefect.flow-run.{end}" for end in ends)},
            match={"prefect.resource.id": ["prefect.flow-run.*"]},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=90),
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message="no heartbeat for 90 seconds")],
    )
    known = client.read_automations_by_name(AUTOMATION)
    if known:
        client.update_automation(known[0].id, wanted)
    else:
        client.create_automation(wanted)


def _gpus() -> Sequence[str]:
    """The name of each GPU's limit, as `tasks.slots` calls it."""
    if not shutil.which("nvidia-smi"):
        return ()
    asked = ("nvidia-smi", "--query-gpu=index", "--format=csv,noheader")
    found = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
    return [f"gpu-{index}-{platform.node()}" for index in found]
