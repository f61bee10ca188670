"""Every post-training format on a real tiny BERT or CNN: calibrated, exported, equal to torch, stored so."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from recipes.build import Build, Export
from recipes.compress import Finetune, Quantize, Sparsify
from tasks import batches, blockwise, checkpoints, layers, store, upstream
from tasks import export as export_module
from tasks.artifacts import Checkpoint, OnnxModel
from tasks.build import build, host
from tasks.calibrate import calibrate, recalibrate
from tasks.engines import onnxruntime
from tasks.errors import InputError
from tasks.export import export
from tasks.finetune import finetune
from tasks.sparsify import sparsify

NEW = Export(opset=21)


def logits(checkpoint: Checkpoint, batch: dict[str, np.ndarray]) -> np.ndarray:
    model, _ = checkpoints.restore(checkpoint)
    with torch.no_grad():
        found = model(**batches.tensors(batch))
    return np.asarray(getattr(found, "logits", found))


def graph_of(model: OnnxModel) -> onnx.ModelProto:
    return onnx.load(store.path(model.blob) / "model.onnx")


def sample(case: Any, checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return batches.samples(case.dataset, batches.preprocessor(checkpoint), count=1)[0]


def differs(case: Any, candidate: Checkpoint, model: OnnxModel) -> float:
    """The largest difference between ONNX Runtime without optimization and torch's fake quantization."""
    batch = sample(case, candidate)
    with onnxruntime.open(store.path(model.blob), None, level="disabled") as session:
        got = session.run(batch)["logits"]
    return float(np.abs(got - logits(candidate, batch)).max())


@pytest.mark.parametrize(
    ("section", "stored"),
    [
        ({"format": "int8-weight-only", "embeddings": True}, {"INT8": 17}),
        pytest.param({"format": "int8", "algorithm": "entropy"}, {"INT8": 14 + 28}, marks=pytest.mark.long),
        ({"format": "int8", "algorithm": "percentile", "percentile": 99.0}, {"INT8": 14 + 28}),
        ({"format": "int8", "algorithm": "smoothquant"}, {"INT8": 14 + 28}),
        ({"format": "int4", "block_size": 32}, {"INT4": 14}),
        ({"format": "int4", "block_size": 16, "algorithm": "awq"}, {"INT4": 14}),
        ({"format": "w4a8", "block_size": 32}, {"INT4": 14}),
        ({"format": "w4a8", "block_size": 32, "algorithm": "awq", "embeddings": True}, {"INT4": 14}),
        ({"format": "fp8"}, {"FLOAT8E4M3FN": 28}),
        ({"format": "fp8", "attention": True}, {"FLOAT8E4M3FN": 36}),
    ],
    ids=lambda value: "-".join(str(item) for item in value.values()),
)
def test_a_format_computes_what_torch_does_and_is_stored_as_it_says(
    text: Any, section: dict[str, Any], stored: dict[str, int]
) -> None:
    candidate = calibrate.fn(text.checkpoint, text.dataset, Quantize(**section))
    model = export.fn(candidate, text.dataset, NEW, "fp32")
    assert model.format == section["format"]
    assert differs(text, candidate, model) < 1e-6
    for kind, count in stored.items():
        assert model.facts["tensors"][kind] >= count
    floats = [t.name for t in graph_of(model).graph.initializer if t.data_type == 1 and len(t.dims) == 2]
    scales = [name for name in floats if name.endswith("_scale")]
    tables = 0 if section.get("embeddings") else 3
    assert len(floats) - len(scales) == tables, floats


def test_int4_blocks_mean_the_same_to_onnx_itself(text: Any) -> None:
    candidate = calibrate.fn(text.checkpoint, text.dataset, Quantize(format="int4", block_size=16))
    model = export.fn(candidate, text.dataset, NEW, "fp32")
    graph = graph_of(model)
    nodes = [node for node in graph.graph.node if node.op_type == "DequantizeLinear"]
    network, _ = checkpoints.restore(candidate)
    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    for node in nodes:
        inputs = [tensors[name] for name in node.input]
        alone = onnx.helper.make_model(
            onnx.helper.make_graph(
                [node], "g", [], [onnx.helper.make_tensor_value_info(node.output[0], 1, None)], inputs
            ),
            opset_imports=graph.opset_import,
        )
        (values,) = ReferenceEvaluator(alone).run(None, {})
        name = node.output[0].removeprefix("model.").removesuffix(".T").removesuffix(".weight")
        layer: Any = network.get_submodule(name)
        wanted = layer.weight_quantizer(layer.weight).detach().numpy()
        turned = node.output[0].endswith(".T")
        np.testing.assert_allclose(values.T if turned else values, wanted, atol=1e-7)
    assert len(nodes) == 14


def test_int4_integers_are_the_quantizers_where_weights_lie_halfway() -> None:
    import modelopt.torch.quantization as mtq

    network = torch.nn.Sequential(torch.nn.Linear(64, 256))
    ends = torch.rand(256, 1, generator=torch.Generator().manual_seed(0)) + 0.1
    with torch.no_grad():
        network[0].weight.copy_(ends * (torch.arange(64) % 7 + 0.5) / 7)
        network[0].weight[:, -1:] = ends
    int4 = {"num_bits": 4, "block_sizes": {-1: 64}}
    rules = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": int4},
    ]
    mtq.quantize(network, {"quant_cfg": rules, "algorithm": "max"}, lambda net: net(torch.ones(1, 64)))
    meant = network[0].weight_quantizer(network[0].weight).detach().numpy()
    block = blockwise.lift(network)["0"]
    np.testing.assert_allclose(block.integers * block.scales, meant, rtol=1e-4)


def test_an_int4_engine_agrees_with_its_graph_at_the_level_it_runs_at(text: Any) -> None:
    candidate = calibrate.fn(text.checkpoint, text.dataset, Quantize(format="int4", block_size=32))
    model = export.fn(candidate, text.dataset, NEW, "fp32")
    engine = build.fn(model, candidate, text.dataset, Build(), "onnxruntime", host("onnxruntime"))
    assert (engine.proved, engine.format) == ("executed", "int4")
    assert engine.facts["max_error_share"] < 0.01


def test_half_precision_keeps_int4_and_scales_by_halves(text: Any) -> None:
    candidate = calibrate.fn(text.checkpoint, text.dataset, Quantize(format="int4", block_size=32))
    model = export.fn(candidate, text.dataset, NEW, "fp16")
    assert model.facts["tensors"]["INT4"] == 14
    assert "FLOAT" not in model.facts["tensors"]


@pytest.mark.parametrize(("precision", "opset", "kind"), [("fp16", 20, "FLOAT16"), ("bf16", 22, "BFLOAT16")])
def test_numbers_alone_can_be_what_a_recipe_changes(text: Any, precision: Any, opset: int, kind: str) -> None:
    model = export.fn(text.checkpoint, text.dataset, Export(opset=opset, precision=precision), precision)
    assert model.format == precision
    assert set(model.facts["tensors"]) == {kind, "INT64"}
    graph = graph_of(model).graph
    assert graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT


@pytest.mark.long
def test_entropy_and_percentile_cut_what_max_keeps(text: Any) -> None:
    ranges = {}
    for algorithm in ("max", "entropy", "percentile"):
        extra = {"percentile": 90.0} if algorithm == "percentile" else {}
        section = Quantize(format="int8", algorithm=algorithm, **extra)  # type: ignore[arg-type]
        model, _ = checkpoints.restore(calibrate.fn(text.checkpoint, text.dataset, section))
        query: Any = model.get_submodule("bert.encoder.layer.0.attention.self.query")
        ranges[algorithm] = float(query.input_quantizer.amax)
        assert query.weight_quantizer.amax.shape == (32, 1)
    assert ranges["percentile"] < ranges["max"]
    assert ranges["entropy"] < ranges["max"]


def test_calibrating_again_on_the_same_rows_changes_no_range(text: Any) -> None:
    section = Quantize(format="int8", algorithm="percentile", percentile=99.0)
    first = calibrate.fn(text.checkpoint, text.dataset, section)
    again = recalibrate.fn(first, text.dataset, section)
    assert again.identity == first.identity


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_2_4_is_found_by_name_in_fp8(text: Any, precision: Any) -> None:
    pruned = sparsify.fn(text.checkpoint, text.dataset, Sparsify(exclude=("classifier",)))
    candidate = calibrate.fn(pruned, text.dataset, Quantize(format="fp8"))
    model = export.fn(candidate, text.dataset, NEW, precision)
    assert set(candidate.facts["sparsity"]["names"]) <= set(model.facts["sparse_names"])


def test_2_4_survives_int4_and_training(text: Any) -> None:
    pruned = sparsify.fn(text.checkpoint, text.dataset, Sparsify(exclude=("classifier",)))
    section = Quantize(format="int4", block_size=32, exclude=("classifier",))
    candidate = calibrate.fn(pruned, text.dataset, section)
    trained = finetune.fn(candidate, text.dataset, Finetune(epochs=0.1, batch_size=8, learning_rate=1e-3))
    model = export.fn(trained, text.dataset, NEW, "fp32")
    assert model.facts["sparse_names"] == trained.facts["sparsity"]["names"]
    assert differs(text, trained, model) < 1e-6


def test_a_2_4_weight_that_is_lost_is_named(text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned = sparsify.fn(text.checkpoint, text.dataset, Sparsify(exclude=("classifier",)))
    fold = export_module.name_weights

    def and_fill_one(graph: onnx.ModelProto, network: Any, *rest: Any) -> None:
        fold(graph, network, *rest)
        for tensor in graph.graph.initializer:
            values = numpy_helper.to_array(tensor)
            if tensor.name == "model.bert.pooler.dense.weight":
                tensor.CopyFrom(numpy_helper.from_array(np.ones_like(values), tensor.name))
            if tensor.name == "model.classifier.weight":  # as many as before, but another one
                tensor.CopyFrom(numpy_helper.from_array(np.zeros_like(values), tensor.name))

    monkeypatch.setattr(export_module, "name_weights", and_fill_one)
    with pytest.raises(InputError, match=r"13 weights are 2:4.*not in the graph: bert\.pooler\.dense$"):
        export.fn(pruned, text.dataset, Export(), "fp32")


def test_int4_leaves_convolutions_and_says_why(image: Any) -> None:
    candidate = calibrate.fn(image.checkpoint, image.dataset, Quantize(format="int4"))
    left_out = candidate.facts["quantizers"]["left_out"]
    assert sorted(left_out) == ["net.0", "net.2", "net.5"]
    assert all("for linear layers" in why for why in left_out.values())
    assert export.fn(candidate, image.dataset, NEW, "fp32").facts["tensors"]["INT4"] == 2


def test_a_block_that_does_not_divide_a_layer_is_named(text: Any) -> None:
    with pytest.raises(InputError, match=r"128 does not divide the inputs of .*query \(32\).*smaller"):
        calibrate.fn(text.checkpoint, text.dataset, Quantize(format="int4"))


def test_layernorm_and_embeddings_are_left_alone_unless_asked(text: Any) -> None:
    candidate = calibrate.fn(text.checkpoint, text.dataset, Quantize(format="int8"))
    model, _ = checkpoints.restore(candidate)
    assert not any("LayerNorm" in name for name in checkpoints.quantizers(model))
    why = candidate.facts["quantizers"]["left_out"]["bert.embeddings.word_embeddings"]
    assert why == "an embedding, and quantize.embeddings is not set"


def test_attention_that_is_not_there_is_refused(image: Any) -> None:
    with pytest.raises(InputError, match=r"quantize\.attention.*no attention of a known kind"):
        calibrate.fn(image.checkpoint, image.dataset, Quantize(format="fp8", attention=True))


class SamePadding(torch.nn.Conv2d):
    """As EfficientNet has them: a forward of its own, which pads and convolves."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.static_padding = torch.nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(
            self.static_padding(x),
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )


class Scaled(SamePadding):
    """Not only padding."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def padded(kind: type[SamePadding]) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        kind(1, 8, 3, stride=2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 16, 10)
    )


def same_padding(_labels: int) -> torch.nn.Module:
    """For `python:`."""
    return padded(SamePadding)


def scaled(_labels: int) -> torch.nn.Module:
    """For `python:`."""
    return padded(Scaled)


class Shared(torch.nn.Module):
    """A convolution and a linear layer that run twice each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.twice = torch.nn.Conv2d(1, 16, 1), torch.nn.Conv2d(16, 16, 3, padding=1)
        self.again, self.last = torch.nn.Linear(256, 256), torch.nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for _ in range(2):
            x = torch.relu(self.twice(x))
        x = torch.max_pool2d(x, 2).flatten(1)
        for _ in range(2):
            x = torch.relu(self.again(x))
        out: torch.Tensor = self.last(x)
        return out


def shared(_labels: int) -> torch.nn.Module:
    """For `python:`."""
    return Shared()


def test_a_weight_that_serves_twice_is_stored_once_in_int8_and_2_4(
    image: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = from_here(image, "shared", monkeypatch)
    pruned = sparsify.fn(dense, image.dataset, Sparsify(exclude=("net.first", "net.last")))
    candidate = calibrate.fn(pruned, image.dataset, Quantize(format="int8"))
    model = export.fn(candidate, image.dataset, Export(), "fp32")
    weights = [t for t in graph_of(model).graph.initializer if len(t.dims) > 1]
    assert [t.data_type for t in weights] == 4 * [TensorProto.INT8]
    assert {"net.twice", "net.again"} < set(model.facts["sparse_names"])
    assert differs(image, candidate, model) < 1e-6
    engine = build.fn(model, candidate, image.dataset, Build(), "onnxruntime", host("onnxruntime"))
    assert engine.facts["proof"]["quantized_share"] == 1


def test_padding_before_a_convolution_becomes_plain_and_equal() -> None:
    before = padded(SamePadding)
    inputs = torch.randn(3, 1, 8, 8)
    wanted = before(inputs)
    state = before.state_dict()
    after = layers.plain(before)
    assert type(after[0]) is torch.nn.Conv2d  # type: ignore[index]
    assert torch.equal(after(inputs), wanted)
    assert list(after.state_dict()) == list(state)
    assert type(layers.plain(padded(Scaled))[0]) is Scaled  # type: ignore[index]


def from_here(image: Any, function: str, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """An untrained checkpoint of a function in this file."""
    import shutil
    import sys
    import types

    module = types.ModuleType("test_formats_networks")
    functions = {"same_padding": same_padding, "scaled": scaled, "shared": shared}
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, "test_formats_networks", module)
    network, config = checkpoints.from_function(
        f"test_formats_networks:{function}", image.dataset.type, 10, 0
    )
    with store.staging() as folder:
        shutil.copytree(batches.preprocessor(image.checkpoint), folder / "preprocessor")
        return checkpoints.save(network, config, folder, image.dataset.type, {})


def test_such_a_convolution_is_quantized_and_exported(image: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = from_here(image, "same_padding", monkeypatch)
    candidate = calibrate.fn(checkpoint, image.dataset, Quantize(format="int8"))
    assert candidate.facts["quantizers"] == {"enabled": 4, "weights": 2, "inputs": 2, "left_out": {}}
    assert differs(image, candidate, export.fn(candidate, image.dataset, Export(), "fp32")) < 1e-6


def test_any_other_forward_is_refused_by_name(image: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = from_here(image, "scaled", monkeypatch)
    with pytest.raises(InputError, match=r"net\.0 have a forward of their own.*quantize\.exclude"):
        calibrate.fn(checkpoint, image.dataset, Quantize(format="int8"))
    candidate = calibrate.fn(checkpoint, image.dataset, Quantize(format="int8", exclude=("net.0",)))
    assert candidate.facts["quantizers"]["left_out"] == {"net.0": "named by quantize.exclude"}


def test_the_exporter_still_leaves_padding_to_compute(image: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = calibrate.fn(
        from_here(image, "same_padding", monkeypatch), image.dataset, Quantize(format="int8")
    )

    def computed() -> bool:
        model = onnx.load(
            store.path(export.fn(candidate, image.dataset, Export(), "fp32").blob) / "model.onnx"
        )
        stored = {tensor.name for tensor in model.graph.initializer}
        (pads,) = (node.input[1] for node in model.graph.node if node.op_type == "Pad")
        return pads not in stored

    assert not computed()
    monkeypatch.setattr(upstream, "padding_left_to_compute", lambda _graph: None)
    assert computed()


@pytest.mark.parametrize(
    ("fix", "section"),
    [
        ("q_dq_in_tensorrts_domain", {"format": "w4a8", "block_size": 32}),
        ("q_dq_after_softmax", {"format": "fp8"}),
        ("float_types_of_fp8_values", {"format": "fp8"}),
    ],
)
def test_modelopt_still_needs_each_fix(
    text: Any, fix: str, section: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails when ModelOpt's exporter no longer does what the fix is for: then the fix can go."""
    candidate = calibrate.fn(text.checkpoint, text.dataset, Quantize(**section))
    monkeypatch.setattr(upstream, fix, lambda _graph: None)
    try:
        wrong = differs(text, candidate, export.fn(candidate, text.dataset, NEW, "fp32"))
    except Exception:  # the graph is not valid, or ONNX Runtime refuses it
        wrong = np.inf
    assert wrong > 1e-5


def test_effective_bits_leave_the_layers_that_lose_most(text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a dense copy, then applied to the pruned network; the choice and its bits stand in the facts."""
    pruned = sparsify.fn(text.checkpoint, text.dataset, Sparsify(exclude=("classifier",)))
    section = Quantize(format="int8", effective_bits=11.0, batch_size=8)
    candidate = calibrate.fn(pruned, text.dataset, section)
    auto, left_out = candidate.facts["quantizers"]["auto"], candidate.facts["quantizers"]["left_out"]
    assert 8 < auto["bits"] <= 11
    assert auto["left"]
    assert set(auto["left"]) <= set(left_out)
    quantized = {
        name.rpartition(".")[0] for name in checkpoints.quantizers(checkpoints.restore(candidate)[0])
    }
    assert quantized
    assert not quantized & set(auto["left"])
    assert set(auto["scores"]) == quantized | set(auto["left"])
    assert candidate.facts["sparsity"] == pruned.facts["sparsity"]
    assert max(auto["scores"].values()) == 1.0
    assert max(auto["scores"], key=auto["scores"].__getitem__) in auto["left"]
    monkeypatch.setattr(upstream, "tiny_scores_look_equal_to_the_solver", lambda state: None)
    plain = calibrate.fn(pruned, text.dataset, section).facts["quantizers"]["auto"]
    worst = max(plain["scores"], key=plain["scores"].__getitem__)
    assert worst not in plain["left"], "ModelOpt's solver now tells tiny scores apart: no need to scale them"


def test_too_few_effective_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="between 8, the bits of int8, and 16"):
        Quantize(format="int8", effective_bits=8)
