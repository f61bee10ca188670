from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import load_file

from tasks.engines.lowering import lower, requantize, tensors
from tasks.engines.lowering.graph import Graph
from tasks.engines.lowering.split import PLAN, WEIGHTS, load, split
from tests.tasks.engines.onnx_graphs import Builder, image, mixed, pixels, sentences, text


def run(model: onnx.ModelProto, sample: dict[str, np.ndarray]) -> np.ndarray:
    return run_all(model, sample)[0]


def run_all(model: onnx.ModelProto, sample: dict[str, np.ndarray]) -> list[np.ndarray]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(output) for output in session.run(None, sample)]


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def near(found: np.ndarray, want: np.ndarray) -> None:
    """Within what a step of one quantized value can do."""
    assert np.abs(found - want).max() < 0.01 * np.abs(want).max()


def linear(**changes: object) -> onnx.ModelProto:
    """One Gemm on a quantized input, changed by what a test is about."""
    b = Builder(0)
    data = b.activation("x", 0.05)
    weight = b.weight(4, 8, axis=int(str(changes.pop("axis", 0))))
    bias = b.constant(np.asarray(changes.pop("bias", b.normal(4))))
    return b.model(
        {"x": (TensorProto.FLOAT, ["n", 8])}, b.add("Gemm", data, weight, bias, transB=1, **changes), ["n", 4]
    )


def test_a_text_model_keeps_its_numbers_in_integer_operators() -> None:
    model = text()
    lowered, steps = lower(model)
    found = operators(lowered)
    assert found["MatMulIntegerToFloat"] == 7
    assert found["Attention"] == 1
    assert not {"DequantizeLinear", "MatMul", "Gemm", "Softmax", "Transpose"} & set(found)
    assert Counter(step["transform"] for step in steps) == {"gemm": 7, "attention": 1}
    for sample in sentences():
        assert np.abs(run(lowered, sample) - run(model, sample)).max() < 1e-5


def test_a_mean_of_opset_17_is_lowered_with_the_attention_before_it() -> None:
    model = text(opset=17)
    lowered, steps = lower(model)
    assert Counter(step["transform"] for step in steps) == {"gemm": 7, "attention": 1}
    for sample in sentences():
        assert np.abs(run(lowered, sample) - run(model, sample)).max() < 1e-5


def test_query_key_and_value_share_one_quantize_node_only_on_one_scale() -> None:
    assert operators(lower(text())[0])["QuantizeLinear"] == 5
    assert operators(lower(text(key_scale=0.02))[0])["QuantizeLinear"] == 6


def test_values_past_the_scale_saturate_as_before() -> None:
    model = linear()
    lowered, _ = lower(model)
    assert operators(lowered)["MatMulIntegerToFloat"] == 1
    sample = {"x": np.linspace(-9, 9, 40, dtype=np.float32).reshape(5, 8)}
    np.testing.assert_allclose(run(lowered, sample), run(model, sample), atol=1e-5)
    zeros = [t for t in lowered.graph.initializer if t.data_type == TensorProto.UINT8]
    assert [onnx.numpy_helper.to_array(zero).tolist() for zero in zeros] == [128]


def test_a_bias_that_is_an_alias_of_another_tensor_is_found() -> None:
    b = Builder(0)
    bias = b.add("Identity", b.constant(b.normal(4)))
    product = b.add("MatMul", b.activation("x", 0.05), b.add("Transpose", b.weight(4, 8), perm=[1, 0]))
    inputs = {"x": (TensorProto.FLOAT, ["n", 8])}
    model = b.model(inputs, b.add("Add", bias, product), ["n", 4])
    lowered, _ = lower(model)
    assert set(operators(lowered)) == {"QuantizeLinear", "MatMulIntegerToFloat", "Identity"}
    sample = {"x": np.ones((2, 8), np.float32)}
    np.testing.assert_allclose(run(lowered, sample), run(model, sample), atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{"axis": 1}, {"alpha": 0.5}, {"beta": 0.5}, {"bias": np.ones((1, 4), np.float32)}], ids=str
)
def test_a_gemm_that_no_integer_kernel_computes_stays(changes: dict[str, object]) -> None:
    model = linear(**changes)
    lowered, steps = lower(model)
    assert steps == []
    sample = {"x": np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)}
    np.testing.assert_array_equal(run(lowered, sample), run(model, sample))


def test_fp8_is_left_alone() -> None:
    model = text(kind=TensorProto.FLOAT8E4M3FN)
    assert requantize(model)[1] == []
    assert {step["transform"] for step in lower(model)[1]} == {"attention"}


def test_attention_of_other_shape_stays() -> None:
    model = text()
    for node in model.graph.node:
        if node.op_type == "Softmax":
            node.attribute[0].i = 2
    lowered, steps = lower(model)
    assert {step["transform"] for step in steps} == {"gemm"}
    sample = sentences()[0]
    assert np.abs(run(lowered, sample) - run(model, sample)).max() < 1e-5


def test_an_embedding_table_goes_to_int8_within_half_a_step() -> None:
    model = text()
    changed, steps = requantize(model)
    assert [step["transform"] for step in steps] == ["quantize_embedding"]
    graph, table = Graph(changed), onnx.numpy_helper.to_array(model.graph.initializer[0])
    name = steps[0]["weight"]
    values, scale = graph.array(f"{name}.i8"), graph.array(f"{name}.scale")
    assert values is not None
    assert scale is not None
    assert values.dtype == np.int8
    assert np.all(np.abs(values * scale[:, None] - table) <= scale[:, None] / 2 + 1e-7)


def test_rows_are_picked_before_they_are_scaled_with_equal_results() -> None:
    changed, _ = requantize(text())
    lowered, steps = lower(changed)
    assert "embedding" in {step["transform"] for step in steps}
    assert operators(lowered)["DequantizeLinear"] == 0
    sample = sentences()[0]
    assert np.abs(run(lowered, sample) - run(changed, sample)).max() < 1e-5


def test_convolutions_stay_in_integers_up_to_the_next_layer() -> None:
    model = image()
    lowered, steps = lower(model)
    assert [step["transform"] for step in steps] == ["conv", "conv", "gemm"]
    assert not {"Conv", "Relu", "DequantizeLinear"} & set(operators(lowered))
    assert operators(lowered)["QuantizeLinear"] == 1
    near(run(lowered, pixels()[0]), run(model, pixels()[0]))


def test_a_pool_on_another_scale_keeps_both_roundings() -> None:
    model = image(pool_scale=0.017)
    lowered, steps = lower(model)
    assert [step["transform"] for step in steps] == ["conv", "conv", "gemm"]
    assert operators(lowered)["QuantizeLinear"] == 2
    near(run(lowered, pixels()[0]), run(model, pixels()[0]))


def pooled(first: np.integer, last: np.integer, *, seen: bool = False) -> onnx.ModelProto:
    """A pool between two quantizers on one scale, of these zero points; `seen`: the pool is an output."""
    b = Builder(0)
    scale = b.constant(0.02)

    def rounded(value: str, zero: np.integer) -> str:
        numbers = [scale, b.constant(zero, zero.dtype)]
        return b.add("DequantizeLinear", b.add("QuantizeLinear", value, *numbers), *numbers)

    pool = b.add("MaxPool", rounded("pixels", first), kernel_shape=[2, 2], strides=[2, 2])
    inputs = {"pixels": (TensorProto.FLOAT, ["batch", 1, 4, 4])}
    model = b.model(inputs, rounded(pool, last), ["batch", 1, 2, 2])
    if seen:
        model.graph.output.append(helper.make_tensor_value_info(pool, TensorProto.FLOAT, None))
    return model


@pytest.mark.parametrize(
    ("model", "quantizers"),
    [
        (pooled(np.int8(0), np.int8(0)), 1),
        (pooled(np.int8(0), np.uint8(0)), 2),  # the first ends at 2.54, the second at 5.1
        (pooled(np.int8(0), np.int8(0), seen=True), 2),
    ],
    ids=["one grid", "two grids", "an output"],
)
def test_a_rounding_goes_only_where_the_next_one_is_the_same_and_alone(
    model: onnx.ModelProto, quantizers: int
) -> None:
    lowered, _ = lower(model)
    assert operators(lowered)["QuantizeLinear"] == quantizers
    sample = {"pixels": np.random.default_rng(0).uniform(-6, 6, (3, 1, 4, 4)).astype(np.float32)}
    for found, wanted in zip(run_all(lowered, sample), run_all(model, sample), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_one_scale_may_serve_two_zero_points_and_one_bias_two_layers() -> None:
    b = Builder(0)
    scale, bias = b.constant(0.02), b.constant(b.normal(4))
    parts = []
    for zero in (np.int8(0), np.uint8(0), np.uint8(128)):
        numbers = [scale, b.constant(zero, zero.dtype)]
        data = b.add("DequantizeLinear", b.add("QuantizeLinear", "pixels", *numbers), *numbers)
        product = b.add("Conv", data, b.weight(4, 1, 3, 3), bias, kernel_shape=[3, 3])
        parts.append(b.activation(product, 0.03))
    total = b.add("Sum", *parts)
    model = b.model({"pixels": (TensorProto.FLOAT, ["batch", 1, 4, 4])}, total, ["batch", 4, 2, 2])
    lowered, _ = lower(model)
    assert operators(lowered)["QLinearConv"] == 3
    sample = {"pixels": np.random.default_rng(0).uniform(-3, 5, (3, 1, 4, 4)).astype(np.float32)}
    np.testing.assert_allclose(run(lowered, sample), run(model, sample), atol=0.04)


@pytest.mark.parametrize("seed", range(0, 300, 60))
def test_any_graph_computes_what_it_did(seed: int) -> None:
    random = np.random.default_rng(seed)
    for each in range(seed, seed + 60):
        model = mixed(each)
        lowered, _ = lower(model)
        sample = {"pixels": random.uniform(-2, 3, (3, 4, 8, 8)).astype(np.float32)}
        for found, wanted in zip(run_all(lowered, sample), run_all(model, sample), strict=True):
            assert found.shape == wanted.shape, each
            # A value on the border of two steps may go to the other one, few do.
            assert np.abs(found - wanted).mean() <= 0.02 * np.abs(wanted).mean() + 1e-3, each


def test_a_convolution_whose_result_is_summed_in_float_stays() -> None:
    model = image(residual=True)
    lowered, steps = lower(model)
    assert [step["transform"] for step in steps] == ["gemm"]
    assert operators(lowered)["Conv"] == 2
    sample = pixels()[0]
    assert np.abs(run(lowered, sample) - run(model, sample)).max() < 1e-5


def test_two_trainings_have_one_plan_and_other_weights(tmp_path: Path) -> None:
    for seed in (1, 2):
        split(lower(requantize(text(seed))[0])[0], tmp_path / f"plan{seed}", tmp_path / f"weights{seed}")
    assert (tmp_path / "plan1" / PLAN).read_bytes() == (tmp_path / "plan2" / PLAN).read_bytes()
    first, second = (load_file(tmp_path / f"weights{seed}" / WEIGHTS) for seed in (1, 2))
    assert first.keys() == second.keys()
    assert all(first[name].shape == second[name].shape for name in first)
    trained = [name for name in first if first[name].size > 1 and np.any(first[name])]
    assert sum(not np.array_equal(first[name], second[name]) for name in trained) == len(trained)


def test_a_split_model_is_whole_again_with_its_weights(tmp_path: Path) -> None:
    lowered, _ = lower(text())
    split(lowered, tmp_path, tmp_path)
    (tmp_path / WEIGHTS).read_bytes()
    sample = sentences()[0]
    np.testing.assert_array_equal(run(onnx.load(tmp_path / PLAN), sample), run(lowered, sample))
    again = {tensor.name: tensors.array(tensor) for tensor in load(tmp_path / PLAN).graph.initializer}
    for tensor in lowered.graph.initializer:
        np.testing.assert_array_equal(again[tensor.name], tensors.array(tensor))
    assert (tmp_path / PLAN).stat().st_size < 20_000
