"""The manifest that is kept on this machine: whole, or fetched again."""

from __future__ import annotations

import json
import resource
from typing import TYPE_CHECKING

import pytest

from tasks import registry, registry_engine, store

if TYPE_CHECKING:
    from mlflow import MlflowClient

CONTENT = {"plan": "0" * 200_000}
ROOM = 1 << 16  # bytes; less than the content


@pytest.fixture
def run(own_mlflow: MlflowClient) -> str:
    """A run with a manifest."""
    made = own_mlflow.create_run(registry_engine.experiment_id(registry_engine.EXPERIMENT))
    own_mlflow.log_text(made.info.run_id, json.dumps(CONTENT), "manifest.json")
    return str(made.info.run_id)


@pytest.mark.parametrize("left", [0, 1, 1000])
def test_a_manifest_that_was_cut_off_is_fetched_again(run: str, left: int) -> None:
    place = registry.manifest_file(run)
    place.write_text(place.read_text()[:left])
    assert registry.noted(run) == CONTENT


def test_a_disk_that_fills_up_leaves_no_half_of_a_manifest(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    before, load = resource.getrlimit(resource.RLIMIT_FSIZE), mlflow.artifacts.load_text

    def load_then_fill(uri: str) -> str:
        text: str = load(uri)
        resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, before[1]))
        return text

    with monkeypatch.context() as patched:
        patched.setattr(mlflow.artifacts, "load_text", load_then_fill)
        try:
            with pytest.raises(OSError):
                registry.manifest_file(run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((store.home() / "manifests").iterdir())
    assert registry.noted(run) == CONTENT
