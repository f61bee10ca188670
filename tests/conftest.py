"""Every test session has a state folder of its own; set before Prefect and MLflow are imported."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

HOME = Path(tempfile.mkdtemp(prefix="enginehouse-tests-"))
os.environ["ENGINEHOUSE_HOME"] = str(HOME)
for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME", "PREFECT_PROFILE"):
    os.environ.pop(name, None)

import flows  # noqa: E402, F401  applies the settings

if TYPE_CHECKING:
    from flows.optimize import Outcome

ROOT = Path(__file__).resolve().parent.parent


def pytest_sessionfinish() -> None:
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture
def fresh_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of this test's own."""
    monkeypatch.setenv("ENGINEHOUSE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def optimize() -> Callable[..., Outcome]:
    """Run a recipe in this process, on the session's state folder."""
    from flows.optimize import optimize
    from tasks import store

    store.prepare()

    def run(recipe: str, *overrides: str) -> Any:
        return optimize(recipe, list(overrides))

    return run


@pytest.fixture(scope="session")
def digits(optimize: Callable[..., Outcome]) -> Outcome:
    """The quick recipe, run once."""
    return optimize("digits-cnn-int8-ptq")
