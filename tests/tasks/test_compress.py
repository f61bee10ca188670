"""Prune, calibrate, train, save, restore, export: on real ModelOpt, with a tiny BERT and a small CNN."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from recipes.build import Export
from recipes.compress import Finetune, Quantize, Sparsify
from recipes.schema import Model
from tasks import batches, checkpoints, load, store
from tasks.artifacts import Checkpoint, Dataset, OnnxModel
from tasks.calibrate import calibrate
from tasks.engines import onnxruntime
from tasks.errors import InputError
from tasks.export import export
from tasks.finetune import finetune
from tasks.fold import quantize_weight
from tasks.sparsify import sparsify

STEPS = Finetune(epochs=0.1, batch_size=8, learning_rate=1e-3)


def logits(checkpoint: Checkpoint, batch: dict[str, np.ndarray]) -> np.ndarray:
    model, _ = checkpoints.restore(checkpoint)
    with torch.no_grad():
        return np.asarray(model(**batches.tensors(batch)).logits)


@pytest.fixture(scope="session")
def pruned(text: Any) -> Checkpoint:
    return sparsify.fn(text.checkpoint, text.dataset, Sparsify(exclude=("classifier",)))


@pytest.fixture(scope="session")
def stacked(text: Any, pruned: Checkpoint) -> Checkpoint:
    """2:4, then INT8, then trained with both on."""
    section = Quantize(format="int8", embeddings=True, exclude=("classifier",))
    return finetune.fn(calibrate.fn(pruned, text.dataset, section), text.dataset, STEPS)


@pytest.fixture(scope="session")
def graph(text: Any, stacked: Checkpoint) -> OnnxModel:
    return export.fn(stacked, text.dataset, Export(), "fp32")


def test_two_of_every_four_weights_are_zero_and_stay_zero(stacked: Checkpoint) -> None:
    model, _ = checkpoints.restore(stacked)
    counts = checkpoints.sparsity(model)
    assert counts["modules"] == counts["exact_modules"] == 13  # 6 in each of 2 layers, and the pooler
    assert counts["groups"] == counts["valid_groups"] > 0
    assert stacked.facts["sparsity"]["left_dense"] == ["classifier"]


def test_training_changed_the_weights_and_kept_mask_and_quantizers(
    pruned: Checkpoint, stacked: Checkpoint
) -> None:
    before, after = (checkpoints.restore(item)[0].state_dict() for item in (pruned, stacked))
    name = "bert.encoder.layer.0.intermediate.dense"
    assert not torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])
    assert torch.equal(before[f"{name}._weight_mask"], after[f"{name}._weight_mask"])
    enabled = stacked.facts["quantizers"]
    assert enabled["weights"] == 13 + 3  # linear layers, and three embedding tables
    assert enabled["inputs"] == 13
    assert enabled["left_out"] == {"classifier": "named by quantize.exclude"}
    assert [point["step"] for point in stacked.facts["curve"]] == [1, 2, 3, 4]


def test_state_is_restored_bit_for_bit(text: Any, stacked: Checkpoint) -> None:
    batch = batches.samples(text.dataset, batches.preprocessor(stacked), count=1)[0]
    model, config = checkpoints.restore(stacked)
    with store.staging() as folder:
        again = (
            checkpoints.save(model, config, folder / "copy", "text-classification", {})
            if _made(folder)
            else None
        )
        assert again is not None
        restored, _ = checkpoints.restore(again)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, restored.state_dict()[name]), name
        assert np.array_equal(logits(stacked, batch), logits(again, batch))


def _made(folder: Path) -> bool:
    (folder / "copy").mkdir()
    return True


def test_the_exported_int8_weights_are_2_4_and_the_graph_agrees_with_torch(
    text: Any, stacked: Checkpoint, graph: OnnxModel
) -> None:
    assert graph.facts["sparse_weights"] == 13
    assert graph.facts["tensors"]["INT8"] > 16
    batch = batches.samples(text.dataset, batches.preprocessor(stacked), count=1)[0]
    with onnxruntime.open(store.path(graph.blob), None, level="disabled") as session:
        got = session.run(batch)["logits"]
    np.testing.assert_allclose(got, logits(stacked, batch), atol=1e-4)


def test_any_batch_and_length_runs(graph: OnnxModel) -> None:
    with onnxruntime.open(store.path(graph.blob), None, level="disabled") as session:
        for rows, length in ((1, 1), (3, 5), (7, 16)):
            feed = {name: np.ones((rows, length), np.int64) for name in ("input_ids", "attention_mask")}
            assert session.run(feed)["logits"].shape == (rows, 2)


def test_fp8_is_stored_as_fp8_and_half_precision_keeps_the_inputs(text: Any) -> None:
    candidate = calibrate.fn(text.checkpoint, text.dataset, Quantize(format="fp8"))
    model = export.fn(candidate, text.dataset, Export(), "fp16")
    graph = onnx.load(store.path(model.blob) / "model.onnx")
    assert model.facts["tensors"]["FLOAT8E4M3FN"] >= 14
    assert {entry.domain for entry in graph.opset_import} == {""}
    assert [entry.version for entry in graph.opset_import] == [20]
    assert graph.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_a_large_model_keeps_its_tensors_beside_the_graph(
    text: Any, stacked: Checkpoint, graph: OnnxModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.export.EXTERNAL_DATA_PAST", 1000)
    monkeypatch.setattr("tasks.engines.lowering.tensors.LARGE", 1000)
    model = export.fn(stacked, text.dataset, Export(), "fp32")
    folder = store.path(model.blob)
    assert (folder / "model.onnx.data").stat().st_size > (folder / "model.onnx").stat().st_size / 10
    batch = batches.samples(text.dataset, batches.preprocessor(stacked), count=1)[0]
    outputs = []
    for blob in (graph.blob, model.blob):
        place = tmp_path / blob.sha256
        onnxruntime.build(store.path(blob), place, samples=[batch])
        with onnxruntime.open(place / "plan", place / "weights") as session:
            outputs.append(session.run(batch)["logits"])
    assert np.array_equal(*outputs)


def test_equal_training_exports_equal_bytes(text: Any, stacked: Checkpoint, graph: OnnxModel) -> None:
    assert export.fn(stacked, text.dataset, Export(), "fp32").blob == graph.blob


def test_convolutions_are_pruned_along_channels_and_quantized(image: Any) -> None:
    small = Sparsify(exclude=("net.0",))  # one input channel has no groups of 4
    candidate = calibrate.fn(
        sparsify.fn(image.checkpoint, image.dataset, small), image.dataset, Quantize(format="int8")
    )
    assert candidate.facts["sparsity"]["names"] == ["net.2", "net.5", "net.8"]
    assert candidate.facts["quantizers"] == {"enabled": 10, "weights": 5, "inputs": 5, "left_out": {}}
    assert export.fn(candidate, image.dataset, Export(), "fp32").facts["sparse_weights"] == 3


def test_pruning_nothing_names_what_was_looked_at(text: Any) -> None:
    with pytest.raises(InputError, match=r"nothing was pruned.*bert\.pooler\.dense"):
        sparsify.fn(text.checkpoint, text.dataset, Sparsify(exclude=("*",)))


def test_quantizing_nothing_names_what_was_looked_at(text: Any) -> None:
    with pytest.raises(InputError, match=r"nothing was quantized.*bert\.pooler\.dense"):
        calibrate.fn(text.checkpoint, text.dataset, Quantize(format="int8", exclude=("*",)))


def test_pruning_after_quantizing_prunes_nothing_and_says_so(text: Any) -> None:
    candidate = calibrate.fn(text.checkpoint, text.dataset, Quantize(format="int8"))
    with pytest.raises(InputError, match="nothing was pruned"):
        sparsify.fn(candidate, text.dataset, Sparsify())


def test_groups_of_four_are_counted_along_k() -> None:
    weight = torch.tensor([[1, 0, 0, 2, 1, 1, 1, 0], [0, 0, 0, 0, 1, 0, 1, 0]])
    assert checkpoints.groups_2_4(weight) == (3, 4)
    convolution = torch.ones(2, 4, 3, 3)
    assert checkpoints.groups_2_4(convolution) == (0, 18)
    convolution[:, :2] = 0
    assert checkpoints.groups_2_4(convolution) == (18, 18)
    assert checkpoints.groups_2_4(torch.ones(2, 3)) == (0, 0)


@pytest.mark.parametrize("axis", [0, 1])
def test_weights_fold_as_onnx_quantizes(axis: int) -> None:
    from onnx.reference import ReferenceEvaluator

    rng = np.random.default_rng(0)
    weight = rng.normal(size=(6, 8)).astype(np.float32)
    weight[0, :4] = [0.5, 1.5, 2.5, 1000.0]
    scale = (
        np.full(weight.shape[axis], 1.0, np.float32) if axis else rng.uniform(0.01, 0.1, 6).astype(np.float32)
    )
    zero = np.zeros_like(scale, dtype=np.int8)
    node = onnx.helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"], axis=axis)
    values = [("w", onnx.TensorProto.FLOAT, weight.shape), ("s", 1, scale.shape), ("z", 3, zero.shape)]
    inputs = [onnx.helper.make_tensor_value_info(*value) for value in values]
    output = onnx.helper.make_tensor_value_info("q", onnx.TensorProto.INT8, weight.shape)
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", inputs, [output]),
        opset_imports=[onnx.helper.make_opsetid("", 20)],
    )
    (expected,) = ReferenceEvaluator(model).run(None, {"w": weight, "s": scale, "z": zero})
    np.testing.assert_array_equal(quantize_weight(weight, scale, zero, axis), expected)


def test_a_checkpoint_that_does_not_fit_its_config(text: Any, tmp_path: Path) -> None:
    import json
    import shutil

    source = Path(text.model.source.removeprefix("path:"))
    for key, value in (("hidden_size", 64), ("num_hidden_layers", 3)):
        folder = tmp_path / key
        shutil.copytree(source, folder)
        config = json.loads((folder / "config.json").read_text()) | {key: value}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match="does not fit its config"):
            load.load_model.fn(
                Model(name="x", source=f"path:{folder}"), text.data, "text-classification", "", 0
            )
    with pytest.raises(InputError, match=r"no config\.json"):
        load.load_model.fn(
            Model(name="x", source=f"path:{tmp_path}"), text.data, "text-classification", "", 0
        )


def test_a_network_and_data_of_different_shapes(image: Any) -> None:
    data = image.data.model_copy(update={"image": image.data.image.model_copy(update={"shape": (1, 1, 64)})})
    with pytest.raises(InputError, match=r"cannot take this recipe's inputs.*\(1, 1, 1, 64\)"):
        load.load_model.fn(image.model, data, "image-classification", "", 0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("undefined", "odd_network:build cannot be imported: NameError: name 'undefined' is not defined"),
        ("def build(): pass", "odd_network:build raised TypeError for 10 labels: .* 0 positional arguments"),
        ("def build(labels): pass", "returned NoneType, not a torch.nn.Module"),
        (
            "from torch import nn\nclass build(nn.Linear):\n"
            "  def __init__(self, labels): super().__init__(64, labels)\n"
            "  def forward(self, pixels): return {}['logits']",
            "cannot take this recipe's inputs .*: KeyError: 'logits'",
        ),
    ],
)
def test_what_a_network_of_ones_own_does_wrong_is_told(
    image: Any, text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd_network.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "odd_network", raising=False)
    with pytest.raises(InputError, match=words):
        own = Model(name="x", source="python:odd_network:build")
        load.load_model.fn(own, image.data, "image-classification", "", 0)


def test_training_that_diverges_is_refused(image: Any) -> None:
    section = Finetune(epochs=0.2, batch_size=32, learning_rate=1e30)
    with pytest.raises(InputError, match="NaN or infinity.*lower the learning rate"):
        finetune.fn(image.checkpoint, image.dataset, section)


def test_a_dataset_survives_prefect_s_json(text: Any) -> None:
    from prefect.serializers import JSONSerializer

    serializer: Any = JSONSerializer()
    for value in (text.dataset, text.checkpoint):
        back = serializer.loads(serializer.dumps(value))
        assert back == value
        assert isinstance(back, Dataset | Checkpoint)
