"""Padding before and ReLU6 behind a convolution go into integers where that is exact, and stay elsewhere."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from tasks.engines.lowering import lower
from tests.tasks.engines.onnx_graphs import Builder
from tests.tasks.engines.test_lowering import operators, run


def mobile(
    scale: float = 6 / 127, value: float = 0.0, pads: tuple[int, ...] = (0, 0, 0, 0, 0, 0, 1, 1)
) -> onnx.ModelProto:
    """Pad, convolve, clip, convolve, as EfficientNet-Lite begins."""
    b = Builder(0)
    padded = b.add("Pad", "x", b.constant(pads, np.int64), b.constant(value))
    first = b.add("Conv", b.activation(padded, 0.05), b.weight(8, 2, 3, 3), strides=[2, 2])
    clipped = b.add("Clip", first, b.constant(0.0), b.constant(6.0))
    last = b.add("Conv", b.activation(clipped, scale), b.weight(4, 8, 1, 1))
    return b.model({"x": (TensorProto.FLOAT, ["n", 2, 8, 8])}, last, ["n", 4, 4, 4])


def samples() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).normal(0, 20, (3, 2, 8, 8)).astype(np.float32)}


def test_both_go_where_they_are_exact() -> None:
    model = mobile()
    lowered, steps = lower(model)
    assert Counter(step["transform"] for step in steps) == {"padding": 1, "relu6": 1, "conv": 1}
    assert operators(lowered)["QLinearConv"] == 1
    assert not operators(lowered)["Pad"]
    wanted, found = run(model, samples()), run(lowered, samples())
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()  # a step of one quantized value


@pytest.mark.parametrize(
    ("model", "kept"),
    [
        (mobile(scale=8 / 127), "Clip"),  # the quantizer holds up to 8, so 6 is still to be cut
        (mobile(value=1.0), "Pad"),
        (mobile(pads=(0, 1, 0, 0, 0, -1, 1, 1)), "Pad"),  # channels
    ],
)
def test_what_would_change_a_number_stays(model: onnx.ModelProto, kept: str) -> None:
    lowered, _ = lower(model)
    assert operators(lowered)[kept] == 1
    wanted, found = run(model, samples()), run(lowered, samples())
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()


def test_a_channel_that_is_its_bias_keeps_no_convolution_in_float() -> None:
    """A batch norm folded in leaves weights of next to nothing, whose scale is too small for the bias."""
    b = Builder(0)
    scales = np.full(8, 0.01, np.float32)
    scales[3] = 1e-13
    integers = b.constant(b.random.integers(-127, 128, (8, 2, 3, 3)), np.int8)
    weight = b.add("DequantizeLinear", integers, b.constant(scales), b.zero((8,)), axis=0)
    bias = b.constant(np.linspace(-3, 3, 8))
    first = b.add("Relu", b.add("Conv", b.activation("x", 0.05), weight, bias))
    last = b.add("Conv", b.activation(first, 0.5), b.weight(4, 8, 1, 1))
    model = b.model({"x": (TensorProto.FLOAT, ["n", 2, 8, 8])}, last, ["n", 4, 6, 6])
    lowered, steps = lower(model)
    assert [step["transform"] for step in steps] == ["conv"]
    wanted, found = run(model, samples()), run(lowered, samples())
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()
