"""Retraining a registered model: refit or rebuild, forget nothing, do nothing twice; watch it and prune."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml

import recipes
from tasks import lineage, registry, registry_engine, resume, store
from tasks.errors import InputError
from tests.conftest import WORDS, sentences

if TYPE_CHECKING:
    from flows.judge import Outcome

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def recipe(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe under a name of its own, on the first 600 rows."""
    folder = tmp_path_factory.mktemp("retrain")
    content = yaml.safe_load(tiny_recipe.read_text())
    content["model"]["name"] = "again"
    content["data"]["source"] = f"path:{sentences(folder / 'rows.jsonl', range(600))}"
    content["gate"] = {"max_drop": 0.05, "max_forgetting": 0.05}
    content["retrain"] = {"epochs": 1, "batch_size": 8, "learning_rate": 5e-4}
    (folder / "again.yaml").write_text(yaml.safe_dump(content))
    return folder / "again.yaml"


@pytest.fixture(scope="module")
def first(optimize: Callable[..., Outcome], recipe: Path) -> Outcome:
    outcome = optimize(str(recipe))
    assert outcome.verdict == "promoted", outcome.reasons
    return outcome


@pytest.fixture(scope="module")
def more(recipe: Path) -> Path:
    """The same rows and two hundred new ones."""
    return sentences(recipe.parent / "more.jsonl", range(800))


@pytest.fixture(scope="module")
def second(first: Outcome, more: Path) -> Outcome:
    return retrain("again", data=str(more))


def retrain(model: str, **arguments: Any) -> Outcome:
    from flows.retrain import retrain

    found: Outcome = retrain(model, **arguments)
    return found


def champion(model: str = "again") -> str:
    current = registry.current(model)
    assert current is not None
    return current.version


def files(run_id: str) -> set[str]:
    from mlflow.artifacts import download_artifacts

    registry.client()
    folder = Path(download_artifacts(run_id=run_id))
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_nothing_changed_does_nothing_and_says_so(first: Outcome) -> None:
    again = retrain("again")
    assert again.verdict == "unchanged"
    assert again.attempt is None
    assert again.version == first.version
    assert "nothing was trained" in again.reasons[0]


def test_more_data_refits_the_plan_and_keeps_what_was_learned(first: Outcome, second: Outcome) -> None:
    assert second.verdict == "promoted", second.reasons
    assert champion() == second.version.version != first.version.version
    facts = lineage.manifest(second.version)["retrained"]
    assert (facts["engine"], facts["from_version"]) == ("refitted", first.version.version)
    assert facts["seconds"]["refit"] > 0
    assert facts["seconds"]["build"] > 0
    assert second.attempt is not None
    assert first.attempt is not None
    new, old = second.attempt.engines["candidate"], first.attempt.engines["candidate"]
    assert new.plan.blob == old.plan.blob
    assert new.weights != old.weights
    assert second.attempt.verdict is not None
    names = {rule.name for rule in second.attempt.verdict.rules}
    assert any("forgetting" in name for name in names), names
    assert [timing.stage for timing in second.attempt.timeline][:3] == [
        "load data",
        "recalibrate",
        "fine-tune",
    ]


TAUGHT = {"weight": 0.5}


def empty_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine's: everything comes from the registry."""
    monkeypatch.setattr(store, "intact", lambda blob: False)


def test_the_teacher_of_retrains_alone_is_kept(
    first: Outcome, recipe: Path, optimize: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    later = optimize(str(recipe), "model.name=later", f"retrain.distill={TAUGHT}")
    assert later.attempt is not None
    empty_store(monkeypatch)
    assert lineage.teacher(later.version).blob == later.attempt.checkpoints["baseline"].blob
    with pytest.raises(InputError, match="again version 1 has no teacher .* retrain without distill"):
        lineage.teacher(first.version)


def test_a_version_that_waited_for_its_gate_is_judged_and_keeps_its_teacher(
    recipe: Path, optimize: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.pending import judge_pending
    from tasks import build

    overrides = [
        "model.name=taught",
        "qat.epochs=0.5",
        f"qat.distill={TAUGHT}",
        "retrain.epochs=0.5",
        f"retrain.distill={TAUGHT}",
        "gate={max_drop: 0.5, on_coarse: warn}",
        "benchmark.round_ms=1",
    ]
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(build, "installed", lambda runtime: None)
        waiting = optimize(str(recipe), *overrides)
    assert waiting.version.gate == "pending"
    judged = judge_pending("taught", waiting.version.version)
    assert judged.verdict == "promoted", judged.reasons
    learned = retrain("taught", rebuild=True)
    assert waiting.attempt is not None
    teacher = waiting.attempt.checkpoints["baseline"]
    empty_store(monkeypatch)
    for version in (waiting.version, judged.version, learned.version):
        assert lineage.teacher(version).blob == teacher.blob


def test_mask_and_quantizers_stay_as_the_recipe_says(first: Outcome, second: Outcome) -> None:
    assert first.attempt is not None
    assert second.attempt is not None
    before, after = (o.attempt.checkpoints["candidate"].facts for o in (first, second) if o.attempt)
    assert after["sparsity"] == before["sparsity"]
    assert after["sparsity"]["valid_groups"] == after["sparsity"]["groups"] > 0
    assert after["quantizers"] == before["quantizers"]
    assert second.attempt.onnx["candidate"].facts["sparse_weights"] == after["sparsity"]["modules"]


def test_a_retrain_adds_weights_and_checkpoint_and_shares_the_plan(first: Outcome, second: Outcome) -> None:
    logged = files(second.version.run_id)
    assert "checkpoint/model.safetensors" in logged
    assert not [name for name in logged if name.startswith(("onnx/", "engines/"))]
    plans = registry.client().search_runs(
        [registry.client().get_experiment_by_name("enginehouse-plans").experiment_id],
        filter_string=f"tags.plan = '{second.attempt.engines['candidate'].plan.blob.sha256}'",
    )
    assert len(plans) == 1
    assert lineage.manifest(second.version)["retrained"]["baseline_run"] == first.version.run_id


def test_the_same_data_again_is_nothing_new_wherever_it_lies(second: Outcome, more: Path) -> None:
    elsewhere = more.parent / "moved.jsonl"
    elsewhere.write_bytes(more.read_bytes())
    again = retrain("again", data=str(elsewhere))
    assert (again.verdict, again.version) == ("unchanged", second.version)


def test_a_refused_retrain_changes_nothing_that_serves(second: Outcome) -> None:
    before = champion()
    refused = retrain("again", overrides=["gate.max_size_ratio=0.01"])
    assert refused.verdict == "refused"
    assert "size" in refused.reasons[0]
    assert refused.version.alias is None
    assert champion() == before
    assert retrain("again", overrides=["gate.max_size_ratio=0.01"]).verdict == "unchanged"


def test_a_build_that_was_asked_for_is_built(second: Outcome, more: Path) -> None:
    built = retrain("again", data=str(more), rebuild=True)
    assert built.attempt is not None
    assert built.attempt.retrained is not None
    assert built.attempt.retrained["engine"] == "built"
    assert "asked for" in built.attempt.retrained["why"]
    assert "build" in [timing.stage for timing in built.attempt.timeline]


def test_a_refit_that_lies_is_found_and_built_instead(
    second: Outcome, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call says that all is well; only the outputs are wrong."""
    from tasks.engines import onnxruntime as engine

    honest = engine._same_plan

    def lying(model: Any, plan: Path, weights: Path) -> None:
        for tensor in model.graph.initializer:
            if tensor.data_type == 1 and tensor.dims:
                values = np.frombuffer(tensor.raw_data, np.float32) * np.float32(-3)
                tensor.raw_data = values.tobytes()
        honest(model, plan, weights)

    monkeypatch.setattr(engine, "_same_plan", lying)
    newest = sentences(recipe.parent / "newest.jsonl", range(820))
    outcome = retrain("again", data=str(newest))
    assert outcome.attempt is not None
    assert outcome.attempt.retrained is not None
    assert outcome.attempt.retrained["engine"] == "built"
    assert "other outputs" in outcome.attempt.retrained["why"]
    assert outcome.verdict == "promoted", outcome.reasons


@pytest.mark.long
def test_a_newer_recipe_compresses_from_the_champions_weights(second: Outcome, recipe: Path) -> None:
    content = yaml.safe_load(recipe.read_text())
    del content["sparsify"]
    (recipe.parent / "dense.yaml").write_text(yaml.safe_dump(content))
    outcome = retrain("again", recipe=str(recipe.parent / "dense.yaml"))
    assert outcome.attempt is not None
    stages = [timing.stage for timing in outcome.attempt.timeline]
    assert stages[1:6] == ["strip", "fine-tune", "observe", "calibrate", "fine-tune"]
    assert "sparsity" not in outcome.attempt.checkpoints["candidate"].facts


def test_what_cannot_be_retrained_is_told(second: Outcome, recipe: Path) -> None:
    with pytest.raises(InputError, match="no champion to retrain"):
        retrain("nobody")
    with pytest.raises(InputError, match="no such file"):
        retrain("again", data="nowhere.jsonl")
    with pytest.raises(Exception, match="is of model digits-cnn, not of again"):
        retrain("again", recipe="digits-cnn-int8-ptq")


OTHERWISE = ("data.max_length=8", "data.labels=[good, bad]")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (OTHERWISE[0], "data.max_length: again version .* made with 16, the recipe says 8"),
        (OTHERWISE[1], r"data.labels: again version .* made with \['bad', 'good'\], .* start anew"),
    ],
)
def test_what_the_network_goes_on_with_is_not_changed_in_silence(
    second: Outcome, more: Path, override: str, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        retrain("again", data=str(more), overrides=[override])


def test_weights_from_elsewhere_bring_their_own_length_and_no_other_labels(second: Outcome) -> None:
    changed = [recipes.parse(lineage.recipe(second.version), [o], "") for o in OTHERWISE]
    lineage.check_inputs(second.version, changed[0], given=True)
    with pytest.raises(InputError, match="data.labels"):
        lineage.check_inputs(second.version, changed[1], given=True)


def test_on_a_machine_that_has_only_the_registry(
    second: Outcome, recipe: Path, tmp_path: Path, prefect_server: str
) -> None:
    newest = sentences(tmp_path / "newest.jsonl", range(840))
    environment = os.environ | {
        "ENGINEHOUSE_HOME": str(tmp_path / "home"),
        "PREFECT_API_URL": prefect_server,
        "PREFECT_LOCAL_STORAGE_PATH": str(tmp_path / "results"),
        "MLFLOW_TRACKING_URI": registry_engine.default_uri(),
    }
    command = [sys.executable, "-m", "flows", "retrain", "again", "--data", str(newest), "--json"]
    killed = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stderr=(tmp_path / "log").open("w"),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    end = time.monotonic() + 240
    while "export …" not in (tmp_path / "log").read_text():
        assert killed.poll() is None, (tmp_path / "log").read_text()[-2000:]
        assert time.monotonic() < end
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 3), done.stderr[-2000:]
    for name in ("load data", "recalibrate", "fine-tune"):
        assert f"{name}: reused" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["verdict"] in ("promoted", "refused")


def test_a_checkpoint_quantized_elsewhere_goes_straight_to_the_gate(
    optimize: Callable[..., Outcome], recipe: Path, first: Outcome
) -> None:
    from recipes.int8_checkpoint import make

    content = yaml.safe_load(recipe.read_text())
    start = Path(content["model"]["source"].removeprefix("path:"))
    rows = [(f"{WORDS[2 + k % 8]} {'good' if k % 2 else 'bad'} {k}", k % 2) for k in range(320)]
    folder = recipe.parent / "elsewhere"
    make(start, rows, folder, epochs=6, learning_rate=2e-3)
    for name in ("finetune", "sparsify", "quantize", "qat", "retrain"):
        del content[name]
    content["model"] = {"name": "given", "source": f"modelopt:{folder}"}
    content["gate"] = {"max_drop": 0.05}
    (recipe.parent / "given.yaml").write_text(yaml.safe_dump(content))
    given = optimize(str(recipe.parent / "given.yaml"))
    assert given.verdict == "promoted", given.reasons
    assert given.attempt is not None
    stages = [timing.stage for timing in given.attempt.timeline]
    assert stages[:4] == ["load data", "load model", "strip", "export"]
    assert given.attempt.engines["candidate"].format == "int8"
    assert given.attempt.engines["baseline"].format == "fp32"
    assert retrain("given").verdict == "unchanged"
    make(start, rows, recipe.parent / "later", epochs=7, learning_rate=2e-3)
    later = retrain("given", checkpoint=str(recipe.parent / "later"))
    assert later.attempt is not None
    assert later.attempt.retrained is not None
    assert later.attempt.retrained["engine"] == "refitted", later.attempt.retrained["why"]
    with pytest.raises(
        InputError, match=r"--checkpoint: path:.* is not pruned or quantized, and this model's"
    ):
        retrain("given", checkpoint=str(start))
    with pytest.raises(InputError, match="no modelopt_state.pth"):
        optimize(str(recipe.parent / "given.yaml"), f"model.source=modelopt:{start}")


def test_watching_asks_when_inputs_or_ranges_have_moved(second: Outcome, recipe: Path) -> None:
    from flows.watch import watch
    from tasks.stage import timeline

    alike = watch("again", str(sentences(recipe.parent / "alike.jsonl", range(5000, 5400))))
    assert alike.psi["class"] < alike.chance["class"]
    assert alike.asks == ()
    assert alike.overflow.keys() == alike.before.keys() != set()
    lonely = recipe.parent / "lonely.jsonl"
    texts = [{"text": " ".join(["good"] * (k % 14 + 1))} for k in range(400)]
    lonely.write_text("\n".join(json.dumps(row) for row in texts))
    moved = watch("again", str(lonely))
    assert "retrain" in moved.asks
    assert moved.psi["class"] > 0.2
    with pytest.raises(InputError, match="too few"):
        watch("again", str(sentences(recipe.parent / "few.jsonl", range(20))))
    assert [timing.stage for timing in timeline] == ["load inputs"]


def test_pruning_takes_only_what_nothing_refers_to(second: Outcome) -> None:
    from flows.prune import prune
    from tasks import prune as collector

    with store.staging() as folder:
        (folder / "orphan").write_text("nothing refers to this")
        orphan = store.commit(folder)
    assert not [g for g in prune(days=1).garbage if orphan.sha256 in g.place], "it is young"
    time.sleep(0.1)
    found = prune(days=0)
    places = {garbage.place for garbage in found.garbage}
    assert [place for place in places if orphan.sha256 in place]
    assert store.intact(orphan), "a dry run removes nothing"
    assert second.attempt is not None
    kept = second.attempt.engines["candidate"]
    assert kept.weights is not None
    for blob in (kept.plan.blob, kept.weights, second.attempt.checkpoints["candidate"].blob):
        assert not [place for place in places if blob.sha256 in place]
    with pytest.raises(KeyboardInterrupt), resume.held("0" * 64) as place:
        (place / "checkpoint-1").mkdir()
        raise KeyboardInterrupt
    assert not [g for g in prune(days=1).garbage if g.place == str(place)], "it may be started again"
    (left,) = (g for g in prune(days=0).garbage if g.place == str(place))
    collector.remove(left)
    assert not list(resume.root().glob("0*"))
    # The other tests' artifacts lie in this folder, too, and no run has them: only the orphan may go.
    collector.remove(next(garbage for garbage in found.garbage if orphan.sha256 in garbage.place))
    assert not store.intact(orphan)
    assert not [g for g in prune(days=0).garbage if orphan.sha256 in g.place]


@pytest.mark.long
def test_pruning_a_folder_of_its_own_leaves_what_serves(tmp_path: Path) -> None:
    environment = os.environ | {
        "ENGINEHOUSE_HOME": str(tmp_path),
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_LOCAL_STORAGE_PATH": str(tmp_path / "results"),
    }

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "flows", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert "PROMOTED" in run("optimize", "digits-cnn-int8-ptq", "--set", "benchmark.rounds=6")
    assert "can be removed" in run("prune", "--days", "0")
    assert "removed" in run("prune", "--days", "0", "--delete")
    assert "0 removed" in run("prune", "--days", "0", "--delete")
    run("verify", "digits-cnn@champion")
