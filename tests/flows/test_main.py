"""The command line: what it answers before anything heavy is imported, and its exit statuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flows.__main__ import main
from tasks import registry, store
from tasks.artifacts import Blob

if TYPE_CHECKING:
    from mlflow import MlflowClient

ROOT = Path(__file__).resolve().parent.parent.parent
QUICK = "digits-cnn-int8-ptq"
OURS = ("PREFECT_LOCAL_STORAGE_PATH", "MLFLOW_TRACKING_URI")  # of this session's folder


def flows(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "flows", *arguments],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k not in OURS} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def imported(done: subprocess.CompletedProcess[str]) -> set[str]:
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}


def told(done: subprocess.CompletedProcess[str]) -> str:
    return "\n".join(line for line in done.stderr.splitlines() if not line.startswith("import time:"))


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["optimize", "--help"], 0),
        (["recipes"], 0),
        (["optimize", "no-such-recipe"], 2),
        (["optimize", QUICK, "--set", "quantise.format=int8"], 2),
        (["optimise", QUICK], 2),
        (["override", "digits-cnn", "1", "--by", " ", "--reason", "because"], 2),
        (["override", "digits-cnn", "1"], 2),
        (["rollback", "--help"], 0),
        (["history"], 2),
        ([], 2),
    ],
)
def test_help_and_mistakes_answer_before_anything_heavy_is_imported(
    arguments: list[str], status: int
) -> None:
    done = flows(*arguments)
    assert done.returncode == status
    assert not imported(done) & {"prefect", "mlflow", "torch", "modelopt", "transformers", "onnx", "numpy"}
    assert "Traceback" not in done.stderr


def test_a_mistake_in_the_recipe_is_told_with_the_way_out() -> None:
    assert "did you mean quantize?" in told(flows("optimize", QUICK, "--set", "quantise.format=int8"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("gate.metric=acuracy", "accuracy"),
        ("data.label=class", "no column 'class'"),
        ('data.labels=["0", "1"]', "unknown label"),
        ("gate.metric=perplexity", "image-classification gives label and probability"),
        ("gate.metric=precision", "cannot judge 10 classes"),
        ("gate.max_drop=2", "2 points are 0.02"),
        ("gate.max_forgetting=2", "2 points are 0.02"),
        ("data.image.shape=[3, 8, 8]", "needs 192 columns"),
        ("model.source=python:recipes.digits_cnn:none", "cannot be imported"),
        ("quantize.exclude=[net.1]", "'net.1' matches no module"),
    ],
)
@pytest.mark.slow
def test_bad_input_is_told_in_words_and_registers_nothing(
    override: str, words: str, optimize: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """In this process; the test after this one has a whole command."""
    less = ("--set", "model.name=nobody", "--set", "finetune.epochs=1")
    assert main(["optimize", QUICK, "--set", override, *less]) == 2
    said = capfd.readouterr().err
    assert words in said
    assert "Traceback" not in said
    failed(registry.client(), words, "nobody")


@pytest.mark.parametrize(
    "arguments", [["retrain", "nobody"], ["watch", "nobody", "--data", "x"], ["verify", "nobody"]]
)
def test_a_model_that_is_not_registered_is_told_before_a_run_begins(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for flow in ("flows.retrain.retrain", "flows.watch.watch"):
        monkeypatch.setattr(flow, lambda *_: pytest.fail("a run began"))
    assert main(arguments) == 2
    assert "no model is registered as 'nobody'; there are: " in capsys.readouterr().err


@pytest.mark.slow
def test_a_whole_command_tells_it_too(tmp_path: Path) -> None:
    """In a state folder of its own, with the server that it starts."""
    from mlflow import MlflowClient

    override = "data.source=path:/no/such/file.csv"
    done = flows("optimize", QUICK, "--set", override, ENGINEHOUSE_HOME=str(tmp_path))
    assert done.returncode == 2, told(done)
    assert "no such file or folder" in told(done)
    assert "Traceback" not in done.stderr
    failed(MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}"), "no such file or folder", "digits-cnn")


def failed(client: MlflowClient, words: str, model: str) -> None:
    """The last run is logged as failed, and there is no such model."""
    assert client.search_registered_models(f"name = '{model}'") == []
    place = client.get_experiment_by_name("enginehouse").experiment_id
    (run,) = client.search_runs([place], order_by=["start_time DESC"], max_results=1)
    assert run.info.status == "FAILED"
    assert words in run.data.tags["error"]


def test_a_full_disk_is_told_in_words(tmp_path: Path) -> None:
    """On a real file system of 4 MB, which only root can make."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        done = flows("optimize", QUICK, ENGINEHOUSE_HOME=str(tmp_path))
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert done.returncode == 2
    assert "the disk is full" in told(done)


@pytest.mark.slow
def test_pruning_frees_a_full_disk_but_not_of_what_it_cannot_know(
    fresh_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    before = mlflow.get_tracking_uri()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(store, "LEAST_FREE", 1 << 62)

    def orphan() -> Blob:
        with store.staging() as folder:
            (folder / "orphan").write_text("nothing refers to this")
            return store.commit(folder)

    try:
        assert main(["optimize", QUICK]) == 2
        first = orphan()
        assert main(["prune", "--days", "0", "--delete"]) == 0
        assert not store.intact(first)
        mlflow_client = registry.client(room=False)
        run = mlflow_client.create_run(
            mlflow_client.create_experiment("enginehouse"), tags={"gate": "passed"}
        )
        kept = orphan()
        assert main(["prune", "--days", "0", "--delete"]) == 2
        assert f"the manifest of MLflow's run {run.info.run_id} cannot be read" in capsys.readouterr().err
        assert store.intact(kept)
    finally:
        mlflow.set_tracking_uri(before)


def test_a_state_folder_that_cannot_be_written_is_told_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = flows("optimize", QUICK, ENGINEHOUSE_HOME=str(tmp_path / "file" / "home"))
    assert done.returncode == 2
    assert "set ENGINEHOUSE_HOME to a folder that is" in told(done)
