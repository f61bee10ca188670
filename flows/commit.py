"""One recipe at one commit: the commit's own code, run in a clean checkout of it.

Started by flows/push.py; the run is named `RECIPE @ COMMIT` and tagged push, recipe:, commit: and branch:.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prefect.runtime
from prefect import flow, task
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Completed
from pydantic import TypeAdapter, ValidationError

from flows import artifacts
from recipes.schema import Name
from tasks import checkout, git, repositories, store
from tasks.errors import InputError
from tasks.repositories import Repository
from tasks.stage import NETWORK
from tasks.status import State as Told
from tasks.status import tell

BAD_INPUT = 2
PRIVATE = re.compile(r"^(ENGINEHOUSE_TOKEN_.*|.*WEBHOOK_SECRET.*|PREFECT__.*|PYTHON(PATH|SAFEPATH|HOME))$")
VERDICTS: dict[str, Told] = {
    "promoted": "success", "registered": "success", "unchanged": "success",
    "built": "pending", "refused": "failure",
}  # fmt: skip

mirror = task(name="fetch", persist_result=False, **NETWORK)(checkout.mirror)


class Failed(RuntimeError):
    """The commit's run ended without a verdict."""


@dataclass(frozen=True)
class Pushed:
    """What a run was started for."""

    repository: Repository
    recipe: str
    commit: str
    branch: str


def _name() -> str:
    asked = prefect.runtime.flow_run.parameters
    return f"{printable(asked['recipe'])} @ {asked['commit'][:7]}"


@flow(name="optimize-commit", flow_run_name=_name, persist_result=False)
def optimize_commit(repository: str, recipe: str, commit: str, branch: str = "main") -> State[Any]:
    """Run `python -m flows optimize RECIPE` of the commit, there; the commit's status follows."""
    allowed = repositories.find(repository)
    pushed = Pushed(allowed, recipe, git.commit_id(commit), git.branch_name(branch))
    if not allowed.allows(branch):
        raise InputError(
            f"{allowed.name}: {branch} is not among its branches ({', '.join(allowed.branches)})"
        )
    with _told(pushed):
        _check_name(recipe)
        place = mirror(allowed)
        if not checkout.holds(place, branch, commit):
            raise InputError(f"{commit[:7]} is not on {branch} any more")
        with checkout.checkout(place, commit) as folder:
            result = run(folder, pushed)
        return _finish(pushed, result)


def run(folder: Path, pushed: Pushed) -> dict[str, Any]:
    """The result that the commit's own command prints; raises with its words when it has none."""
    command = [sys.executable, "-m", "flows", "optimize", pushed.recipe, "--json"]
    lines: list[str] = []
    with _process(command, folder, environment(pushed)) as process:
        assert process.stdout is not None
        for raw in process.stdout:
            # A progress bar writes over its line again and again: only the last counts.
            line = raw.decode(errors="replace").rstrip().rpartition("\r")[2]
            get_run_logger().info("%s", line)
            lines = [*lines[-199:], line]
        status = process.wait()
    result = _json(lines[-1]) if lines else None
    if result is not None and status in (0, 3, 4):
        return result
    if status == BAD_INPUT:
        raise InputError(_error(lines))
    raise Failed(f"{_error(lines)} (exit status {status})")


def environment(pushed: Pushed) -> dict[str, str]:
    """The command's environment: no secrets of ours; what it logs says where it came from."""
    own = {name: value for name, value in os.environ.items() if not PRIVATE.match(name)}
    context = {"repository": pushed.repository.name, "commit": pushed.commit, "branch": pushed.branch}
    page = artifacts.page()
    return own | {
        "ENGINEHOUSE_HOME": str(store.home()),
        "ENGINEHOUSE_TAGS": json.dumps(tags(pushed.recipe, pushed.commit, pushed.branch)),
        # MLflow puts these on every run that the command logs.
        "MLFLOW_RUN_CONTEXT": json.dumps(context | ({"prefect_flow_run": page} if page else {})),
        "PYTHONDONTWRITEBYTECODE": "1",  # the checkout stays clean
        "PYTHONUNBUFFERED": "1",
    }


def tags(recipe: str, commit: str, branch: str) -> list[str]:
    """What runs are grouped by in Prefect."""
    return ["push", f"recipe:{printable(recipe)}", f"commit:{commit[:7]}", f"branch:{printable(branch)}"]


def printable(text: str) -> str:
    """The text in one line that shows every odd character, short enough for a name."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)[:100]


def _check_name(recipe: str) -> None:
    try:
        TypeAdapter(Name).validate_python(recipe)
    except ValidationError:
        raise InputError(
            f"recipes/{printable(recipe)}.yaml: a recipe's name is letters, digits, '.', '_' and '-'"
        ) from None


@contextmanager
def _process(
    command: list[str], folder: Path, environment: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, which ends with us."""
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    for sign, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
        try:
            os.killpg(process.pid, sign)
            process.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
        return


@contextmanager
def _told(pushed: Pushed) -> Iterator[None]:
    """The commit hears that the run began, and, should it break, why."""
    page = artifacts.page()
    tell(pushed.repository, pushed.commit, pushed.recipe, "pending", "runs", page)
    try:
        yield
    except InputError as error:
        tell(pushed.repository, pushed.commit, pushed.recipe, "failure", str(error), page)
        raise
    except BaseException as error:
        words = str(error) or f"stopped ({type(error).__name__})"
        tell(pushed.repository, pushed.commit, pushed.recipe, "error", words, page)
        raise


def _finish(pushed: Pushed, result: dict[str, Any]) -> State[Any]:
    verdict, reasons = str(result["verdict"]), "; ".join(result["reasons"])
    words = f"{verdict}: {result['model']} version {result['version']}" + (f": {reasons}" if reasons else "")
    target = artifacts.mlflow_page(result["run_id"]) or artifacts.page()
    tell(pushed.repository, pushed.commit, pushed.recipe, VERDICTS.get(verdict, "error"), words, target)
    artifacts.show(pushed.recipe, result["run_id"], words)
    return Completed(name=verdict.capitalize(), message=words)


def _json(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and {"verdict", "run_id", "reasons"} <= found.keys() else None


def _error(lines: list[str]) -> str:
    """The command's error, to its end; its last line where it told none."""
    starts = [k for k, line in enumerate(lines) if line.startswith("error: ")]
    told = lines[starts[-1] :] if starts else lines[-1:]
    return "\n".join(told).removeprefix("error: ") or "the command said nothing"
