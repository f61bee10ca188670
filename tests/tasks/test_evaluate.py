"""What is said of an engine on every row, and of one that answers NaN."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from recipes.gate import Gate
from tasks import batches, evaluate, store, types
from tasks.artifacts import Engine, OnnxModel, Plan
from tasks.engines import onnxruntime
from tasks.gate import judge
from tasks.measurements import Measured, Measurements, measurements_from_json, measurements_to_json

if TYPE_CHECKING:
    from conftest import Case


def network(case: Case, threshold: float) -> onnx.ModelProto:
    """A linear classifier; a row whose mean is below the threshold gets NaN (the log of a negative)."""
    encoded, _ = batches.examples(case.dataset, "test", batches.preprocessor(case.checkpoint))
    ((name, array),) = types.load(case.dataset.type).collate(encoded[:1]).items()
    width, count = int(np.prod(array.shape[1:])), len(case.dataset.labels)
    weights = np.random.default_rng(0).standard_normal((width, count)).astype(np.float32)
    tensors = {"w": weights, "t": np.float32([threshold]), "axes": np.int64([1])}
    nodes = [
        helper.make_node("Flatten", [name], ["flat"]),
        helper.make_node("ReduceMean", ["flat", "axes"], ["mean"], keepdims=1),
        helper.make_node("Sub", ["mean", "t"], ["above"]),
        helper.make_node("Log", ["above"], ["log"]),
        helper.make_node("MatMul", ["flat", "w"], ["product"]),
        helper.make_node("Add", ["product", "log"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *array.shape[1:]])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", count])],
        [numpy_helper.from_array(value, key) for key, value in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize(("metric", "threshold"), [("accuracy", -1e6), ("accuracy", 0.3), ("log_loss", 0.3)])
def test_an_engine_that_answers_nan_is_a_verdict(
    image: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str, threshold: float
) -> None:
    onnx.save(network(image, threshold), tmp_path / "model.onnx")
    monkeypatch.setattr(evaluate, "opened", lambda engine: onnxruntime.open(tmp_path, None, level="disabled"))
    found = evaluate.evaluate.fn(engine(image), None, image.dataset, metric, "", "here")
    content = evaluate.loaded(found)
    whole = threshold < 0
    assert (found.facts["not_finite"] == 0) is whole
    assert (metric in found.values) is whole
    ours = Measured("executed", content["scores"], None if content["scores"] else content["predictions"])
    pair = {"candidate": ours, "baseline": ours}
    measured = Measurements(metric, pair, references=content["references"])
    measured = measurements_from_json(measurements_to_json(measured))
    verdict = judge(measured, Gate(metric=metric, max_drop=0.1, on_missing="pass", on_coarse="warn"))
    assert verdict.passed is whole
    assert whole or f"{found.facts['not_finite']} of the candidate's" in verdict.reasons[-1]


def test_rows_that_came_out_as_zeros_are_no_parity(
    image: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(image, -1e6)
    with store.staging() as folder:
        onnx.save(model, folder / "model.onnx")
        reference = OnnxModel(store.commit(folder), "int8")
    model.graph.node[-1].output[0] = "whole"
    model.graph.node.extend(
        [
            helper.make_node("Greater", ["mean", "least"], ["lives"]),
            helper.make_node("Cast", ["lives"], ["share"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["whole", "share"], ["logits"]),
        ]
    )
    model.graph.initializer.append(numpy_helper.from_array(np.float32([0.3]), "least"))
    onnx.save(model, tmp_path / "model.onnx")
    monkeypatch.setattr(evaluate, "opened", lambda engine: onnxruntime.open(tmp_path, None, level="disabled"))
    found = evaluate.evaluate.fn(engine(image), reference, image.dataset, "accuracy", "", "here")
    assert found.values["parity"] == 0


def engine(case: Case) -> Engine:
    with store.staging() as folder:
        shutil.copytree(batches.preprocessor(case.checkpoint), folder / "preprocessor")
        blob = store.commit(folder / "preprocessor")
    return Engine(Plan(blob, "", "onnxruntime", "", ""), None, blob, "int8", "executed", {})
