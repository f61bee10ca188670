"""Batch norms go into the convolutions before them, and nothing else changes."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

from recipes.build import Build, Export
from recipes.compress import Quantize, Sparsify
from tasks import batches, checkpoints, norms, store
from tasks.artifacts import Checkpoint
from tasks.build import build, host
from tasks.calibrate import calibrate
from tasks.export import export
from tasks.sparsify import sparsify
from tasks.strip import strip


class Padded(nn.Conv2d):
    """EfficientNet's "same" padding: a forward of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.static_padding = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.static_padding(x)
        return nn.functional.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def network(_labels: int) -> nn.Module:
    """As EfficientNet-Lite is built: padded and depthwise convolutions, norms, ReLU6."""
    torch.manual_seed(0)
    made = nn.Sequential(
        Padded(1, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU6(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6(),
        nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    with torch.no_grad():
        for norm in (m for m in made if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
            norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            norm.weight.uniform_(0.5, 2)
            norm.bias.uniform_(-1, 1)
    return made


@pytest.fixture
def checkpoint(image: Any, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    import shutil

    module = types.ModuleType("test_norms_network")
    module.network = network  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "test_norms_network", module)
    net, config = checkpoints.from_function("test_norms_network:network", image.dataset.type, 10, 0)
    with store.staging() as folder:
        shutil.copytree(batches.preprocessor(image.checkpoint), folder / "preprocessor")
        return checkpoints.save(net, config, folder, image.dataset.type, {})


def test_norms_are_folded_and_outputs_stay() -> None:
    before, inputs = network(10).eval(), torch.randn(3, 1, 8, 8)
    after, into = norms.folded(before, lambda net: net(inputs))
    assert into == {"1": "0", "4": "3", "7": "6"}
    assert not [m for m in after.modules() if isinstance(m, nn.BatchNorm2d)]
    torch.testing.assert_close(after(inputs), before(inputs), rtol=1e-4, atol=1e-5)
    assert [
        m for m in before.modules() if isinstance(m, nn.BatchNorm2d)
    ]  # the one that was given is as it was


class Twice(nn.Module):
    """A convolution's output goes into a norm and past it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.norm.weight.data.fill_(2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.conv(x)
        out: torch.Tensor = self.norm(made) + made
        return out


def test_a_norm_whose_convolution_is_used_elsewhere_stays() -> None:
    before, inputs = Twice().eval(), torch.randn(3, 1, 8, 8)
    after, into = norms.folded(before, lambda net: net(inputs))
    assert (into, after) == ({}, before)


def test_folded_quantized_and_restored_it_computes_the_same(image: Any, checkpoint: Checkpoint) -> None:
    candidate = calibrate.fn(checkpoint, image.dataset, Quantize(format="int8"))
    assert candidate.facts["quantizers"]["weights"] == 4
    forward = batches.forward(image.dataset, checkpoint)
    restored, config = checkpoints.restore(candidate)
    assert config["norms_in_convolutions"] == {"net.1": "net.0", "net.4": "net.3", "net.7": "net.6"}
    dense, _ = checkpoints.restore(strip.fn(candidate))
    first, _ = checkpoints.restore(checkpoint)
    with torch.no_grad():
        torch.testing.assert_close(forward(dense), forward(first), rtol=1e-3, atol=1e-4)
        assert torch.cosine_similarity(forward(restored), forward(first)).min() > 0.99


def test_its_engine_convolves_in_integers_through_padding_and_relu6(
    image: Any, checkpoint: Checkpoint
) -> None:
    candidate = calibrate.fn(checkpoint, image.dataset, Quantize(format="int8"))
    model = export.fn(candidate, image.dataset, Export(), "fp32")
    engine = build.fn(model, candidate, image.dataset, Build(), "onnxruntime", host("onnxruntime"))
    floats = [found["node"] for found in engine.facts["proof"]["fallbacks"]]
    assert engine.facts["proof"]["operators"].get("QLinearConv") == 2, floats
    assert {"padding", "relu6", "conv"} <= {step["transform"] for step in engine.facts["steps"]}
    assert engine.facts["agrees"]
    assert (
        engine.facts["proof"]["unplaced"] == []
    )  # the last convolution, in float, has its share of the work
    assert 0.3 < engine.facts["proof"]["quantized_share"] < 0.9


def test_norms_are_folded_before_pruning_so_that_zeros_stay(image: Any, checkpoint: Checkpoint) -> None:
    pruned = sparsify.fn(checkpoint, image.dataset, Sparsify())
    assert pruned.facts["sparsity"]["names"] == ["net.6"]
    quantized = calibrate.fn(pruned, image.dataset, Quantize(format="int8"))
    assert export.fn(quantized, image.dataset, Export(), "fp32").facts["sparse_names"] == ["net.6"]
