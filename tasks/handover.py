"""Hand over: the quantized language model as a Hugging Face checkpoint that vLLM and TensorRT-LLM read.

python -m flows optimize RECIPE     (stage `hand over`, with export.huggingface)

ModelOpt's unified export writes it. Both runtimes fuse what shares an input (query, key and value; gate and
up), so ModelOpt first gives such layers one scale: `logits_cosine` says how far that moves the network.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import batches, checkpoints, store
from tasks.artifacts import Checkpoint, Dataset, Facts, Metrics
from tasks.engines import microscale
from tasks.errors import InputError
from tasks.stage import stage

if TYPE_CHECKING:
    from torch import Tensor, nn

ALGORITHMS = {"fp8": "FP8", "int4": "W4A16_AWQ", "int8": "W8A8_SQ_PER_CHANNEL", "nvfp4": "NVFP4"}
"""What the checkpoint's own configuration must say of each format."""
ENDS = {"fp8": 448.0, "int8": 127.0, "nvfp4": 6 * 448.0}
NEAR = 1e-5
FLIPPED = 1e-3


@dataclass(frozen=True)
class Meant:
    """What a layer computes with: its weight as the quantizer gives it, and the end of its input's range."""

    weight: Tensor
    end: float | None


@stage(uses=("torch", "nvidia-modelopt", "transformers"), name="hand over", gpu=True, timeout_seconds=3600)
def handover(checkpoint: Checkpoint, dataset: Dataset) -> Metrics:
    """The checkpoint's folder, read again and compared tensor by tensor with the quantized network.

    Raises InputError for what is not a language model of transformers, RuntimeError when a stored tensor is
    not the network's.
    """
    format = format_of(checkpoint)
    network: Any = checkpoints.restore(checkpoint)[0].to(checkpoints.device())
    if not hasattr(network, "save_pretrained"):
        raise InputError("export.huggingface: the network is not one of transformers; leave it out")
    if network.config.architectures is None:  # a network from a configuration, never saved by transformers
        network.config.architectures = [type(network).__name__]
    batch = batches.samples(dataset, batches.preprocessor(checkpoint), count=1)[0]
    wanted = _logits(network, batch)
    with store.staging() as folder:
        meant, state = _written(network, folder)
        for file in batches.preprocessor(checkpoint).glob("*token*"):
            shutil.copy(file, folder)
        algorithm = _algorithm(folder, format)
        stored = _stored(folder)
        facts: Facts = {"format": format, "algorithm": algorithm, **_compared(stored, meant, state, format)}
        plain = _plain(network, _reloaded(stored, meant, format))
        cosine = _cosine(wanted, _logits(plain, batch))
        return Metrics({"logits_cosine": cosine}, store.commit(folder), facts)


def format_of(checkpoint: Checkpoint) -> str:
    """The format of the checkpoint; InputError for a network that cannot be handed over."""
    format = checkpoint.facts.get("format")
    if checkpoint.facts.get("sparsity"):
        raise InputError(
            "export.huggingface: ModelOpt writes no quantized weights of a pruned network; leave it out"
        )
    if format not in ALGORITHMS:
        raise InputError(
            f"export.huggingface: the network is {format or 'not quantized'}; vLLM and TensorRT-LLM read "
            f"{', '.join(ALGORITHMS)}. Leave export.huggingface out, or give a checkpoint in one of these"
        )
    return str(format)


def _written(network: nn.Module, folder: Path) -> tuple[dict[str, Meant], dict[str, Tensor]]:
    """Write the checkpoint; what its layers mean and all other tensors, once the scales are shared."""
    with checkpoints.quiet():
        from modelopt.torch.export import unified_export_hf as unified
    import torch

    with torch.no_grad(), checkpoints.quiet():
        unified.requantize_resmooth_fused_llm_layers(network)
        meant = {}
        for name, module in network.named_modules():
            quantizer: Any = getattr(module, "weight_quantizer", None)
            if quantizer is not None and quantizer.is_enabled:
                amax = module.input_quantizer.amax if module.input_quantizer.is_enabled else None
                weight = quantizer(module.weight.detach().float()).cpu().clone()
                meant[name] = Meant(weight, None if amax is None else float(amax))
        state = {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}
        unified.export_hf_checkpoint(network, export_dir=folder)
    return meant, state


def _algorithm(folder: Path, format: str) -> str:
    """The algorithm that the configuration names; RuntimeError unless it is the format's."""
    found = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]["quant_algo"]
    told = json.loads((folder / "config.json").read_text()).get("quantization_config", {}).get("quant_algo")
    if {found, told} != {ALGORITHMS[format]}:
        raise RuntimeError(f"hand-over: config.json says {told}, hf_quant_config.json {found}, not {format}")
    return str(found)


def _stored(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def _compared(
    stored: dict[str, Tensor], meant: dict[str, Meant], state: dict[str, Tensor], format: str
) -> Facts:
    """How many tensors are equal, how many codes differ by a rounding; RuntimeError for more than that."""
    import torch

    bad, flipped, codes = [], 0, 0
    for layer, wanted in meant.items():
        found = _dequantized(stored, layer, format)
        off = (found - wanted.weight).abs() > NEAR * wanted.weight.abs().max()
        flipped, codes = flipped + int(off.sum()), codes + off.numel()
        if off.float().mean() > FLIPPED:
            bad.append(f"{layer}.weight")
        scale = stored.get(f"{layer}.input_scale")
        if wanted.end is not None and format in ENDS:
            given = None if scale is None else float(scale)
            if given is None or abs(given - wanted.end / ENDS[format]) > NEAR * given:
                bad.append(f"{layer}.input_scale")
    others = [name for name in stored if name in state and name.rpartition(".")[0] not in meant]
    bad += [name for name in others if not torch.equal(stored[name], state[name])]
    if bad:
        raise RuntimeError(f"hand-over: not what the network computes with: {', '.join(bad[:5])}")
    return {"quantized": len(meant), "equal": len(others), "codes": codes, "codes_rounded_apart": flipped}


def _dequantized(stored: dict[str, Tensor], layer: str, format: str) -> Tensor:
    """The weight that the stored codes and scales stand for, of shape (out, in)."""
    import torch

    weight, scale = stored[f"{layer}.weight"], stored[f"{layer}.weight_scale"].float()
    if format == "fp8":
        return weight.float() * scale
    if format == "int8":
        return weight.float() * scale.reshape(-1, 1)
    if format == "nvfp4":
        return _fp4(weight, scale, float(stored[f"{layer}.weight_scale_2"]))
    codes = torch.stack([weight & 0x0F, weight >> 4], dim=1).to(torch.int8)  # two rows in a byte
    codes = torch.where(codes > 7, codes - 16, codes).reshape(-1, weight.shape[1])
    return (codes.reshape(*scale.shape, -1) * scale.unsqueeze(-1)).reshape(codes.shape)


def _fp4(packed: Tensor, scales: Tensor, scale: float) -> Tensor:
    """NVFP4's weight from two codes in a byte, a scale for each block, and that of them all."""
    import ml_dtypes
    import torch

    codes = torch.stack([packed & 0x0F, packed >> 4], dim=-1).reshape(packed.shape[0], -1)
    four = codes.numpy().view(ml_dtypes.float4_e2m1fn)
    return torch.from_numpy(microscale.nvfp4_values(four, scales.numpy(), scale))


def _reloaded(stored: dict[str, Tensor], meant: dict[str, Meant], format: str) -> dict[str, Tensor]:
    """The stored network's weights in floats, times what is left of AWQ's or SmoothQuant's scales."""
    found = {name: tensor for name, tensor in stored.items() if name.rpartition(".")[0] not in meant}
    for layer in meant:
        scale = stored.get(f"{layer}.pre_quant_scale")
        weight = _dequantized(stored, layer, format)
        found[f"{layer}.weight"] = weight if scale is None else weight * scale
        if f"{layer}.bias" in stored:
            found[f"{layer}.bias"] = stored[f"{layer}.bias"]
    return found


def _plain(network: Any, weights: dict[str, Tensor]) -> nn.Module:
    """A network of the same configuration, without quantizers and with these weights.

    RuntimeError where the checkpoint has a tensor that it lacks, or lacks one; tied ones are stored once.
    """
    from transformers import AutoModelForCausalLM

    made: nn.Module = AutoModelForCausalLM.from_config(network.config, attn_implementation="eager")
    missing, unexpected = made.load_state_dict(weights, strict=False)
    places = {name: tensor.data_ptr() for name, tensor in made.state_dict().items()}
    filled = {places[name] for name in weights if name in places}
    wrong = [*unexpected, *(name for name in missing if places[name] not in filled)]
    if wrong:
        raise RuntimeError(f"hand-over: tensors too many or missing: {', '.join(wrong[:5])}")
    return made.eval()


def _logits(network: Any, batch: dict[str, Any]) -> Tensor:
    import torch

    given = {name: tensor.to(network.device) for name, tensor in batches.tensors(batch).items()}
    with torch.no_grad():
        found: Tensor = network(**given, use_cache=False).logits
    return found.cpu()


def _cosine(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum() / (one.norm() * other.norm()))
