"""The engine on what ModelOpt really exports, through the project's own export."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

from tasks import types
from tasks.engines import onnxruntime as engine
from tests.tasks.engines.onnx_graphs import sentences

if TYPE_CHECKING:
    from torch import nn

LAYERS = 2


def bert(seed: int) -> nn.Module:
    """A small BERT classifier with random weights, quantized to INT8 by ModelOpt."""
    import modelopt.torch.quantization as mtq
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=4200,
        hidden_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=512,
        attn_implementation="eager",
    )
    model = BertForSequenceClassification(config).eval()
    samples = [{name: torch.from_numpy(array) for name, array in sample.items()} for sample in sentences()]
    rules = {**mtq.INT8_DEFAULT_CFG}
    norms = {"parent_class": "nn.LayerNorm", "quantizer_name": "*", "enable": False}
    rules["quant_cfg"] = [*rules["quant_cfg"], norms]
    quantized: nn.Module = mtq.quantize(model, rules, lambda m: [m(**sample) for sample in samples])
    return quantized


def export(seed: int, folder: Path) -> Path:
    from tasks.export import _trace
    from tasks.fold import fold

    folder.mkdir()
    graph = _trace(bert(seed), sentences()[0], types.load("text-classification"), 20)
    fold(graph)
    onnx.save(graph, folder / "model.onnx")
    return folder


@pytest.mark.slow
def test_a_real_export_runs_in_integers_and_refits_bit_for_bit(tmp_path: Path) -> None:
    first, second = (export(seed, tmp_path / f"onnx{seed}") for seed in (1, 2))
    samples = sentences()
    built = engine.build(first, tmp_path / "first", samples=samples)
    steps = Counter(step["transform"] for step in built.facts["steps"])
    assert steps == {"gemm": 6 * LAYERS + 2, "attention": LAYERS, "embedding": 1}
    assert built.facts["proof"]["operators"] == {"Attention": LAYERS, "MatMulIntegerToFloat": 6 * LAYERS + 2}
    fresh = engine.build(second, tmp_path / "second", samples=samples)
    assert fresh.graph == built.graph
    engine.refit(tmp_path / "first" / "plan", second, tmp_path / "refit", samples=samples)
    with (
        engine.open(tmp_path / "first" / "plan", tmp_path / "refit" / "weights") as refitted,
        engine.open(tmp_path / "second" / "plan", tmp_path / "second" / "weights") as rebuilt,
    ):
        for sample in sentences(9, ((1, 5), (4, 30))):
            np.testing.assert_array_equal(refitted.run(sample)["logits"], rebuilt.run(sample)["logits"])
