"""Constants that TensorRT 8.6 makes from shapes and asks back: given with their value, never guessed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tasks.engines import tensorrt_api as api
from tasks.engines import tensorrt_build, tensorrt_refit
from tasks.engines import tensorrt_choose as choose
from tasks.engines import tensorrt_constants as constants
from tasks.engines.common import RefitError
from tasks.engines.tensorrt_options import Options

FEED = {"x": np.arange(24, dtype=np.float32).reshape(2, 12)}
SIZE, UNNAMED = "size[Constant] CONSTANT", "(Unnamed Layer* 92) [Constant] CONSTANT"


def net(seed: int = 0) -> onnx.ModelProto:
    """x @ w, flattened by shape arithmetic as exporters write it; `scaled` is made of a trained tensor."""
    random = np.random.default_rng(seed)
    make = helper.make_node
    nodes = [
        make("MatMul", ["x", "w"], ["m"]),
        make("Shape", ["m"], ["shape"]),
        make("Constant", [], ["first"], value=numpy_helper.from_array(np.array([0], np.int64))),
        make("Gather", ["shape", "first"], ["rows"]),
        make("Concat", ["rows", "rest"], ["size"], axis=0),
        make("Reshape", ["m", "size"], ["r"]),
        make("Mul", ["w", "w"], ["scaled"]),
        make("Cast", ["scaled"], ["codes"], to=TensorProto.INT64),
        make("Add", ["r", "b"], ["y"]),
    ]
    tensors = [
        numpy_helper.from_array(random.standard_normal((12, 8)).astype(np.float32), "w"),
        numpy_helper.from_array(random.standard_normal(8).astype(np.float32), "b"),
        numpy_helper.from_array(np.array([-1], np.int64), "rest"),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 12])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_what_follows_from_shapes_is_evaluated() -> None:
    names = [SIZE, "rows[Constant] CONSTANT", UNNAMED, "b"]
    found = constants.of_graph(net(), names, FEED)
    assert {name: one["values"] for name, one in found.items()} == {SIZE: [2, -1], names[1]: [2]}
    assert found == constants.of_graph(net(seed=1), names, FEED)
    array = constants.arrays(found)[SIZE]
    assert (array.dtype, array.shape) == (np.dtype(np.int64), (2,))


@pytest.mark.parametrize("tensor", ["scaled", "codes", "m", "x", "w", "nowhere"])
def test_what_a_training_may_change_is_never_taken_for_a_constant(tensor: str) -> None:
    assert constants.of_graph(net(), [f"{tensor}[Constant] CONSTANT"], FEED) == {}


class Network:
    """A parsed network's constant layers, as the bindings hand them out."""

    class Layer:
        def __init__(self, name: str, kind: str, weights: Any) -> None:
            self.name, self.type, self._weights = name, kind, weights

    class IConstantLayer(Layer):
        @property
        def weights(self) -> Any:
            return self._weights

    LayerType = SimpleNamespace(CONSTANT="constant", SHAPE="shape")

    def __init__(self, **layers: Any) -> None:
        self.layers = [self.Layer("(Unnamed Layer* 3) [Shape]", "shape", None)]
        self.layers += [self.Layer(name, "constant", weights) for name, weights in layers.items()]
        self.num_layers = len(self.layers)

    def get_layer(self, index: int) -> Layer:
        return self.layers[index]


def test_what_the_parser_added_is_kept_with_its_value() -> None:
    """Integers and booleans only: a float could have been made of weights."""
    network = Network(
        ints=np.array([[0, 2]], np.int32),
        flags=np.array([True]),
        floats=np.ones(3, np.float32),
        codes=np.ones(3, np.int8),
        none=np.zeros(0, np.int32),
        large=np.zeros(5000, np.int32),
    )
    found = constants.arrays(constants.of_network(Network, network))
    assert sorted(found) == ["flags CONSTANT", "ints CONSTANT"]
    assert found["ints CONSTANT"].dtype == np.int32
    assert found["ints CONSTANT"].tolist() == [[0, 2]]
    assert found["flags CONSTANT"].dtype == np.bool_


class Held:
    """An opened engine of TensorRT 8.6 that asks for its own constants, and wants every one of them."""

    def __init__(self, *asked: str) -> None:
        self.trt, self.engine, self.logger = self, None, None
        self.asked = ["w", "b", *asked]
        self.given: dict[str, np.ndarray] = {}

    def Refitter(self, engine: None, logger: None) -> Held:
        return self

    def get_all_weights(self) -> list[str]:
        return self.asked

    def set_named_weights(self, name: str, array: np.ndarray) -> bool:
        self.given[name] = array.copy()
        return True

    def get_missing_weights(self) -> list[str]:
        return [name for name in self.asked if name not in self.given]

    def refit_cuda_engine(self) -> bool:
        return True

    def said(self) -> str:
        return ""


def manifest(**kept: Any) -> dict[str, Any]:
    return {"runtime": "tensorrt", "version": "8.6.0", "refit": {"fresh_error": 1.0, **kept}}


def test_a_refit_gives_them_and_the_trained_tensors_are_the_new_ones() -> None:
    held: Any = Held(SIZE, UNNAMED)
    lacking = tensorrt_refit.lacking(held, manifest(), net())
    assert lacking == sorted([SIZE, UNNAMED])
    made = constants.of_network(Network, Network(**{UNNAMED[: -len(" CONSTANT")]: np.array([1], np.int32)}))
    kept = {**made, **constants.of_graph(net(), lacking, FEED)}
    tensorrt_refit.refit_engine(held, manifest(constants=kept), Path("new.onnx"), net(seed=1))
    assert (held.given[SIZE].dtype, held.given[SIZE].tolist()) == (np.dtype(np.int32), [2, -1])
    assert held.given[UNNAMED].tolist() == [1]
    right = {tensor.name: numpy_helper.to_array(tensor) for tensor in net(seed=1).graph.initializer}
    assert all(np.array_equal(held.given[name], right[name]) for name in ("w", "b"))


@pytest.mark.parametrize("asked", ["scaled[Constant] CONSTANT", UNNAMED, "conv KERNEL"])
def test_what_nobody_can_tell_still_stops_the_refit(asked: str) -> None:
    held: Any = Held(asked)
    kept = constants.of_graph(net(), tensorrt_refit.lacking(held, manifest(), net()), FEED)
    with pytest.raises(RefitError, match="no tensor for"):
        tensorrt_refit.refit_engine(held, manifest(constants=kept), Path("new.onnx"), net())
    assert not held.given


def test_newer_versions_are_refitted_by_their_parser() -> None:
    held: Any = Held(SIZE)
    assert tensorrt_refit.lacking(held, {"runtime": "tensorrt", "version": "10.14.1"}, net()) == []


def test_a_trial_seals_them_for_every_later_refit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found once, at the smallest shape of the plan; opening the plan later reads them from its manifest."""
    onnx.save(net(), tmp_path / "model.onnx")
    held, opened = Held(SIZE, UNNAMED), manifest(identical=None)

    class Right:
        """A session whose outputs are right."""

        def __init__(self, _: Held) -> None: ...
        def __enter__(self) -> Right:
            return self

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(choose, "load", lambda plan: (held, opened))
    monkeypatch.setattr(choose, "TensorRTSession", Right)
    monkeypatch.setattr(choose.tensorrt_parity, "verify", lambda *_: {"error": 0.0, "cosine": 1.0})
    profile = {"x": {"min": (1, 12), "opt": (2, 12), "max": (2, 12)}}
    job = tensorrt_build.Job(
        str(tmp_path / "model.onnx"), "p", "tensorrt", Options(), [profile], ("fp16",), True, None
    )
    made = constants.of_network(
        Network, Network(**{UNNAMED[: -len(" CONSTANT")]: np.array([7], np.int32), "other": np.array([1])})
    )
    found = choose.trial(tmp_path, job, [FEED], [{}], made)
    assert {name: one["values"] for name, one in found["constants"].items()} == {SIZE: [1, -1], UNNAMED: [7]}
    assert found["fixed"] == {}
    assert found["weights"] == 4
    assert api.weakly_typed("tensorrt", opened["version"])
