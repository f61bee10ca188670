"""While MLflow has trouble: what cannot be told from garbage stays, what cannot be sent is no damage."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from tasks import ledger, registry, registry_alias, registry_engine, registry_garbage, store
from tasks.artifacts import Blob
from tasks.errors import InputError
from tasks.prune import remove, survey

ROOT = "/api/2.0/mlflow-artifacts/artifacts"


class Proxy(ThreadingHTTPServer):
    """MLflow's artifact proxy on a folder; `trouble` is the status that it gives instead of a file."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.folder, self.trouble = folder, 0
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}{ROOT}"


class _Handler(BaseHTTPRequestHandler):
    server: Proxy

    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        place = self.server.folder / asked.path.removeprefix(ROOT).strip("/")
        if asked.query:
            folder = self.server.folder / parse_qs(asked.query)["path"][0]
            names = sorted(file.name for file in folder.glob("*"))
            files = [{"path": name, "is_dir": False, "file_size": 1} for name in names]
            self._answer(200, json.dumps({"files": files}).encode())
        elif self.server.trouble or not place.is_file():
            self._answer(self.server.trouble or 404, b"")
        else:
            self._answer(200, place.read_bytes())

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: Any) -> None:
        pass


@pytest.fixture
def proxy(tmp_path: Path, own_mlflow: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """An MLflow of this test's own, whose runs keep their files behind the proxy."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "files").mkdir()
    with Proxy(tmp_path / "files") as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        own_mlflow.create_experiment(registry_engine.EXPERIMENT, f"{server.url}/runs")
        yield server
        server.shutdown()


def plan() -> Blob:
    """A plan that MLflow holds once for all."""
    with store.staging() as folder:
        (folder / "plan").mkdir()
        (folder / "plan" / "model.plan").write_text("a plan")
        blob = store.commit(folder / "plan")
    registry_engine.shared(blob, "plan", "plan", {})
    return blob


def whole_run(proxy: Proxy, content: str) -> str:
    """A run of the pipeline that has logged this manifest."""
    client = registry_alias.client()
    run = client.create_run(registry_engine.experiment_id(registry_engine.EXPERIMENT))
    client.set_tag(run.info.run_id, "gate", "passed")
    place = proxy.folder / "runs" / run.info.run_id / "artifacts" / "manifest.json"
    place.parent.mkdir(parents=True)
    place.write_text(content)
    return str(run.info.run_id)


def shared_garbage() -> list[str]:
    return [found.place for found in survey(days=0).garbage if found.kind == "shared"]


def test_a_plan_is_garbage_only_when_no_manifest_names_it(proxy: Proxy) -> None:
    blob = plan()
    run = whole_run(proxy, json.dumps({"plan": blob.sha256}))
    assert not shared_garbage()
    registry_alias.client().delete_run(run)
    (found,) = shared_garbage()
    registry_garbage.delete_shared(found)
    assert not shared_garbage()


@pytest.mark.parametrize("trouble", [500, 503])
def test_what_the_server_cannot_send_now_is_no_damage(proxy: Proxy, trouble: int) -> None:
    """A version would lose its alias for it."""
    run = whole_run(proxy, "{}")
    assert registry.manifest_of(run) == {}
    proxy.trouble = trouble
    with pytest.raises(MlflowException, match="MLflow has it and did not send it"):
        registry.manifest_of(run)
    proxy.trouble = 0
    (proxy.folder / "runs" / run / "artifacts" / "manifest.json").unlink()
    with pytest.raises(InputError, match="an artifact is not in MLflow"):
        registry.manifest_of(run)


@pytest.mark.parametrize("trouble", [500, 503, 404])
def test_a_manifest_that_cannot_be_read_now_stops_pruning(proxy: Proxy, trouble: int) -> None:
    """Also where the server has lost the file of a run that is there: what the run named is not known."""
    blob = plan()
    whole_run(proxy, json.dumps({"plan": blob.sha256}))
    proxy.trouble = trouble
    with pytest.raises(InputError, match="nothing was removed: the manifest of MLflow's run"):
        survey(days=0)
    proxy.trouble = 0
    assert not shared_garbage()


def test_a_manifest_that_cannot_be_kept_here_stops_pruning(proxy: Proxy) -> None:
    run = whole_run(proxy, json.dumps({"plan": plan().sha256}))
    (store.home() / "manifests").write_text("no folder: nothing can be written below it")
    with pytest.raises(InputError, match=f"{run} cannot be read"):
        survey(days=0)


def test_half_a_manifest_stops_pruning(proxy: Proxy) -> None:
    run = whole_run(proxy, json.dumps({"plan": plan().sha256})[:40])
    with pytest.raises(InputError, match=f"{run} cannot be read"):
        survey(days=0)


def test_runs_that_are_gone_for_good_and_strangers_stop_nothing(proxy: Proxy) -> None:
    plan()
    stranger = registry_alias.client().create_run("0").info.run_id
    for run in ("0" * 32, stranger):
        ledger.append("m", "refused", actor="a", run_id=run)
    lost = whole_run(proxy, "{}")
    (proxy.folder / "runs" / lost / "artifacts" / "manifest.json").unlink()
    with pytest.raises(InputError, match="once you delete it in MLflow"):
        survey(days=0)
    registry_alias.client().delete_run(lost)
    assert len(shared_garbage()) == 1


def test_a_removal_that_is_cut_off_leaves_no_plan_without_files(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository as Files

    blob = plan()
    (found,) = (each for each in survey(days=0).garbage if each.kind == "shared")

    def killed(*_arguments: Any) -> None:
        remove_files(*_arguments)
        raise KeyboardInterrupt

    remove_files = Files.delete_artifacts
    monkeypatch.setattr(Files, "delete_artifacts", killed)
    with pytest.raises(KeyboardInterrupt):
        remove(found)
    address = registry_engine.shared(blob, "plan", "plan", {})
    assert (registry_engine.fetch(address, tmp_path / "again") / "model.plan").read_text() == "a plan"
