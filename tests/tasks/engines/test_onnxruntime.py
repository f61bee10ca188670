from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tasks.engines import onnxruntime as engine
from tasks.engines import onnxruntime_session
from tasks.engines.common import Built, RefitError
from tasks.errors import InputError
from tests.tasks.engines.onnx_graphs import Builder, image, pixels, sentences, text


def save(model: onnx.ModelProto, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    return folder


def built(model: onnx.ModelProto, folder: Path, samples: list[dict[str, np.ndarray]]) -> Built:
    return engine.build(save(model, folder / "onnx"), folder, samples=samples, threads=1)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    built(text(1), folder, sentences())
    return folder


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("second")
    built(text(2), folder, sentences())
    return folder


@pytest.fixture
def copy(first: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(first, tmp_path / "copy"))


def outputs(plan: Path, weights: Path | None, **options: str) -> list[np.ndarray]:
    with engine.open(plan, weights, threads=1, **options) as session:
        return [session.run(sample)["logits"] for sample in sentences(5)]


def test_a_built_text_engine_runs_in_integers_and_agrees(tmp_path: Path) -> None:
    result = built(text(), tmp_path, sentences())
    assert result.proved == "executed"
    assert result.facts["level"] == "all"
    assert result.facts["max_error_share"] < 1e-4
    assert result.facts["requantize_error"]["max_error"] > 0
    proof = result.facts["proof"]
    assert proof["operators"] == {"Attention": 1, "MatMulIntegerToFloat": 7}
    assert proof["quantized_share_by_count"] == pytest.approx(7 / 8)
    assert 0.9 < proof["quantized_share"] < 1
    assert [f["operator"] for f in proof["fallbacks"]] == ["Attention"]
    assert result.facts["weights_bytes"] < 0.3 * 4 * (4200 * 256 + 4 * 256 * 256 + 2 * 256 * 384)
    json.dumps(result.facts)


def test_operations_are_counted_from_shapes(tmp_path: Path) -> None:
    proof = built(text(), tmp_path, sentences(shapes=((1, 8),))).facts["proof"]
    attention = 4 * 8 * 8 * 256
    layers = 2 * 8 * (4 * 256 * 256 + 2 * 256 * 384) + 2 * 256 * 3
    assert [f["operations"] for f in proof["fallbacks"]] == [attention]
    assert proof["quantized_share"] == pytest.approx(layers / (layers + attention))


def test_inputs_say_what_a_session_takes(first: Path) -> None:
    with engine.open(first / "plan", first / "weights") as session:
        assert session.inputs["input_ids"] == ("int64", (None, None))
        with pytest.raises(InputError, match=r"cannot run on .*input_ids"):
            session.run({"input_ids": np.zeros((1, 4), np.int64)})


def test_tensors_on_a_device_give_the_same_outputs(first: Path) -> None:
    """IOBinding, on the one device that every machine has."""
    feed = sentences(1)[0]
    with engine.open(first / "plan", first / "weights") as session:
        expected = session.run(feed)
        got = session.run_on_device(session.to_device(feed, "cpu"), "cpu")
    assert {name: value.device_name() for name, value in got.items()} == dict.fromkeys(expected, "cpu")
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name].numpy(), value)


def test_an_image_engine_runs_its_convolutions_in_integers(tmp_path: Path) -> None:
    proof = built(image(), tmp_path, pixels()).facts["proof"]
    assert proof["operators"] == {"MatMulIntegerToFloat": 1, "QLinearConv": 2}
    assert proof["quantized_share"] == 1.0


def test_a_convolution_that_stays_in_float_says_why(tmp_path: Path) -> None:
    proof = built(image(residual=True), tmp_path, pixels()).facts["proof"]
    whys = {f["why"] for f in proof["fallbacks"]}
    assert len(proof["fallbacks"]) == 2
    assert proof["fallbacks"][0]["operations"] == 2 * 6 * 8 * 16 * 9
    assert whys == {"its result is wanted in float, where ConvInteger is slower than a float convolution"}


def test_a_convolution_whose_weight_is_computed_has_no_known_work(tmp_path: Path) -> None:
    b = Builder(0)
    weight = b.add("Mul", b.add("ReduceMean", "pixels", keepdims=0), b.constant(b.normal(4, 1, 3, 3)))
    logits = b.add("Flatten", b.add("Conv", "pixels", weight, kernel_shape=[3, 3], pads=[1] * 4))
    model = b.model({"pixels": (TensorProto.FLOAT, ["batch", 1, 4, 4])}, logits, ["batch", 64])
    proof = built(model, tmp_path, pixels()).facts["proof"]
    assert (proof["products"], len(proof["unplaced"])) == (1, 1)


def test_fp8_runs_rightly_in_float(tmp_path: Path) -> None:
    result = built(text(kind=TensorProto.FLOAT8E4M3FN), tmp_path, sentences())
    assert result.facts["mean_error_share"] < 0.02
    assert result.facts["proof"]["quantized_share"] == 0.0
    whys = {f["why"] for f in result.facts["proof"]["fallbacks"] if f["operator"] != "Attention"}
    assert whys == {"no kernel on this processor for FLOAT8E4M3FN times FLOAT8E4M3FN"}


def test_int4_runs_rightly_in_float(tmp_path: Path) -> None:
    b = Builder(0)
    values = b.random.integers(-8, 8, (32, 4))
    b.tensors.append(helper.make_tensor("weight", TensorProto.INT4, (32, 4), values.ravel().tolist()))
    scale = b.constant(np.full((2, 4), 0.1))
    logits = b.add("MatMul", "x", b.add("DequantizeLinear", "weight", scale, axis=0, block_size=16))
    model = b.model({"x": (TensorProto.FLOAT, ["n", 32])}, logits, ["n", 4], opset=21)
    sample = {"x": b.normal(3, 32)}
    result = built(model, tmp_path, [sample])
    with engine.open(tmp_path / "plan", tmp_path / "weights") as session:
        np.testing.assert_allclose(session.run(sample)["logits"], sample["x"] @ (values * 0.1), atol=1e-4)
    assert result.facts["proof"]["fallbacks"][0]["why"] == "only one side is quantized (INT4)"


def test_a_lowering_that_changes_results_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = engine.lower

    def wrong(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[dict[str, str]]]:
        lowered, steps = right(model)
        for node in lowered.graph.node:
            if node.op_type == "Attention":
                next(a for a in node.attribute if a.name == "scale").f = -1.0
        return lowered, steps

    monkeypatch.setattr(engine, "lower", wrong)
    facts = built(text(), tmp_path, sentences()).facts
    assert facts["steps"] == []
    assert facts["max_error_share"] < 1e-4


def test_two_trainings_share_a_plan_and_a_refit_equals_a_build_bit_for_bit(
    first: Path, second: Path, tmp_path: Path
) -> None:
    for name in ("model.onnx", "plan.json"):
        assert (first / "plan" / name).read_bytes() == (second / "plan" / name).read_bytes()
    result = engine.refit(first / "plan", second / "onnx", tmp_path, samples=sentences())
    assert result.proved == "executed"
    assert not (tmp_path / "plan").exists()
    for name in ("weights.safetensors", "weights.json"):
        assert (tmp_path / "weights" / name).read_bytes() == (second / "weights" / name).read_bytes()
    fresh = outputs(second / "plan", second / "weights")
    for one, other in zip(outputs(first / "plan", tmp_path / "weights"), fresh, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(fresh[0], outputs(first / "plan", first / "weights")[0])


def test_a_graph_that_needs_no_lowering_refits_too(tmp_path: Path) -> None:
    for seed in (1, 2):
        b = Builder(seed)
        logits = b.add("MatMul", "x", b.constant(b.normal(8, 4)))
        model = b.model({"x": (TensorProto.FLOAT, ["n", 8])}, logits, ["n", 4])
        samples = [{"x": np.ones((3, 8), np.float32)}]
        assert built(model, tmp_path / str(seed), samples).facts["steps"] == []
    engine.refit(tmp_path / "1" / "plan", tmp_path / "2" / "onnx", tmp_path, samples=samples)
    name = "weights.safetensors"
    assert (tmp_path / "weights" / name).read_bytes() == (tmp_path / "2" / "weights" / name).read_bytes()


def test_refit_refuses_another_graph(first: Path, tmp_path: Path) -> None:
    model = save(text(heads=8), tmp_path / "onnx")
    with pytest.raises(RefitError, match="another graph"):
        engine.refit(first / "plan", model, tmp_path, samples=sentences())


def test_refit_refuses_scales_that_lower_in_another_way(first: Path, tmp_path: Path) -> None:
    model = save(text(3, key_scale=0.02), tmp_path / "onnx")
    with pytest.raises(RefitError, match=r"cannot take these weights: tensor \S+ is (missing|not used)"):
        engine.refit(first / "plan", model, tmp_path, samples=sentences())


def test_refit_refuses_outputs_that_are_not_those_of_its_graph(
    first: Path, second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = engine.split

    def forgetful(model: onnx.ModelProto, plan: Path, weights: Path) -> None:
        right(model, plan, weights)
        if weights == tmp_path / "weights":
            shutil.copyfile(first / "weights" / "weights.safetensors", weights / "weights.safetensors")

    monkeypatch.setattr(engine, "split", forgetful)
    with pytest.raises(RefitError, match="other outputs"):
        engine.refit(first / "plan", second / "onnx", tmp_path, samples=sentences())


def test_a_plan_cut_short_is_named(copy: Path) -> None:
    file = copy / "plan" / "model.onnx"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.onnx is damaged or cut short.*build again"):
        engine.open(copy / "plan", copy / "weights")


def test_swapped_weights_are_named(copy: Path, second: Path) -> None:
    shutil.copyfile(second / "weights" / "weights.safetensors", copy / "weights" / "weights.safetensors")
    with pytest.raises(InputError, match=r"weights\.safetensors was swapped or damaged.*refit again"):
        engine.open(copy / "plan", copy / "weights")


def test_weights_of_another_graph_are_named(first: Path, tmp_path: Path) -> None:
    built(image(), tmp_path, pixels())
    with pytest.raises(InputError, match=r"belongs to another graph.*tensor \S+ is (missing|not used)"):
        engine.open(first / "plan", tmp_path / "weights")


def test_weights_of_a_plan_with_the_same_tensors_are_named(first: Path, tmp_path: Path) -> None:
    built(text(1, heads=8), tmp_path, sentences())
    with pytest.raises(InputError, match="was made for plan"):
        engine.open(first / "plan", tmp_path / "weights")


def test_a_plan_of_another_runtime_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime_session, "version", lambda: "1.99.0")
    with pytest.raises(InputError, match=r"made by ONNX Runtime 1\.\d+\.\d+, here is 1\.99\.0"):
        engine.open(copy / "plan", copy / "weights")


def test_missing_parts_are_named(first: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no plan"):
        engine.open(tmp_path, None)
    with pytest.raises(InputError, match="needs weights"):
        engine.open(first / "plan", None)
    with pytest.raises(InputError, match="holds no weights"):
        engine.open(first / "plan", tmp_path)


def test_a_plain_graph_opens_as_reference_at_a_named_level(first: Path) -> None:
    reference = outputs(first / "onnx", None, level="disabled")
    for one, other in zip(reference, outputs(first / "plan", first / "weights"), strict=True):
        assert np.abs(one - other).max() < 0.1 * np.abs(one).max()


def test_hosts_whose_kernels_saturate_get_the_exact_ones(first: Path) -> None:
    import onnxruntime as ort

    options = onnxruntime_session.session_options("all", 1, "cpu:avx2")
    assert options.get_session_config_entry("session.x64quantprecision") == "1"
    folder = str((first / "weights").resolve())
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    session = ort.InferenceSession((first / "plan" / "model.onnx").read_bytes(), options)
    want = outputs(first / "plan", first / "weights")[0]
    np.testing.assert_allclose(session.run(None, sentences(5)[0])[0], want, atol=1e-5)


def test_parity_counts_what_is_not_finite_as_infinitely_wrong() -> None:
    want = {"logits": np.array([1.0, np.inf, -2.0])}
    assert engine.parity([want], [want])["max_error"] == 0.0
    assert engine.parity([want], [{"logits": np.array([1.0, np.inf, np.nan])}])["max_error"] == np.inf
    assert engine.parity([want], [{"logits": np.array([1.0, np.inf])}])["max_error"] == np.inf
    assert engine.parity([want], [{"logits": np.array([1.5, np.inf, -2.0])}])["max_error_share"] == 0.25


def test_parity_is_that_of_the_worst_output_however_small_it_is_beside_another() -> None:
    want = {"logits": np.array([1000.0, 0.0]), "box": np.array([1.0, 1.0])}
    found = engine.parity([want, want], [want, {**want, "box": np.zeros(2)}])
    assert found["max_error_share"] == 1.0
    assert found["mean_error_share"] == 0.5
