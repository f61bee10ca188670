"""NVFP4 and MXFP8 from network to graph and plan. Without a GPU, NumPy stands in for ModelOpt's kernels."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file

import recipes
from recipes.build import Build, Export
from recipes.compress import Finetune, Quantize, Sparsify
from tasks import batches, calibrate, checkpoints, microscaled, store, types
from tasks import export as export_module
from tasks.artifacts import Checkpoint, OnnxModel
from tasks.build import build, host, installed
from tasks.engines import microscale, tensorrt, tensorrt_options, tensorrt_parity
from tasks.engines.lowering import tensors
from tasks.errors import InputError
from tasks.export import export
from tasks.finetune import finetune
from tasks.sparsify import sparsify

pytestmark = pytest.mark.slow
FORMATS = ("nvfp4", "mxfp8")
NEW = Export(opset=23)
needs_rtx = pytest.mark.skipif(installed("tensorrt-rtx") is None, reason="tensorrt-rtx is not installed")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch has a GPU here")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: ModelOpt's kernels")


def fake(values: np.ndarray, format: str, end: float) -> np.ndarray:
    """What a quantizer makes of values."""
    if format == "mxfp8":
        return microscale.mxfp8_values(*microscale.mxfp8(values))
    scale = microscale.global_scale(end)
    return microscale.nvfp4_values(*microscale.nvfp4(values, scale), scale)


def calibrated(case: Any, format: Any, start: Checkpoint | None = None) -> Checkpoint:
    return calibrate.calibrate.fn(start or case.checkpoint, case.dataset, Quantize(format=format))


def logits(checkpoint: Checkpoint, batch: dict[str, np.ndarray]) -> np.ndarray:
    model = checkpoints.restore(checkpoint)[0].to(checkpoints.device())
    given = {name: tensor.to(checkpoints.device()) for name, tensor in batches.tensors(batch).items()}
    with torch.no_grad():
        found = model(**given)
    return np.asarray(getattr(found, "logits", found).cpu())


def sample(case: Any) -> dict[str, np.ndarray]:
    return batches.samples(case.dataset, batches.preprocessor(case.checkpoint), count=1)[0]


def evaluated(model: OnnxModel, batch: dict[str, np.ndarray]) -> np.ndarray:
    """The graph by ONNX's own evaluator."""
    return tensorrt_parity.reference(store.path(model.blob) / "model.onnx", [batch])[0]["logits"]


@no_gpu
@pytest.mark.parametrize("flow", ["optimize", "retrain"])
def test_a_cpu_refuses_to_calibrate_before_anything_is_read(
    flow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreached(*_: Any) -> None:
        raise AssertionError("data were read")

    module: Any = importlib.import_module(f"flows.{flow}")
    monkeypatch.setattr(module, "content", unreached)
    recipe = recipes.load("sentiment-minilm-nvfp4")
    says = "nvfp4 needs an NVIDIA GPU with PyTorch's CUDA.*TensorRT 10.8 or newer.*10.0 or newer"
    with pytest.raises(InputError, match=says):
        module._optimize(recipe) if flow == "optimize" else module._retrain(recipe, None, None, False)


@no_gpu
@pytest.mark.parametrize("stage", ["calibrate", "recalibrate"])
def test_nor_does_a_stage_on_its_own(stage: str, image: Any) -> None:
    with pytest.raises(InputError, match="nvfp4 needs an NVIDIA GPU"):
        getattr(calibrate, stage).fn(image.checkpoint, image.dataset, Quantize(format="nvfp4"))


@no_gpu
def test_modelopt_itself_still_calibrates_on_a_cpu_and_then_fails() -> None:
    """When this fails, ModelOpt has CPU kernels or refuses by itself: `check_calibration` can change."""
    network = torch.nn.Sequential(torch.nn.Linear(32, 16))
    rows = torch.randn(4, 32)
    calibrate.quantized(network, Quantize(format="nvfp4"), lambda net: net(rows))
    assert len(checkpoints.quantizers(network)) == 2
    with pytest.raises(AssertionError, match="CUDA"):
        network(rows)


@pytest.mark.parametrize(
    ("end", "scale"),
    [
        (4.230118274688721, 0.0015737047651782632),
        (5.5016069412231445, 0.002046728739514947),
        (7.433316230773926, 0.0027653707657009363),  # a division has 0.0027653705328702927
        (9.051956176757812, 0.0033675432205200195),
    ],
)
def test_the_global_scale_is_what_a_gpu_makes_of_the_range(end: float, scale: float) -> None:
    """An H100's values were these, bit for bit, but for the third range, which was divided then."""
    assert microscale.global_scale(end) == scale


def test_the_numbers_are_those_of_modelopts_stored_tensors() -> None:
    from modelopt.torch.quantization.qtensor import MXFP8QTensor, NVFP4QTensor

    torch.manual_seed(0)
    weight = torch.randn(64, 128) * torch.logspace(-6, 0, 64)[:, None]
    end = torch.tensor(weight.abs().max().item() / 2)  # QAT moves weights past their range
    scale = microscale.global_scale(float(end))
    tensor, scales, whole = NVFP4QTensor.quantize(weight, 16, weights_scaling_factor_2=torch.tensor(scale))
    wanted = tensor.dequantize(torch.float32, scale=scales, double_scale=whole, block_sizes={-1: 16})
    got = microscale.nvfp4_values(*microscale.nvfp4(weight.numpy(), scale), scale)
    kept = (
        np.repeat(scales.float().numpy() * scale, 16, axis=1) >= microscale.SMALLEST_STEP
    )  # the kernel's own
    assert 0.5 < kept.mean() < 1
    assert not got[~kept].any()
    np.testing.assert_allclose(got[kept], wanted.numpy()[kept], rtol=1e-6)

    packed, exponents = MXFP8QTensor.quantize(weight)
    codes, found = microscale.mxfp8(weight.numpy())
    np.testing.assert_array_equal(found, exponents.numpy())
    np.testing.assert_array_equal(codes.astype(np.float32), packed._quantized_data.float().numpy())


def test_empty_blocks_have_scales_above_zero_and_no_values() -> None:
    values = np.zeros((2, 64), np.float32)
    values[1] = 3.0
    for format in FORMATS:
        np.testing.assert_array_equal(fake(values, format, 3.0)[0], 0)
        np.testing.assert_allclose(fake(values, format, 3.0)[1], 3.0, rtol=0.07)
    assert (microscale.nvfp4(values, 1e-3)[1].astype(np.float32) > 0).all()


@pytest.mark.parametrize(
    ("format", "stored"),
    [("nvfp4", {"FLOAT4E2M1": 14, "FLOAT8E4M3FN": 14}), ("mxfp8", {"FLOAT8E4M3FN": 14, "UINT8": 14})],
)
def test_the_graph_computes_what_the_network_does(
    kernels: None, text: Any, format: str, stored: dict[str, int]
) -> None:
    candidate, batch = calibrated(text, format), sample(text)
    assert candidate.facts["format"] == format
    assert {k: candidate.facts["quantizers"][k] for k in ("weights", "inputs")} == {
        "weights": 14,
        "inputs": 14,
    }
    wanted = logits(candidate, batch)
    assert np.abs(wanted - logits(text.checkpoint, batch)).max() > 1e-5
    model = export.fn(candidate, text.dataset, NEW, "fp32")
    assert np.abs(evaluated(model, batch) - wanted).max() < (1e-3 if torch.cuda.is_available() else 1e-6)
    assert model.format == format
    assert stored.items() <= model.facts["tensors"].items()
    graph = onnx.load(store.path(model.blob) / "model.onnx")
    wide = [t.name for t in graph.graph.initializer if t.data_type == 1 and len(t.dims) == 2]
    assert len(wide) == 3, wide  # the tables of words, places and types
    assert tensorrt_options.format_of(graph) == format
    foreign = {node.op_type for node in graph.graph.node if node.domain}
    assert foreign == (
        {microscale.FP4_QUANTIZE}
        if format == "nvfp4"
        else {*microscale.QUANTIZE[1:], microscale.MXFP8_DEQUANTIZE}
    )


def kept_and_saved(case: Any, format: Any) -> tuple[np.ndarray, Checkpoint]:
    """Logits of the network that was calibrated, never saved; and the checkpoint of another calibration."""
    model = checkpoints.restore(case.checkpoint)[0].to(checkpoints.device())
    loop = batches.forward_loop(case.dataset, batches.preprocessor(case.checkpoint), 32, "calibrate")
    batch = {k: v.to(checkpoints.device()) for k, v in batches.tensors(sample(case)).items()}
    quantized: Any = calibrate.quantized(model, Quantize(format=format), loop)
    with torch.no_grad():
        return quantized(**batch).logits.cpu().numpy(), calibrated(case, format)


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_saved_is_restored_and_trains_on(kernels: None, text: Any, format: str) -> None:
    kept, candidate = kept_and_saved(text, format)
    np.testing.assert_array_equal(logits(candidate, sample(text)), kept)
    after = finetune.fn(candidate, text.dataset, Finetune(epochs=1, learning_rate=1e-3))
    assert np.abs(logits(after, sample(text)) - kept).max() > 1e-4
    exported = export.fn(after, text.dataset, NEW, "fp32")
    limit = 1e-3 if torch.cuda.is_available() else 1e-5
    assert np.abs(evaluated(exported, sample(text)) - logits(after, sample(text))).max() < limit


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
def test_on_a_gpu_logits_are_restored_bit_for_bit_and_the_graph_is_valid(text: Any, format: str) -> None:
    kept, candidate = kept_and_saved(text, format)
    np.testing.assert_array_equal(logits(candidate, sample(text)), kept)
    model = export.fn(candidate, text.dataset, NEW, "fp16")
    assert model.facts["quantize_nodes"] == 14
    wrong = np.linalg.norm(evaluated(model, sample(text)) - kept) / np.linalg.norm(kept)
    assert wrong < (0.2 if format == "nvfp4" else 0.05)  # FP16 turns a code of 4 bits over now and then


@pytest.mark.parametrize(("format", "precision"), [("nvfp4", "fp16"), ("mxfp8", "fp32")])
def test_a_network_past_a_gigabyte_is_the_same_network(
    kernels: None, text: Any, format: str, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = calibrated(text, format)
    whole = export.fn(candidate, text.dataset, NEW, precision)
    monkeypatch.setattr(export_module, "EXTERNAL_DATA_PAST", 0)
    monkeypatch.setattr(tensors, "LARGE", 1 << 10)
    apart = export.fn(candidate, text.dataset, NEW, precision)
    folder = store.path(apart.blob)
    assert (folder / "model.onnx.data").stat().st_size > 1 << 10
    stored = onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer
    outside = [tensor.name for tensor in stored if tensors.outside(tensor)]
    assert outside
    assert all("embeddings" in name for name in outside)
    np.testing.assert_allclose(evaluated(apart, sample(text)), evaluated(whole, sample(text)), atol=1e-6)
    assert apart.facts["tensors"] == whole.facts["tensors"]


def test_another_format_is_another_network_though_its_tensors_are_the_same(kernels: None, text: Any) -> None:
    """What is trained or exported of FP8 must not be taken for NVFP4's."""
    found = {format: calibrated(text, format) for format in ("fp8", "nvfp4")}
    saved = [load_file(store.path(one.blob) / "model.safetensors") for one in found.values()]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    assert found["fp8"].identity != found["nvfp4"].identity
    section = Finetune(epochs=1)
    assert len({finetune.key(one, text.dataset, section, None) for one in found.values()}) == 2


def test_pruned_weights_stay_pruned(kernels: None, text: Any) -> None:
    pruned = sparsify.fn(text.checkpoint, text.dataset, Sparsify(exclude=("classifier",)))
    candidate = calibrated(text, "nvfp4", pruned)
    model = export.fn(candidate, text.dataset, NEW, "fp16")
    assert model.facts["sparse_weights"] >= pruned.facts["sparsity"]["modules"] > 0


def test_only_linear_layers_of_a_cnn_are_quantized(kernels: None, image: Any) -> None:
    candidate = calibrated(image, "nvfp4")
    left_out = candidate.facts["quantizers"]["left_out"]
    assert left_out
    assert all("for linear layers" in why for why in left_out.values())
    model = export.fn(candidate, image.dataset, NEW, "fp32")
    assert np.abs(evaluated(model, sample(image)) - logits(candidate, sample(image))).max() < 1e-4


def test_only_nvfp4_needs_rows_for_a_range(kernels: None) -> None:
    for format in FORMATS:
        network = torch.nn.Sequential(torch.nn.Linear(32, 16))
        section = Quantize(format=format)
        calibrate.quantized(network, section, lambda net: None)
        names = checkpoints.quantizers(network)
        if format == "mxfp8":
            calibrate._nothing_slipped_by(network, names, {"0"}, section)
        else:
            with pytest.raises(InputError, match="0 never ran while calibrating"):
                calibrate._nothing_slipped_by(network, names, {"0"}, section)


def test_a_width_that_blocks_do_not_divide_is_refused(kernels: None, image: Any) -> None:
    with pytest.raises(InputError, match=r"blocks of 32 do not divide the inputs of net \(20\); name them"):
        calibrate._check(Quantize(format="mxfp8"), {"net": torch.nn.Linear(20, 3)}, {})


@needs_rtx
@no_gpu
@pytest.mark.parametrize("format", FORMATS)
def test_a_plan_is_built_where_nothing_can_run_it(kernels: None, text: Any, format: str) -> None:
    candidate = calibrated(text, format)
    model = export.fn(candidate, text.dataset, NEW, "fp16")
    assert {"FLOAT16", "INT64"} < set(model.facts["tensors"])
    engine = build.fn(
        model, candidate, text.dataset, Build(runtime="tensorrt-rtx"), "tensorrt-rtx", host("tensorrt-rtx")
    )
    assert (engine.proved, engine.format) == ("built", format)


@needs_rtx
@no_gpu
@pytest.mark.parametrize(("format", "bits"), [("nvfp4", 4.5), ("mxfp8", 8.25)])
def test_a_plan_keeps_weights_in_their_bits(format: str, bits: float, tmp_path: Path) -> None:
    size = 1024
    random = np.random.default_rng(0)
    weight = random.standard_normal((size, size)).astype(np.float32)
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "model.wide.weight.T"], ["y"], name="/model/wide/MatMul")],
        "g",
        [info("x", TensorProto.FLOAT16, ["batch", size])],
        [info("y", TensorProto.FLOAT16, ["batch", size])],
        [numpy_helper.from_array(weight.T.astype(np.float16), "model.wide.weight.T")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    scale = microscale.global_scale(float(np.abs(weight).max()))
    layer = microscaled.Layer(*microscale.mxfp8(weight))
    if format == "nvfp4":
        layer = microscaled.Layer(*microscale.nvfp4(weight, scale), scale, scale)
    microscaled.place(model, {"wide": layer})
    onnx.save(model, tmp_path / "model.onnx")
    rows = random.standard_normal((8, size)).astype(np.float16)
    built = tensorrt.build(tmp_path, tmp_path / "out", samples=[{"x": rows}], flavor="tensorrt_rtx")
    assert built.proved == "built"
    beside = (tmp_path / "out/plan/engine.plan").stat().st_size - weight.size * bits / 8
    assert 0 < beside < 500_000  # what a plan takes without any weights is 0.3 MB
    got = tensorrt_parity.evaluate(model, [{"x": rows.astype(np.float32)}])[0]["y"]
    meant = fake(rows.astype(np.float32), format, float(np.abs(weight).max())) @ microscaled.values(layer).T
    assert tensorrt_parity.error({"y": got}, {"y": meant}) < 1e-6


def test_onnx_runtime_still_has_no_kernels(kernels: None, text: Any) -> None:
    """When this fails, ONNX Runtime runs such graphs: the recipe need not refuse it."""
    import onnxruntime

    for format in FORMATS:
        model = export.fn(calibrated(text, format), text.dataset, NEW, "fp32")
        with pytest.raises(Exception, match="TRT_|NOT_IMPLEMENTED"):
            onnxruntime.InferenceSession(store.path(model.blob) / "model.onnx")


def test_what_a_recipe_cannot_know_of_a_checkpoint_is_said_later(kernels: None, text: Any) -> None:
    candidate = calibrated(text, "nvfp4")
    with pytest.raises(InputError, match="export.opset: NVFP4 and MXFP8 need 23 or newer, not 20"):
        export.fn(candidate, text.dataset, Export(opset=20), "fp32")
    model = export.fn(candidate, text.dataset, NEW, "fp32")
    with pytest.raises(InputError, match="TRT_FP4DynamicQuantize"):
        build.fn(model, candidate, text.dataset, Build(), "onnxruntime", host("onnxruntime"))


@needs_rtx
def test_tensorrts_parser_still_takes_no_scales_of_e8m0(tmp_path: Path) -> None:
    """When this fails, MXFP8's weights can go through ONNX's own DequantizeLinear (opset 24)."""
    import ml_dtypes

    stored = [
        numpy_helper.from_array(np.ones((32, 64), ml_dtypes.float8_e4m3fn), "codes"),
        numpy_helper.from_array(np.ones((32, 2), ml_dtypes.float8_e8m0fnu), "scales"),
    ]
    nodes = [
        helper.make_node(
            "DequantizeLinear", ["codes", "scales"], ["w"], axis=-1, block_size=32, output_dtype=1
        ),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, size])]
        for name, size in (("x", 32), ("y", 64))
    ]
    graph = helper.make_graph(nodes, "g", *ends, stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)]), tmp_path / "model.onnx")
    with pytest.raises(InputError, match="import initializer: scales"):
        tensorrt.build(tmp_path, tmp_path / "out", samples=[], flavor="tensorrt_rtx")


@pytest.mark.parametrize("format", FORMATS)
def test_modelopts_own_exporter_still_does_not_do(kernels: None, text: Any, format: str) -> None:
    """When this fails, ModelOpt's exporter leaves a valid graph and GELU as it is: try it again."""
    from modelopt.torch._deploy.utils import OnnxBytes, get_onnx_bytes_and_metadata

    kind = types.load(text.dataset.type)
    network = checkpoints.restore(calibrated(text, format))[0].to(checkpoints.device())
    inputs = tuple(batches.tensors(sample(text))[n].to(checkpoints.device()) for n in kind.INPUTS)
    with checkpoints.quiet():
        content, _ = get_onnx_bytes_and_metadata(
            export_module._positional(network, kind, {}), inputs, weights_dtype="fp32", onnx_opset=23
        )
    graph = onnx.load_from_string(OnnxBytes.from_bytes(content).get_onnx_model_file_bytes())
    if format == "nvfp4":
        with pytest.raises(onnx.shape_inference.InferenceError, match="inconsistent type"):
            onnx.shape_inference.infer_shapes(graph, check_type=True, strict_mode=True)
    else:
        gelu = [a.s for node in graph.graph.node if node.op_type == "Gelu" for a in node.attribute]
        assert gelu
        assert set(gelu) == {b"tanh"}


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
def test_the_gpus_kernels_compute_these_numbers(format: Any) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(256, 128)).cuda()
    rows = torch.randn(64, 256, device="cuda")
    calibrate.quantized(network, Quantize(format=format), lambda net: net(rows))
    layer: Any = network[0]
    with torch.no_grad():
        of_weight = layer.weight_quantizer(layer.weight).cpu().numpy()
        of_input = layer.input_quantizer(rows).cpu().numpy()
    end = 0.0 if format == "mxfp8" else float(layer.input_quantizer.amax)
    assert (fake(rows.cpu().numpy(), format, end) != of_input).mean() < 1e-3
    lifted = microscaled.lift(network.cpu())["0"]
    assert (microscaled.values(lifted) != of_weight).mean() < 1e-3


def test_the_evaluator_gathers_from_more_than_64_rows() -> None:
    data, indices = np.arange(300, dtype=np.float32).reshape(1, 300), np.array([[5, 299, 0]])
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("GatherElements", ["x", "i"], ["y"], axis=1)],
        "g",
        [info("x", 1, [1, 300]), info("i", 7, [1, 3])],
        [info("y", 1, [1, 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    assert tensorrt_parity.evaluate(model, [{"x": data, "i": indices}])[0]["y"].tolist() == [[5, 299, 0]]


def with_modelopt(config: str) -> Any:
    """A network quantized by one of ModelOpt's own configurations."""
    import modelopt.torch.quantization as mtq

    network = torch.nn.Sequential(torch.nn.Linear(32, 16))
    with torch.no_grad(), checkpoints.quiet():
        mtq.quantize(network, getattr(mtq, config), lambda net: net(torch.randn(4, 32)))
    return network


@pytest.mark.parametrize("format", FORMATS)
def test_a_checkpoint_from_elsewhere_is_told_by_its_quantizers(kernels: None, format: str) -> None:
    network = with_modelopt(f"{format.upper()}_DEFAULT_CFG")
    assert checkpoints.compression(network)["format"] == format
    assert list(microscaled.lift(network)) == ["0"]
    assert not checkpoints.quantizers(network)


def test_what_modelopt_has_beside_these_is_refused(kernels: None) -> None:
    with pytest.raises(InputError, match=r"export: 0 is not in NVFP4 or MXFP8 as ModelOpt's NVFP4_DEFAULT"):
        microscaled.lift(with_modelopt("W4A16_NVFP4_CFG"))
