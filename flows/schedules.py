"""What a clock starts: a deployment at its time, or when a recipe's data changed.

The clocks stand in infra/prefect.yaml. Both flows only look, and start another deployment's run by a key, so
that what is told twice is done once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from typing import Any, Literal

import prefect.runtime
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import State, StateType
from prefect.states import Completed, Failed

import recipes
from flows import keyed
from tasks import lineage
from tasks.errors import InputError
from tasks.load import content
from tasks.stage import say

WAITING = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED]


@flow(name="scheduled", flow_run_name="{deployment}", persist_result=False)
def scheduled(deployment: str, parameters: dict[str, Any], skip_after_minutes: float = 60) -> State[Any]:
    """Start the deployment, unless its time is long past or an earlier start of it is not done."""
    due = prefect.runtime.flow_run.scheduled_start_time or datetime.now(timezone.utc)
    late = datetime.now(timezone.utc) - due
    if late > timedelta(minutes=skip_after_minutes):
        return _done("Skipped", f"due {due:%Y-%m-%d %H:%M} UTC, {late.total_seconds() / 60:.0f} minutes ago")
    tag = f"clock:{_digest([deployment, parameters])}"
    running = _waiting(deployment, tag)
    if running:
        return _done("Skipped", f"{running} is not done yet")
    key = f"{deployment}:{_digest(parameters)}:{due.isoformat()}"
    return _start(deployment, parameters, key, ["scheduled", tag])


@flow(name="data-changed", flow_run_name="{recipe}", persist_result=False)
def data_changed(recipe: str, then: Literal["optimize", "retrain"] = "retrain") -> State[Any]:
    """Start optimize or retrain when the recipe's source holds other rows than the newest version's.

    Once for these rows after that version; a run that failed is tried again at later ticks, then given up.
    """
    plan = recipes.load(recipe)
    latest = lineage.latest(plan.model.name)
    if latest is None:
        return _done("Skipped", f"{plan.model.name} was never registered: python -m flows optimize {recipe}")
    now = content(plan.data)
    if now == latest.data:
        return _done(
            "Unchanged", f"{plan.data.source} is what version {latest.version.version} was made from"
        )
    deployment, parameters = "optimize/recipe", {"recipe": recipe}
    if then == "retrain":
        deployment, parameters = "retrain/model", {"model": plan.model.name, "recipe": recipe}
    # Rows that come back after another version was made of others are new again.
    key = f"data:{deployment}:{recipe}:{latest.version.version}:{now}"
    return _start(deployment, parameters, key, ["data"], f"{plan.data.source} changed: ")


def _start(
    deployment: str, parameters: dict[str, Any], key: str, tags: Sequence[str], why: str = ""
) -> State[Any]:
    if not prefect.settings.PREFECT_API_URL.value():
        raise InputError("a clock needs the services: make up")
    keyed_run = keyed.start(deployment, parameters, key, tags)
    if keyed_run.failed:
        say(why + keyed_run.words)
        return Failed(message=why + keyed_run.words)
    return _done("Completed" if keyed_run.fresh else "Skipped", why + keyed_run.words)


def _waiting(deployment: str, tag: str) -> str | None:
    """A run that an earlier tick started and that has not ended."""
    flow_name, name = deployment.split("/", 1)
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[flow_name])),
            deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=[name])),
            flow_run_filter=FlowRunFilter(
                tags=FlowRunFilterTags(all_=[tag]),
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=WAITING)),
            ),
            limit=1,
        )
    return f"{deployment} {found[0].name}" if found else None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _done(name: str, words: str) -> State[Any]:
    say(words)
    return Completed(name=name, message=words)
