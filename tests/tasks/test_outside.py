"""Weights that stay outside the graph: the path of networks past 1 GB, taken by tiny ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from recipes.build import Build, Export
from recipes.compress import Quantize, Sparsify
from tasks import batches, checkpoints, export, outside, store
from tasks.artifacts import Checkpoint, OnnxModel
from tasks.build import build
from tasks.calibrate import calibrate
from tasks.engines import onnxruntime
from tasks.engines.lowering import tensors
from tasks.sparsify import sparsify

NEW = Export(opset=21)


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every network is past the limit, and every weight but the smallest is large."""
    monkeypatch.setattr(export, "EXTERNAL_DATA_PAST", 0)
    monkeypatch.setattr(tensors, "LARGE", 1 << 10)


def exported(checkpoint: Checkpoint, case: Any, precision: Any = "fp32") -> OnnxModel:
    return export.export.fn(checkpoint, case.dataset, NEW, precision)


def sample(case: Any) -> dict[str, np.ndarray]:
    return batches.samples(case.dataset, batches.preprocessor(case.checkpoint), count=1)[0]


def logits(plan: Path, weights: Path | None, case: Any, level: str | None) -> np.ndarray:
    with onnxruntime.open(plan, weights, level=level) as session:
        return session.run(sample(case))["logits"]


@pytest.mark.parametrize(
    ("section", "outside_bytes"),
    [
        (None, 4),
        ({"format": "int8", "embeddings": True}, 1),
        ({"format": "int4", "block_size": 32}, 0),
        pytest.param({"format": "int8-weight-only"}, 1, marks=pytest.mark.long),
        pytest.param({"format": "fp8"}, 1, marks=pytest.mark.long),
        pytest.param({"format": "int4", "block_size": 16, "algorithm": "awq"}, 0, marks=pytest.mark.long),
        pytest.param({"format": "w4a8", "block_size": 32}, 0, marks=pytest.mark.long),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_a_large_network_is_the_same_network(
    text: Any, small_limits: None, section: dict[str, Any] | None, outside_bytes: int
) -> None:
    """Exported, built with values in files alone, and as PyTorch computes it."""
    checkpoint = text.checkpoint
    if section:
        checkpoint = calibrate.fn(checkpoint, text.dataset, Quantize(**section))
    model = exported(checkpoint, text)
    folder = store.path(model.blob)
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    stubs = {t.name: t for t in graph.graph.initializer if tensors.outside(t)}
    name = "model.bert.encoder.layer.0.intermediate.dense.weight"
    if outside_bytes:
        (stub,) = [t for key, t in stubs.items() if key.startswith(name)]
        assert tensors.size(stub) == 64 * 32 * outside_bytes
    else:
        assert not any(key.startswith(name) for key in stubs)
    assert not any(item.name.startswith("model.") for item in graph.graph.input)
    network, _ = checkpoints.restore(checkpoint)
    with torch.no_grad():
        wanted = network(**batches.tensors(sample(text))).logits.numpy()
    assert np.abs(logits(folder, None, text, "disabled") - wanted).max() < 1e-6
    engine = build.fn(model, checkpoint, text.dataset, Build(), "onnxruntime", "")
    assert engine.proved == "executed"
    assert engine.weights is not None
    found = logits(store.path(engine.plan.blob), store.path(engine.weights), text, None)
    assert np.abs(found - wanted).max() < 0.02


@pytest.mark.long
def test_it_is_the_graph_that_a_small_one_would_be(text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for where values are: the same names, types and shapes, so that a refit finds the same plan."""
    checkpoint = calibrate.fn(text.checkpoint, text.dataset, Quantize(format="int8"))
    inside = exported(checkpoint, text)
    monkeypatch.setattr(export, "EXTERNAL_DATA_PAST", 0)
    monkeypatch.setattr(tensors, "LARGE", 1 << 10)
    beside = exported(checkpoint, text)
    assert {k: v for k, v in inside.facts.items() if k != "nodes"} == {
        k: v for k, v in beside.facts.items() if k != "nodes"
    }
    shapes = [
        {
            t.name: (t.data_type, list(t.dims))
            for t in onnx.load(store.path(m.blob) / "model.onnx").graph.initializer
        }
        for m in (inside, beside)
    ]
    assert {k: v for k, v in shapes[0].items() if "weight" in k} == {
        k: v for k, v in shapes[1].items() if "weight" in k
    }


def test_half_precision_is_cast_while_it_is_written(text: Any, small_limits: None) -> None:
    model = exported(text.checkpoint, text, "fp16")
    graph = onnx.load(store.path(model.blob) / "model.onnx", load_external_data=False)
    stubs = [t for t in graph.graph.initializer if tensors.outside(t)]
    assert stubs
    assert {t.data_type for t in stubs} == {onnx.TensorProto.FLOAT16}
    whole = logits(store.path(exported(text.checkpoint, text).blob), None, text, "disabled")
    assert np.abs(logits(store.path(model.blob), None, text, "disabled") - whole).max() < 5e-3


@pytest.mark.long
def test_2_4_is_counted_in_the_file(text: Any, small_limits: None) -> None:
    pruned = sparsify.fn(text.checkpoint, text.dataset, Sparsify(exclude=("classifier",)))
    model = exported(calibrate.fn(pruned, text.dataset, Quantize(format="int8")), text)
    assert set(pruned.facts["sparsity"]["names"]) <= set(model.facts["sparse_names"])


def test_another_training_refits_the_plan(text: Any, small_limits: None, tmp_path: Path) -> None:
    section = Quantize(format="int8", embeddings=True)
    first = calibrate.fn(text.checkpoint, text.dataset, section)
    network, config = checkpoints.restore(text.checkpoint)
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(1.01)
    with store.staging() as folder:
        (folder / "preprocessor").mkdir()
        for file in batches.preprocessor(text.checkpoint).iterdir():
            (folder / "preprocessor" / file.name).write_bytes(file.read_bytes())
        trained = checkpoints.save(network, config, folder, text.checkpoint.type, {})
    second = exported(calibrate.fn(trained, text.dataset, section), text)
    engine = build.fn(exported(first, text), first, text.dataset, Build(), "onnxruntime", "")
    samples = batches.samples(text.dataset, batches.preprocessor(text.checkpoint))
    plan = store.path(engine.plan.blob)
    onnxruntime.refit(plan, store.path(second.blob), tmp_path, samples=samples)
    wanted = logits(store.path(second.blob), None, text, "disabled")
    assert np.abs(logits(plan, tmp_path / "weights", text, None) - wanted).max() < 0.02


def test_a_weight_is_written_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows at a time give what the whole gives, per channel and per tensor, turned or not."""
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    scale = (weight.abs().amax(dim=1) / 127).numpy()
    value = outside.Value(weight, scale=scale, zero=np.zeros(12, np.int8), kind=onnx.TensorProto.INT8)
    whole = np.concatenate(list(outside._parts(value)))
    assert np.array_equal(whole, np.rint(weight.numpy() / scale[:, None]).astype(np.int8))
    monkeypatch.setattr(tensors, "BLOCK", 64)
    assert len(list(outside._parts(value))) == 6
    assert np.array_equal(np.concatenate(list(outside._parts(value))), whole)
    turned = outside.Value(weight, turned=True)
    assert np.array_equal(np.concatenate(list(outside._parts(turned))), weight.numpy().T)


def test_large_values_go_to_files_only_while_a_large_model_is_lowered(tmp_path: Path) -> None:
    value = np.arange(1 << 19, dtype=np.float32)
    assert not tensors.outside(tensors.made(value, "a"))
    stub = tensors.refer(onnx.TensorProto(name="b", data_type=1, dims=[4]), "x", 0, 16)
    model = onnx.ModelProto(graph=onnx.GraphProto(initializer=[stub]))
    with tensors.scratch(tmp_path, model):
        made = tensors.made(value, "a")
        assert tensors.outside(made)
        assert np.array_equal(tensors.array(made), value)
        assert b"".join(bytes(part) for part in tensors.pieces(made)) == value.tobytes()
        doubled = tensors.changed(made, lambda part: part * 2)
        assert np.array_equal(tensors.array(doubled), value * 2)
        assert not tensors.outside(tensors.made(np.arange(1 << 18), "structure"))
    assert not list(tmp_path.iterdir())
