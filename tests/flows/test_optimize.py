"""The whole pipeline on the quick recipe: promoted, refused, built; again, killed, damaged."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import pytest

from flows.summary import table
from tasks import registry, registry_engine, store
from tasks.errors import InputError
from tasks.measurements import verdict_bytes
from tests.conftest import BRIEF

if TYPE_CHECKING:
    from flows.judge import Outcome

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent.parent
QUICK = "digits-cnn-int8-ptq"
Optimize = Callable[..., "Outcome"]


def artifacts(outcome: Outcome) -> Path:
    from mlflow.artifacts import download_artifacts

    registry.client()
    return Path(download_artifacts(run_id=outcome.version.run_id))


def test_a_good_engine_is_promoted_with_everything_that_shows_why(digits: Outcome) -> None:
    assert digits.verdict == "promoted"
    assert digits.version.alias == "champion"
    assert digits.metrics["candidate_accuracy"] > 0.93
    folder = artifacts(digits)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest == json.loads(Path(digits.version.manifest).read_text())
    assert manifest["engines"]["candidate"]["proved"] == "executed"
    assert manifest["quantizers"]["weights"] == 5
    assert manifest["engines"]["candidate"]["facts"]["proof"]["quantized_share"] > 0.9
    assert digits.attempt.verdict is not None
    assert "quantized_share" in {rule.name for rule in digits.attempt.verdict.rules}
    assert manifest["data"]["rows"] == {"train": 1000, "calibration": 128, "test": 797}
    assert {"commit", "dirty"} <= set(manifest["code"])
    assert manifest["versions"]["onnxruntime"]
    assert [stage["stage"] for stage in manifest["stages"]][:4] == [
        "load data",
        "load model",
        "fine-tune",
        "observe",
    ]
    names = ("gate.md", "gate.png", "measurements.json", "verdict.json")
    others = ("checkpoint/model.safetensors", "onnx/candidate/model.onnx", "engines/baseline/engine.json")
    for name in (*(f"gate/{name}" for name in names), *others):
        assert (folder / name).is_file(), name


def test_the_registry_says_why(digits: Outcome) -> None:
    version = registry.client().get_model_version(digits.version.model, digits.version.version)
    assert version.tags["gate"] == "passed"
    assert version.tags["proved"] == "executed"
    assert "accuracy" in version.description
    run = registry.client().get_run(version.run_id)
    assert run.data.params["quantize.format"] == "int8"
    assert run.data.metrics["baseline_accuracy"] == digits.metrics["baseline_accuracy"]
    curve = registry.client().get_metric_history(version.run_id, "baseline_loss")
    assert len(curve) > 10
    assert curve[-1].value < curve[0].value


def test_the_verdict_can_be_recomputed_from_what_was_logged(
    digits: Outcome, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    from flows.__main__ import main

    logged = artifacts(digits) / "gate" / "verdict.json"
    assert main(["verdict", digits.version.run_id]) == 0
    assert capfdbinary.readouterr().out == logged.read_bytes() + b"\n"
    content = logged.read_bytes()
    try:
        for forged in ((b'"passed":true', b'"passed":false'), (b'"value":0', b'"value":1')):
            assert content.count(forged[0])
            logged.write_bytes(content.replace(*forged, 1))
            assert main(["verdict", digits.version.run_id]) == 1
        logged.write_bytes(content.replace(b"the candidate ran on its target", b"words of another release"))
        assert main(["verdict", digits.version.run_id]) == 0
    finally:
        logged.write_bytes(content)
    assert main(["verdict", "0" * 32]) == 2


def test_a_second_run_reuses_every_stage_and_registers_nothing_new(
    digits: Outcome, optimize: Optimize
) -> None:
    again = optimize(QUICK)
    assert again.attempt.timeline
    assert all(timing.reused for timing in again.attempt.timeline), again.attempt.timeline
    assert (again.verdict, again.version) == ("promoted", digits.version)
    assert again.metrics == pytest.approx(digits.metrics)
    assert again.attempt.verdict is not None
    assert digits.attempt.verdict is not None
    assert verdict_bytes(again.attempt.verdict) == verdict_bytes(digits.attempt.verdict)


def test_only_what_a_changed_line_affects_runs_again(digits: Outcome, optimize: Optimize) -> None:
    changed = optimize(QUICK, "benchmark={rounds: 7, precision: 1.0e-9}", "promote=manual")
    fresh = [timing.stage for timing in changed.attempt.timeline if not timing.reused]
    assert fresh == ["benchmark", "gate"]
    assert changed.attempt.timing is not None
    assert changed.attempt.timing.facts["rounds"] == 7, "no rule judges latency, so nothing needs more"
    assert changed.verdict == "registered"
    assert changed.version.gate == "passed"
    assert changed.version.alias is None


def test_an_edited_network_is_trained_again(
    optimize: Optimize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.retrain import retrain

    monkeypatch.syspath_prepend(tmp_path)
    source = Path(sys.modules["recipes"].__file__ or "").with_name("digits_cnn.py").read_text()
    (tmp_path / "own_network.py").write_text(source)
    settings = ("model.source=python:own_network:build", "model.name=digits-own-network")
    optimize(QUICK, *settings)
    assert retrain("digits-own-network").verdict == "unchanged"
    (tmp_path / "own_network.py").write_text(source + "# edited")
    monkeypatch.setattr("flows.retrain.load_data", Mock(side_effect=InputError("it goes on")))
    with pytest.raises(InputError, match="it goes on"):
        retrain("digits-own-network")
    again = optimize(QUICK, *settings)
    assert "fine-tune" in {timing.stage for timing in again.attempt.timeline if not timing.reused}


def test_an_edited_metric_function_is_judged_again(
    digits: Outcome, optimize: Optimize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.retrain import retrain

    monkeypatch.syspath_prepend(tmp_path)

    def judged(value: float) -> tuple[Outcome, set[str]]:
        (tmp_path / "own_metric.py").write_text(f"def score(predictions, references):\n    return {value}\n")
        sys.modules.pop("own_metric", None)
        found = optimize(QUICK, "gate.metric=python:own_metric:score", "model.name=digits-own-metric")
        return found, {timing.stage for timing in found.attempt.timeline if not timing.reused}

    first, fresh = judged(0.5)
    assert {"evaluate", "gate"} <= fresh
    again, fresh = judged(0.5)
    assert (again.version, fresh) == (first.version, set())
    edited, fresh = judged(0.75)
    assert fresh == {"evaluate", "gate"}
    assert "python:own_metric:score" in edited.attempt.verdict.rules[1].sentence
    assert edited.attempt.verdict.rules[1].facts["candidate"] == 0.75
    assert retrain("digits-own-metric").verdict == "unchanged"
    with (tmp_path / "own_metric.py").open("a") as file:
        file.write("# edited")
    monkeypatch.setattr("flows.retrain.load_data", Mock(side_effect=InputError("it goes on")))
    with pytest.raises(InputError, match="it goes on"):
        retrain("digits-own-metric")


def test_a_refused_candidate_is_logged_and_gets_no_alias(digits: Outcome, optimize: Optimize) -> None:
    refused = optimize(QUICK, "gate.max_size_ratio=0.01")
    assert refused.verdict == "refused"
    assert any("size" in reason for reason in refused.reasons)
    version = registry.client().get_model_version(refused.version.model, refused.version.version)
    assert version.tags["gate"] == "refused"
    assert "size" in version.description
    assert "champion" not in version.aliases
    found = registry.client().get_model_version_by_alias("digits-cnn", "champion")
    assert str(found.version) == digits.version.version
    with pytest.raises(AssertionError, match="gate=refused"):
        registry.promote.fn(refused.version, digits.version.version)


def test_a_champion_is_measured_beside_the_next_candidate(digits: Outcome, optimize: Optimize) -> None:
    better = optimize(QUICK, "finetune.seed=1", "model.name=digits-cnn")
    assert better.attempt.engines["champion"] == digits.attempt.engines["candidate"]
    assert "champion_accuracy" in better.metrics
    assert better.attempt.engines["candidate"].plan == digits.attempt.engines["candidate"].plan
    assert better.attempt.engines["candidate"].weights != digits.attempt.engines["candidate"].weights
    assert _plan_of(better) == _plan_of(digits)
    assert {rule.name for rule in better.attempt.verdict.rules if "champion" in rule.sentence}  # type: ignore[union-attr]
    with pytest.raises(InputError, match="took the alias meanwhile"):
        registry.promote.fn(digits.version, None)
    registry.client().set_registered_model_alias("digits-cnn", "champion", digits.version.version)


def _plan_of(outcome: Outcome) -> str:
    """The address that a registered version refers to; it must not hold a plan itself."""
    from mlflow.artifacts import download_artifacts

    registry.client()
    folder = Path(download_artifacts(f"models:/{outcome.version.model}/{outcome.version.version}"))
    assert not (folder / "artifacts" / "engine" / "plan").exists()
    assert (folder / "artifacts" / "engine" / "weights").is_dir()
    return str(json.loads((folder / "artifacts" / "engine" / "engine.json").read_text())["plan_address"])


@pytest.mark.long
def test_a_champion_that_cannot_be_measured_is_not_passed_over(digits: Outcome, optimize: Optimize) -> None:
    """Here: one with its labels in another order. The rule says so and follows `on_missing`."""
    labels = json.dumps([str(digit) for digit in reversed(range(10))])
    assert optimize(QUICK, f"data.labels={labels}", "model.name=digits-odd").verdict == "promoted"
    stopped = optimize(QUICK, "model.name=digits-odd")
    assert stopped.verdict == "refused"
    assert any("has other labels" in reason for reason in stopped.reasons)
    allowed = optimize(QUICK, "model.name=digits-odd", "gate.on_missing=pass")
    assert allowed.verdict == "promoted"


def test_an_engine_that_cannot_run_here_is_built_and_waits(digits: Outcome, optimize: Optimize) -> None:
    pending = optimize(QUICK, "build.runtime=tensorrt-rtx", "model.name=digits-rtx")
    assert pending.verdict == "built"
    assert pending.attempt.engines["candidate"].proved == "built"
    version = registry.client().get_model_version("digits-rtx", pending.version.version)
    assert version.tags["gate"] == "pending"
    assert version.aliases == []
    assert pending.attempt.verdict is None


def test_a_damaged_artifact_is_made_again(digits: Outcome, optimize: Optimize) -> None:
    blob = digits.attempt.engines["candidate"].plan.blob
    for file in store.path(blob).rglob("*"):
        if file.is_file():
            file.write_bytes(b"\0" * 64)
    again = optimize(QUICK)
    assert again.verdict == "promoted"
    assert store.intact(blob)
    assert next(timing.stage for timing in again.attempt.timeline if not timing.reused) == "build"


def test_a_stacked_text_recipe_is_promoted_and_answers(tiny_recipe: Path, optimize: Optimize) -> None:
    """2:4, INT8 with embeddings and QAT; then texts in, labels and scores out, bad inputs named."""
    import mlflow

    outcome = optimize(str(tiny_recipe), "compare_calibrated=true")
    assert outcome.verdict == "promoted", outcome.reasons
    beside_what_it_was_before_its_second_training(outcome)
    manifest = json.loads(Path(outcome.version.manifest).read_text())
    assert manifest["sparsity"]["exact_modules"] == 13
    assert manifest["onnx"]["candidate"]["facts"]["sparse_weights"] == 13
    assert outcome.metrics["candidate_accuracy"] > 0.95
    model = mlflow.pyfunc.load_model("models:/tiny@champion")
    found = model.predict(["the plot was good 7", "a bad book", "good " * 500])
    assert [row["label"] for row in found] == ["good", "bad", "good"]
    assert all(0.5 < row["score"] <= 1 for row in found)
    assert len(model.predict(["a good book"] * 150)) == 150
    with pytest.raises(InputError, match="input 1: the text is empty"):
        model.predict(["a fine film", "  "])
    with pytest.raises(Exception, match="[Ii]ncompatible input types|cannot be converted|expected text"):
        model.predict([1.5])
    with pytest.raises(mlflow.MlflowException, match="missing inputs"):
        model.predict([])


def beside_what_it_was_before_its_second_training(outcome: Outcome) -> None:
    """Measured, shown and logged; not judged, not timed, and no engine of it in the registry."""
    attempt = outcome.attempt
    assert attempt is not None
    assert attempt.verdict is not None
    assert attempt.checkpoints["calibrated"].identity != attempt.checkpoints["candidate"].identity
    run = registry.client().get_run(outcome.version.run_id)
    assert run.data.metrics["calibrated_accuracy"] == outcome.metrics["calibrated_accuracy"]
    assert "calibrated" in table(outcome)
    assert not any("calibrated" in rule.sentence for rule in attempt.verdict.rules)
    assert not [name for name in outcome.metrics if name.startswith("calibrated_p50")]
    folder = artifacts(outcome)
    assert sorted(path.name for path in (folder / "engines").iterdir()) == ["baseline"]
    assert sorted(path.name for path in (folder / "onnx").iterdir()) == ["baseline", "candidate"]


def test_mlflow_serves_the_champion(digits: Outcome) -> None:
    import socket
    import urllib.request

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["mlflow", "models", "serve", "-m", "models:/digits-cnn@champion", "--env-manager", "local"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": registry_engine.default_uri(),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    address = f"http://127.0.0.1:{port}"
    serving = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        _wait(lambda: _answers(f"{address}/ping"), serving)
        body = json.dumps({"inputs": [[[[0.0] * 8] * 8]]}).encode()
        request = urllib.request.Request(
            f"{address}/invocations", body, {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            (row,) = json.loads(answer.read())["predictions"]
        assert set(row) == {"label", "score"}
    finally:
        os.killpg(serving.pid, signal.SIGKILL)
        serving.wait()


def _answers(address: str) -> bool:
    import urllib.request

    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except OSError:
        return False


def test_the_summary_leads_to_the_version_and_starts_nothing_that_reports(
    digits: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = table(digits)
    page = f"#/models/digits-cnn/versions/{digits.version.version}"
    assert f"http://127.0.0.1:5000/{page}" in said
    for quiet in ("MLFLOW_DISABLE_TELEMETRY=true", "PREFECT_SERVER_ANALYTICS_ENABLED=false"):
        assert quiet in said
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example.org")
    assert f"MLflow    http://mlflow.example.org/{page}\n" in table(digits)


def test_the_summary_tells_short_calls_apart(digits: Outcome) -> None:
    short = {"candidate_p50_b1": 3.1e-5, "candidate_p99_b1": 9.9e-3}
    assert " 0.031/9.9 " in table(replace(digits, metrics=digits.metrics | short))


def test_serving_needs_neither_torch_nor_modelopt_and_unpickles_nothing(
    digits: Outcome, tmp_path: Path
) -> None:
    """By the address that the README gives, which is that of the state folder at its usual place."""
    (tmp_path / ".enginehouse").symlink_to(store.home())
    (export,) = re.findall(r"^export MLFLOW_TRACKING_URI=.*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    code = """
import sys, json, pickle, numpy, mlflow
def refuse(*a, **k): raise RuntimeError("unpickled")
pickle.load = pickle.loads = pickle.Unpickler = refuse
model = mlflow.pyfunc.load_model("models:/digits-cnn@champion")
found = model.predict(numpy.zeros((3, 1, 8, 8), numpy.float32))
assert not {"torch", "modelopt", "transformers"} & set(sys.modules), "heavy"
print(json.dumps(found))
"""
    done = subprocess.run(
        ["bash", "-c", f'{export}\nexec "$0" -c "$1"', sys.executable, code],
        cwd=tmp_path,
        env=environment | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 3
    assert set(found[0]) == {"label", "score"}
    assert found[0]["label"] in digits.attempt.dataset.labels


def test_a_killed_run_started_again_repeats_no_finished_stage(tmp_path: Path, prefect_server: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    environment |= {"ENGINEHOUSE_HOME": str(tmp_path), "PREFECT_API_URL": prefect_server}
    environment |= {"PREFECT_LOCAL_STORAGE_PATH": str(tmp_path / "results")}
    less = ("--set", "finetune.epochs=2", "--set", BRIEF[0])
    command = [sys.executable, "-m", "flows", "optimize", QUICK, *less]
    log = tmp_path / "log"
    with log.open("w") as out:
        running = subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=out, stdout=out, start_new_session=True
        )
        _wait(lambda: "calibrate …" in log.read_text(), running)
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    done = subprocess.run(
        [*command, "--json"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode in (0, 3), done.stderr
    for stage in ("load data", "load model", "fine-tune"):
        assert f"{stage}: reused" in done.stderr
    assert "calibrate: reused" not in done.stderr
    last: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    keys = {"verdict", "recipe", "model", "version", "alias", "reasons", "metrics", "run_id", "manifest"}
    assert set(last) == keys
    assert {"promoted": 0, "refused": 3}[last["verdict"]] == done.returncode


def _wait(ready: Callable[[], bool], running: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 300
    while not ready():
        assert running.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.1)
