"""A person promotes in MLflow's own page, in a real browser; and what happens when nobody is told."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.infra.stacks import MODEL, OTHER, PASSED, REFUSED, Stack, until

if TYPE_CHECKING:
    from uuid import UUID

    from playwright.sync_api import Page
    from prefect.client.orchestration import SyncPrefectClient

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
BROWSER = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """A page of the installed Chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on PATH (.ci/run installs it)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(BROWSER))
        yield browser.new_page(viewport={"width": 1280, "height": 800})
        browser.close()


def click_champion(page: Page, stack: Stack, version: str) -> None:
    """Model page, the version's row, Add, `champion`, Save: as a person does it."""
    page.goto(f"{stack.mlflow}/#/models/{MODEL}")
    page.reload()
    row = page.get_by_role("row").filter(has=page.get_by_role("link", name=f"Version {version}", exact=True))
    row.get_by_role("button", name="Add").click(timeout=60_000)
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("combobox").fill("champion")
    dialog.get_by_role("combobox").press("Enter")
    dialog.get_by_role("button", name="Save aliases").click()
    dialog.wait_for(state="hidden")


def answer(stack: Stack) -> list[dict[str, object]]:
    """What the deployed engine says to a picture, asked through `current`."""
    code = (
        "import json, sys\nfrom tasks import deploy\n"
        "print(json.dumps(deploy.predict(sys.argv[1], [[[[0.5] * 8] * 8]])))"
    )
    done = stack.run("-c", f"import flows\n{code}", MODEL)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, object]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_click_on_a_passed_version_changes_the_deployed_engine(stack: Stack, page: Page) -> None:
    version = OTHER if stack.alias() == PASSED else PASSED
    click_champion(page, stack, version)
    until(lambda: stack.agree(version), 60)
    until(lambda: stack.tags(version).get("promoted_by") == "alias in MLflow")
    found = answer(stack)
    assert found[0]["label"] in "0123456789"
    assert stack.moves()[-1].startswith("deployed")


def test_a_click_on_a_refused_version_is_put_back_with_the_reason(stack: Stack, page: Page) -> None:
    before, serving = stack.alias(), stack.serves()
    click_champion(page, stack, REFUSED)
    clicked = time.monotonic()
    until(lambda: "promotion_refused" in stack.tags(REFUSED), 60)
    until(lambda: stack.alias() == before, 60)
    assert time.monotonic() - clicked < 30
    assert stack.serves() == serving
    assert "size" in stack.tags(REFUSED)["promotion_refused"]
    page.goto(f"{stack.mlflow}/#/models/{MODEL}/versions/{REFUSED}")
    page.reload()
    page.get_by_text("Not promoted").first.wait_for(timeout=60_000)


def test_an_alias_that_no_webhook_told_of_is_found(stack: Stack) -> None:
    hook = stack.api("GET", "webhooks").json()["webhooks"][0]["webhook_id"]
    stack.api("PATCH", f"webhooks/{hook}", json={"status": "DISABLED"}).raise_for_status()
    time.sleep(5.5)  # the server keeps its list of webhooks for 5 s
    try:
        version = OTHER if stack.alias() == PASSED else PASSED
        stack.set_alias(version)
        until(lambda: stack.agree(version), 60)
    finally:
        stack.api("PATCH", f"webhooks/{hook}", json={"status": "ACTIVE"}).raise_for_status()


def test_the_receiver_answers_mlflow_at_once_and_a_forger_never(stack: Stack) -> None:
    hook = stack.api("GET", "webhooks").json()["webhooks"][0]["webhook_id"]
    stack.api("POST", f"webhooks/{hook}/test", json={})  # the first opens connections
    tried = stack.api("POST", f"webhooks/{hook}/test", json={}).json()["result"]
    assert (tried["success"], tried["response_status"]) == (True, 200)
    forged = httpx.post(f"{stack.receiver}/mlflow", json={"entity": "model_version_alias"})
    assert forged.status_code == 401
    assert httpx.post(f"{stack.receiver}/mlflow", content=b"x" * (5 << 20)).status_code == 413


def test_both_pages_show_the_promotion(stack: Stack, page: Page) -> None:
    """docs/ holds pictures of these two."""
    page.goto(f"{stack.mlflow}/#/models/{MODEL}/versions/{stack.alias()}")
    page.reload()
    page.get_by_text("@ champion").first.wait_for(timeout=60_000)
    page.get_by_text("Champion since").first.wait_for(timeout=60_000)
    with stack.orchestration() as client:
        made = client.read_deployment_by_name("promote/champion")
        started = until(lambda: _latest(client, made.id))
    page.goto(f"{stack.prefect}/runs/flow-run/{started}")
    page.get_by_text("Completed").first.wait_for(timeout=60_000)
    page.get_by_role("link", name="promote", exact=True).first.wait_for(timeout=60_000)


def _latest(client: SyncPrefectClient, deployment: UUID) -> UUID | None:
    from prefect.client.schemas import filters
    from prefect.client.schemas.objects import StateType

    done = filters.FlowRunFilterState(type=filters.FlowRunFilterStateType(any_=[StateType.COMPLETED]))
    of = filters.FlowRunFilterDeploymentId(any_=[deployment])
    runs = client.read_flow_runs(flow_run_filter=filters.FlowRunFilter(state=done, deployment_id=of))
    return max(runs, key=lambda run: run.end_time).id if runs else None
