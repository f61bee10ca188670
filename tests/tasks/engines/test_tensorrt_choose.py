"""What a build decides where a GPU executes; ONNX's evaluator is in TensorRT's place, the plan is ONNX."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from benchmarks.tensorrt import mlp
from tasks.engines import tensorrt, tensorrt_build, tensorrt_parity, tensorrt_refit
from tasks.engines import tensorrt_api as api
from tasks.engines import tensorrt_choose as choose
from tasks.engines import tensorrt_weights as weights
from tasks.engines.common import Arrays, RefitError
from tasks.engines.tensorrt_run import manifest_of

WIDTH, ROWS = 32, 4
FEED = mlp.feed(WIDTH, ROWS)


class Engine:
    """An opened plan: the graph that it runs."""

    def __init__(self, plan: Path) -> None:
        self.model = onnx.load_from_string((plan / "engine.plan").read_bytes())


class Session:
    """Runs the engine's graph; `milliseconds` is what it claims to take."""

    milliseconds: tuple[float, ...] = ()

    def __init__(self, engine: Engine) -> None:
        self.engine, self.inputs, self.refit_seconds = engine, {"x": ("float32", (ROWS, WIDTH))}, None

    def run(self, feed: Arrays) -> dict[str, np.ndarray]:
        return tensorrt_parity.evaluate(self.engine.model, [feed])[0]

    def latencies(self, feed: Arrays, count: int) -> list[float]:
        first, *Session.milliseconds = Session.milliseconds
        return [first] * count

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None: ...


def honest(held: Engine, flavor: str, version: str, path: Path, model: onnx.ModelProto) -> list[str]:
    held.model = onnx.load(path)
    return [name for name in weights.digests(model) if name != "b2"]


def lying(held: Engine, flavor: str, version: str, path: Path, model: onnx.ModelProto) -> list[str]:
    """TensorRT 8.6 with INT8 in a compiled region: everything is taken, nothing changes."""
    return list(weights.digests(model))


def forgetful(held: Engine, flavor: str, version: str, path: Path, model: onnx.ModelProto) -> list[str]:
    """TensorRT 11.3's documented kind: one bias is not refitted."""
    kept = next(t for t in held.model.graph.initializer if t.name == "b1")
    new = onnx.load(path)
    next(t for t in new.graph.initializer if t.name == "b1").CopyFrom(kept)
    held.model = new
    return list(weights.digests(model))


@pytest.fixture(autouse=True)
def evaluator(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(job: tensorrt_build.Job) -> dict[str, Any]:
        Path(job.plan).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(job.model, job.plan)
        return {"seconds": 200.0}

    for module in (choose, tensorrt_refit):
        monkeypatch.setattr(module, "load", lambda plan, lean=False: (Engine(plan), manifest_of(plan)))
        monkeypatch.setattr(module, "TensorRTSession", Session)
    monkeypatch.setattr(tensorrt_build, "run", run)
    monkeypatch.setattr(tensorrt_refit, "refit_engine", honest)
    monkeypatch.setattr(tensorrt, "proof", lambda plan: {"quantized_share": 0.0})
    monkeypatch.setattr(api, "version_of", lambda flavor: "8.6.0")
    monkeypatch.setattr(api, "gpu", lambda: api.Gpu("NVIDIA H100 80GB HBM3", (9, 0)))


def build(tmp_path: Path, *milliseconds: float, **options: Any) -> dict[str, Any]:
    Session.milliseconds = milliseconds
    onnx.save(mlp.mlp(WIDTH, ROWS, kind="fp16"), tmp_path / "model.onnx")
    built = tensorrt.build(
        tmp_path / "model.onnx", tmp_path / "out", samples=[FEED], flavor="tensorrt", **options
    )
    assert built.proved == "executed"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["plan"]
    found: dict[str, Any] = built.facts
    return found


def test_a_right_and_cheap_refit_is_kept(tmp_path: Path) -> None:
    facts = build(tmp_path, 1.0, 1.04)
    refit = facts["refit"]
    assert (refit["safe"], refit["kind"], facts["latency_ms"]) == (True, "whole", 1.04)
    assert refit["tax"] == pytest.approx(0.04)
    assert refit["plain"]["latency_ms"] == 1.0
    assert "--refit" in facts["command"]
    sealed = manifest_of(tmp_path / "out" / "plan")["refit"]
    assert sealed["safe"]
    assert list(sealed["fixed"]) == ["b2"]


@pytest.mark.parametrize("refitter", [lying, forgetful])
@pytest.mark.parametrize("policy", ["auto", "always"])
def test_a_refit_that_lies_is_never_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refitter: Any, policy: str
) -> None:
    monkeypatch.setattr(tensorrt_refit, "refit_engine", refitter)
    facts = build(tmp_path, 1.0, refit=policy)
    assert facts["refit"]["safe"] is False
    assert "every call of the refit succeeded, yet its outputs are off" in facts["refit"]["reason"]
    assert "--refit" not in facts["command"]
    assert json.loads((tmp_path / "out/plan/plan.json").read_text())["refit"]["kind"] == "none"


def test_a_dear_refit_is_not_kept_unless_it_must_be(tmp_path: Path) -> None:
    facts = build(tmp_path, 1.0, 1.21)
    assert facts["refit"]["reason"] == "the refit tax is 21.0%, above max_tax 5.0%"
    assert facts["latency_ms"] == 1.0
    assert build(tmp_path, 1.0, 1.21, refit="always")["refit"]["safe"]
    assert build(tmp_path, 1.0, 1.21, max_tax=0.25)["refit"]["safe"]
    assert "trial" not in build(tmp_path, 1.0, refit="never")["refit"]


def test_the_fastest_of_three_builds_stays(tmp_path: Path) -> None:
    facts = build(tmp_path, 1.2, 1.0, 1.1, refit="never", builds=3)
    assert facts["latency_ms"] == 1.0
    assert facts["builds_ms"] == [1.2, 1.0, 1.1]
    assert facts["spread"] == pytest.approx(0.2)


def test_the_next_training_goes_into_the_kept_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is refused, with its weights thrown away, once a refit lies."""
    build(tmp_path, 1.0, 1.0)
    sealed = tmp_path / "out" / "plan" / "plan.json"
    manifest = json.loads(sealed.read_text())
    manifest["refit"]["fixed"] = {}
    sealed.write_text(json.dumps(manifest))
    (tmp_path / "new").mkdir()
    onnx.save(mlp.mlp(WIDTH, ROWS, kind="fp16", seed=1), tmp_path / "new" / "model.onnx")
    plan, new = tmp_path / "out" / "plan", tmp_path / "new"
    built = tensorrt.refit(plan, new, tmp_path / "refitted", samples=[FEED])
    assert built.facts["parity"]["error"] < 1e-3
    with tensorrt.open(plan, tmp_path / "refitted" / "weights") as session:
        right = tensorrt_parity.reference(new / "model.onnx", [FEED])[0]
        assert tensorrt_parity.error(session.run(FEED), right) < 1e-3
    monkeypatch.setattr(tensorrt_refit, "refit_engine", lying)
    with pytest.raises(RefitError, match="yet its outputs are off"):
        tensorrt.refit(plan, new, tmp_path / "again", samples=[FEED])
    assert not (tmp_path / "again" / "weights").exists()


def test_whole_plan_without_weights_is_the_plan(tmp_path: Path) -> None:
    build(tmp_path, 1.0, refit="never")
    tensorrt.whole_plan(tmp_path / "out" / "plan", None, tmp_path / "model.plan")
    assert (tmp_path / "model.plan").read_bytes() == (tmp_path / "out/plan/engine.plan").read_bytes()


def test_the_trial_takes_the_smallest_batch_the_profile_allows() -> None:
    profile = {"x": {"min": (2, WIDTH), "opt": (3, WIDTH), "max": (4, WIDTH)}}
    job = tensorrt_build.Job("m", "p", "tensorrt", tensorrt.Options(), [profile], None, True, None)
    assert choose.smallest(FEED, job)["x"].shape == (2, WIDTH)
