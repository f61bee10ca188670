"""What a run's page in Prefect shows: the gate's report and a link to MLflow, whose run links back."""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING, Any

import prefect.runtime
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.settings import PREFECT_API_URL
from prefect.utilities.urls import url_for

from tasks import registry
from tasks.stage import say

if TYPE_CHECKING:
    from flows.judge import Outcome

PICTURE = re.compile(r"!\[([^]]*)\]\(([\w.]+)\)\n*")


def publish(outcome: Outcome) -> Outcome:
    """Show the outcome on this run's page, and this page on MLflow's."""
    version = outcome.version
    words = f"{outcome.verdict}: {version.model} version {version.version}"
    show(outcome.recipe, version.run_id, "; ".join([words, *outcome.reasons]))
    return outcome


def show(recipe: str, run_id: str, words: str) -> None:
    """The gate's report (or these words) and the links; where a page is kept. Fails no run."""
    here = page()
    if here is None:
        return
    try:
        report = registry.gate_report(run_id) or f"# {recipe}\n\n{words}\n"
        create_markdown_artifact(_pictures(report, run_id), key=_key("gate", recipe), description=words[:500])
        there = mlflow_page(run_id)
        if there:
            create_link_artifact(
                there, f"MLflow run {run_id}", key=_key("mlflow", recipe), description=words[:500]
            )
        registry.tag(run_id, {"prefect_flow_run": here})
    except Exception as error:  # the run itself went well
        say(f"the run's page could not be written: {type(error).__name__}: {error}")


def page() -> str | None:
    """This run's page in Prefect; None where no server keeps it."""
    run = prefect.runtime.flow_run.id
    return url_for("flow-run", run) if run and PREFECT_API_URL.value() else None


def mlflow_page(run_id: str) -> str | None:
    """The run's page in MLflow; None for a database without a server."""
    root = _mlflow()
    return f"{root}/#/runs/{run_id}" if root else None


def _mlflow() -> str | None:
    """Where a browser finds MLflow; ENGINEHOUSE_MLFLOW_UI where that is not where the runs do."""
    root = os.environ.get("ENGINEHOUSE_MLFLOW_UI") or os.environ.get("MLFLOW_TRACKING_URI", "")
    return root.rstrip("/") if root.startswith(("http://", "https://")) else None


def _pictures(report: str, run_id: str) -> str:
    """Pictures by their address in MLflow, or none."""
    root = _mlflow()
    if root is None:
        return PICTURE.sub("", report)
    return PICTURE.sub(rf"![\1]({root}/get-artifact?path=gate/\2&run_uuid={run_id})\n\n", report)


def _key(kind: str, recipe: str) -> str:
    """Lower-case letters, digits and dashes are all that a key may have."""
    return f"{kind}-{re.sub(r'[^a-z0-9]+', '-', recipe.lower()).strip('-')}"


def tags() -> Any:
    """Tags that whoever started this command asked for."""
    return prefect.tags(*json.loads(os.environ.get("ENGINEHOUSE_TAGS", "[]")))
