"""A refit is never trusted: files that forbid it, coverage, outputs, and the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from benchmarks.tensorrt import mlp
from tasks.engines import tensorrt, tensorrt_parity, tensorrt_refit
from tasks.engines import tensorrt_choose as choose
from tasks.engines import tensorrt_weights as weights
from tasks.engines.common import Arrays, RefitError, graph_digest
from tasks.errors import InputError

WIDTH, ROWS = 32, 4
FEED = mlp.feed(WIDTH, ROWS)
MADE: dict[str, Any] = {"runtime": "tensorrt", "version": "8.6.0", "refit": {}}


def net(seed: int = 0, **options: Any) -> onnx.ModelProto:
    return mlp.mlp(WIDTH, ROWS, **{"kind": "fp16", "seed": seed, **options})


class Evaluated:
    """A session that runs an ONNX graph: an engine with that graph's weights inside."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model, self.inputs, self.refit_seconds = model, {"x": ("float32", (ROWS, WIDTH))}, 0.0

    def run(self, feed: Arrays) -> dict[str, np.ndarray]:
        return tensorrt_parity.evaluate(self.model, [feed])[0]

    def __enter__(self) -> Evaluated:
        return self

    def __exit__(self, *_: object) -> None: ...


def manifest(model: onnx.ModelProto, **refit: Any) -> dict[str, Any]:
    kept = {**choose.NO_REFIT, "safe": True, "kind": "whole", "fresh_error": 1e-3, "reason": "tried", **refit}
    return {"graph": graph_digest(model), "refit": kept, "command": "", "bytes": 1, "runtime": "tensorrt"}


@pytest.mark.parametrize(("kept", "right"), [(0, False), (1, True)])
def test_an_engine_that_kept_its_old_weights_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int, right: bool
) -> None:
    """TensorRT 8.6, INT8: every call returned True, nothing was missing, and the old weights ran on."""
    onnx.save(net(1), tmp_path / "model.onnx")
    found = {**manifest(net(0)), "version": "8.6.0", "device": "NVIDIA H100 80GB HBM3 (9.0)"}
    monkeypatch.setattr(tensorrt, "manifest_of", lambda plan: found)
    monkeypatch.setattr(tensorrt, "open", lambda plan, weights: Evaluated(net(kept)))
    folder = tmp_path / "out"
    if right:
        built = tensorrt.refit(tmp_path / "plan", tmp_path, folder, samples=[FEED])
        assert built.facts["parity"]["error"] < 1e-3
        assert (folder / "weights" / "model.onnx").exists()
    else:
        with pytest.raises(RefitError, match="every call of the refit succeeded, yet its outputs are off"):
            tensorrt.refit(tmp_path / "plan", tmp_path, folder, samples=[FEED])
        assert not (folder / "weights").exists()


def test_files_that_forbid_a_refit() -> None:
    plan = net(0)
    tensorrt_refit.check_weights(manifest(plan), net(1), Path("new.onnx"))
    with pytest.raises(InputError, match=r"new.onnx is of another graph"):
        tensorrt_refit.check_weights(manifest(plan), net(1, layers=2), Path("new.onnx"))
    with pytest.raises(RefitError, match="not safe to refit: it lied"):
        tensorrt_refit.check_weights(manifest(plan, safe=False, reason="it lied"), net(1), Path("new.onnx"))


def test_identical_refuses_changed_weights() -> None:
    found = manifest(net(0), identical=weights.all_digest(net(0)))
    tensorrt_refit.check_weights(found, net(0), Path("same.onnx"))
    with pytest.raises(RefitError, match="REFIT_IDENTICAL"):
        tensorrt_refit.check_weights(found, net(1), Path("new.onnx"))


def test_sparse_plans_take_sparse_weights_only() -> None:
    sparse = net(0, zeros="2:4")
    found = manifest(sparse, two_four=weights.two_four(sparse))
    tensorrt_refit.check_weights(found, net(1, zeros="2:4"), Path("new.onnx"))
    with pytest.raises(RefitError, match=r"no longer 2:4: \['w0', 'w1', 'w2'\]"):
        tensorrt_refit.check_weights(found, net(1), Path("new.onnx"))


def test_tensors_that_no_refit_reaches_must_not_change() -> None:
    found = manifest(net(0), fixed=weights.digests(net(0), {"b1"}))
    tensorrt_refit.check_weights(found, net(0), Path("same.onnx"))
    with pytest.raises(RefitError, match=r"for good, and they changed: \['b1'\]"):
        tensorrt_refit.check_weights(found, net(1), Path("new.onnx"))


class Held:
    """What a refit needs of an opened engine, with TensorRT 8.6's answers."""

    def __init__(
        self, names: list[str], *, refused: str = "", forgets: str = "", fails: bool = False
    ) -> None:
        self.trt, self.engine, self.logger = self, None, None
        self.names, self.refused, self.forgets, self.fails = names, refused, forgets, fails
        self.given: dict[str, np.ndarray] = {}

    def Refitter(self, engine: None, logger: None) -> Held:
        return self

    def get_all_weights(self) -> list[str]:
        return self.names

    def set_named_weights(self, name: str, array: np.ndarray) -> bool:
        self.given[name] = array
        return name != self.refused

    def get_missing_weights(self) -> list[str]:
        return [self.forgets] if self.forgets else []

    def refit_cuda_engine(self) -> bool:
        return not self.fails

    def said(self) -> str:
        return "Assertion type() == expectedDataType<T>() failed."


@pytest.mark.parametrize(
    ("names", "trouble", "says"),
    [
        (["w0", "w1", "gone"], {}, r"no tensor for \['gone'\]"),
        (["w0", "w1"], {"refused": "w1"}, "w1 were refused: Assertion"),
        (["w0", "w1"], {"forgets": "b0"}, r"weights are missing: \['b0'\]"),
        (["w0", "w1"], {"fails": True}, "the refit failed: Assertion"),
        ([], {}, "no refittable weights"),
    ],
)
def test_coverage(names: list[str], trouble: Any, says: str) -> None:
    held: Any = Held(names, **trouble)
    with pytest.raises(RefitError, match=says):
        tensorrt_refit.refit_engine(held, MADE, Path("new.onnx"), net(1))


def test_what_8_6_is_given() -> None:
    model = net(1, kind="int8")
    names = [t.name for t in model.graph.initializer]
    held: Any = Held(names)
    assert tensorrt_refit.refit_engine(held, MADE, Path("new.onnx"), model) == names
    assert {array.dtype for array in held.given.values()} == {np.dtype(np.float32)}
    assert tensorrt_refit.as_8_6(np.array([1, 2], np.int64)).dtype == np.int32
    assert tensorrt_refit.as_8_6(np.array([1, 2], np.float16)).dtype == np.float16


def test_trial_weights_are_another_function_of_the_same_graph() -> None:
    for kind in ("fp16", "int8"):
        model = net(0, kind=kind, zeros="2:4")
        other = weights.rolled(model)
        onnx.checker.check_model(other)
        assert graph_digest(other) == graph_digest(model)
        assert weights.two_four(other) == weights.two_four(model) == ["w0", "w1", "w2"]
        right, moved = (tensorrt_parity.evaluate(m, [FEED])[0] for m in (model, other))
        assert tensorrt_parity.error(moved, right) > 0.5


def test_a_trial_changes_only_what_may_change() -> None:
    """REFIT_INDIVIDUAL names the weights; the rest of the plan keeps its own."""
    before, after = (weights.digests(m) for m in (net(0), weights.rolled(net(0), ("w1", "b2"))))
    assert {name for name in before if before[name] != after[name]} == {"w1", "b2"}


def test_widened_reference() -> None:
    wide = tensorrt_parity.widened(net(0))
    onnx.checker.check_model(wide)
    assert onnx.TensorProto.FLOAT16 not in {t.data_type for t in wide.graph.initializer}
    exact = tensorrt_parity.evaluate(mlp.mlp(WIDTH, ROWS, kind="fp32"), [FEED])[0]
    assert 0 < tensorrt_parity.error(tensorrt_parity.evaluate(net(0), [FEED])[0], exact) < 1e-3


def test_error_measures() -> None:
    right = {"y": np.array([3.0, 4.0])}
    assert tensorrt_parity.error({"y": np.array([3.0, 4.5])}, right) == pytest.approx(0.1)
    assert tensorrt_parity.error({"y": np.array([3.0, np.nan])}, right) == float("inf")
    assert tensorrt_parity.error({"y": np.array([[3.0, 4.0]])}, right) == float("inf")
    assert tensorrt_parity.error({}, right) == float("inf")
    assert tensorrt_parity.cosine({"y": np.array([-3.0, -4.0])}, right) == pytest.approx(-1)


@pytest.mark.parametrize(
    ("policy", "safe", "tax", "keep", "says"),
    [
        ("never", True, 0.0, False, "never"),
        ("always", True, 0.5, True, "always"),
        ("always", False, 0.0, False, "was wrong"),
        ("auto", True, 0.04, True, "4.0%, within max_tax 5.0%"),
        ("auto", True, 0.21, False, "21.0%, above max_tax 5.0%"),
        ("auto", True, None, False, "not measured"),
        ("auto", False, 0.0, False, "was wrong"),
    ],
)
def test_policy(policy: Any, safe: bool, tax: float | None, keep: bool, says: str) -> None:
    kept, why = tensorrt_parity.decide(policy, safe=safe, tax=tax, max_tax=0.05)
    assert kept is keep
    assert says in why


def test_2_4_is_along_the_input() -> None:
    array = numpy_helper.to_array(net(0, zeros="2:4").graph.initializer[0])
    assert weights.is_2_4(array, 0)
    assert not weights.is_2_4(array.T.copy(), 0)
    assert not weights.is_2_4(np.zeros((8, 8)), 0)
    assert weights.two_four(net(0, kind="int8", zeros="2:4")) == ["w0", "w1", "w2"]
    assert weights.two_four(net(0, zeros="random")) == []


def test_any_doubt_of_a_refit_is_a_refit_error(tmp_path: Path) -> None:
    """A damaged plan, or one of another graph, means a rebuild like every other doubt."""
    onnx.save(net(1), tmp_path / "model.onnx")
    with pytest.raises(RefitError, match=r"holds no engine.plan"):
        tensorrt.refit(tmp_path / "plan", tmp_path, tmp_path / "out", samples=[FEED])
