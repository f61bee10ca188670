"""The Hugging Face checkpoint for vLLM and TensorRT-LLM: read again, tensor by tensor the network's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import recipes
from recipes.compress import Quantize, Sparsify
from tasks import handover, load, store
from tasks.artifacts import Checkpoint, Dataset
from tasks.calibrate import calibrate
from tasks.errors import InputError
from tasks.sparsify import sparsify

TASK = "causal-lm"
LEFT = ("lm_head", "model.embed_tokens")


@pytest.fixture(scope="module")
def start(lm_recipe: Path) -> tuple[Dataset, Checkpoint]:
    recipe = recipes.load(str(lm_recipe))
    dataset = load.load_data.fn(recipe.data, TASK, "content")
    return dataset, load.load_model.fn(recipe.model, recipe.data, TASK, "content", 0)


@pytest.mark.parametrize(
    ("section", "algorithm", "kind"),
    [
        ({"format": "fp8"}, "FP8", torch.float8_e4m3fn),
        pytest.param(
            {"format": "int4", "algorithm": "awq", "block_size": 32},
            "W4A16_AWQ",
            torch.uint8,
            marks=pytest.mark.long,
        ),
        pytest.param(
            {"format": "int8", "algorithm": "smoothquant"},
            "W8A8_SQ_PER_CHANNEL",
            torch.int8,
            marks=pytest.mark.long,
        ),
        ({"format": "nvfp4"}, "NVFP4", torch.uint8),
    ],
    ids=lambda value: value.get("format") if isinstance(value, dict) else "",
)
def test_what_is_written_is_the_network(
    kernels: None,
    start: tuple[Dataset, Checkpoint],
    section: dict[str, Any],
    algorithm: str,
    kind: torch.dtype,
) -> None:
    dataset, checkpoint = start
    quantized = calibrate.fn(checkpoint, dataset, Quantize(**section, exclude=LEFT))
    made = handover.handover.fn(quantized, dataset)
    assert made.blob is not None
    assert made.facts["quantized"] == 14
    assert made.facts["algorithm"] == algorithm
    assert made.facts["codes_rounded_apart"] <= made.facts["codes"] * 1e-3
    assert made.values["logits_cosine"] > (0.98 if algorithm == "NVFP4" else 0.99)  # activations of 4 bits
    folder = store.path(made.blob)
    assert (folder / "tokenizer.json").is_file()
    told = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (told["quant_method"], told["quant_algo"]) == ("modelopt", algorithm)
    assert "lm_head" in told["ignore"]
    stored = load_file(folder / "model.safetensors")
    assert stored["model.layers.1.mlp.down_proj.weight"].dtype == kind
    assert stored["lm_head.weight"].dtype == torch.float32


def test_an_embedding_tied_to_the_head_is_stored_once(
    lm_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "from recipes import tiny_llama\nfrom transformers import LlamaForCausalLM\n\n\ndef build(labels):\n"
    )
    code += "    config = tiny_llama.build(labels).config\n    config.tie_word_embeddings = True\n"
    (tmp_path / "tied_llama.py").write_text(code + "    return LlamaForCausalLM(config)\n")
    monkeypatch.syspath_prepend(tmp_path)
    recipe = recipes.load(str(lm_recipe), ["model.source=python:tied_llama:build"])
    dataset = load.load_data.fn(recipe.data, TASK, "content")
    checkpoint = load.load_model.fn(recipe.model, recipe.data, TASK, "content", 0)
    made = handover.handover.fn(
        calibrate.fn(checkpoint, dataset, Quantize(format="fp8", exclude=LEFT)), dataset
    )
    assert made.blob is not None
    stored = load_file(store.path(made.blob) / "model.safetensors")
    assert "model.embed_tokens.weight" in stored
    assert "lm_head.weight" not in stored
    assert made.values["logits_cosine"] > 0.99


def test_a_tensor_too_many_is_an_error(
    start: tuple[Dataset, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, checkpoint = start
    quantized = calibrate.fn(checkpoint, dataset, Quantize(format="fp8", exclude=LEFT))
    written = handover._written

    def more(network: Any, folder: Path) -> Any:
        found = written(network, folder)
        stored = load_file(folder / "model.safetensors")
        save_file({**stored, "model.norm.mask": torch.ones(2)}, folder / "model.safetensors")
        return found

    monkeypatch.setattr(handover, "_written", more)
    with pytest.raises(RuntimeError, match="too many or missing: model.norm.mask"):
        handover.handover.fn(quantized, dataset)


def test_a_pruned_network_is_refused_and_modelopt_still_does_not_write_one(
    start: tuple[Dataset, Checkpoint],
) -> None:
    """When the second half fails, ModelOpt writes them: the refusal can go."""
    dataset, checkpoint = start
    pruned = sparsify.fn(checkpoint, dataset, Sparsify(exclude=("lm_head",)))
    quantized = calibrate.fn(pruned, dataset, Quantize(format="fp8", exclude=LEFT))
    with pytest.raises(InputError, match="no quantized weights of a pruned network"):
        handover.handover.fn(quantized, dataset)
    dense = replace(quantized, facts={**quantized.facts, "sparsity": {}})
    with pytest.raises(KeyError, match="q_proj.weight_scale"):
        handover.handover.fn(dense, dataset)


def test_a_format_that_nobody_reads_is_refused(start: tuple[Dataset, Checkpoint]) -> None:
    dataset, checkpoint = start
    with pytest.raises(InputError, match="the network is not quantized; vLLM and TensorRT-LLM read fp8"):
        handover.handover.fn(checkpoint, dataset)


def test_a_tensor_that_is_not_the_network_s_is_an_error(
    start: tuple[Dataset, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, checkpoint = start
    quantized = calibrate.fn(checkpoint, dataset, Quantize(format="fp8", exclude=LEFT))
    written = handover._written
    layer = "model.layers.0.self_attn.o_proj"

    def tampered(network: Any, folder: Path) -> Any:
        found = written(network, folder)
        stored = load_file(folder / "model.safetensors")
        stored[f"{layer}.weight_scale"] = stored[f"{layer}.weight_scale"] * 1.1
        save_file(stored, folder / "model.safetensors")
        return found

    monkeypatch.setattr(handover, "_written", tampered)
    with pytest.raises(RuntimeError, match=f"{layer}.weight"):
        handover.handover.fn(quantized, dataset)
