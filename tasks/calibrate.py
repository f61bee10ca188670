"""Calibrate with ModelOpt: insert quantizers, run real rows through, keep the ranges.

python -m flows optimize RECIPE     (stage `calibrate`)
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from recipes.schema import Quantize
from tasks import batches, checkpoints, store
from tasks.artifacts import Checkpoint, Dataset, Facts
from tasks.errors import InputError
from tasks.stage import stage

if TYPE_CHECKING:
    from torch import nn

BITS: dict[str, Any] = {"int8": 8, "fp8": (4, 3)}
KINDS = ("nn.Linear", "nn.Conv1d", "nn.Conv2d", "nn.Conv3d", "nn.ConvTranspose2d", "nn.Embedding")


@stage(uses=("torch", "nvidia-modelopt", "transformers"), name="calibrate", timeout_seconds=3 * 3600)
def calibrate(checkpoint: Checkpoint, dataset: Dataset, section: Quantize) -> Checkpoint:
    """Quantize every linear layer, convolution and (where asked) embedding that is not excluded."""
    import torch

    with checkpoints.quiet():
        import modelopt.torch.quantization as mtq

    model, config = checkpoints.restore(checkpoint)
    looked_at = _quantizable(model)
    pruned = checkpoints.sparsity(model)
    with torch.no_grad(), checkpoints.quiet():
        model = mtq.quantize(model, quant_config(section), _forward(checkpoint, dataset, section.batch_size))
    counts = _counts(model, looked_at)
    if not counts["enabled"]:
        raise InputError(
            f"quantize: nothing was quantized (exclude: {', '.join(section.exclude) or 'nothing'}). "
            f"Looked at: {', '.join(looked_at) or 'no linear layer or convolution'}"
        )
    assert checkpoints.sparsity(model) == pruned
    with store.staging() as folder:
        shutil.copytree(batches.preprocessor(checkpoint), folder / "preprocessor")
        facts = {**checkpoint.facts, "quantizers": counts, "format": section.format}
        facts.pop("curve", None)
        return checkpoints.save(model, config, folder, dataset.type, facts)


def quant_config(section: Quantize) -> dict[str, Any]:
    """ModelOpt's configuration; later entries win.

    ModelOpt's own defaults leave out modules by name (every vision tower, for one) and quantize
    LayerNorm's inputs, which costs accuracy: here type decides, and `exclude`.
    """
    bits = BITS[section.format]
    weights = {"num_bits": bits, "axis": 0 if section.format == "int8" else None}
    kinds = [kind for kind in KINDS if section.embeddings or kind != "nn.Embedding"]
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for kind in kinds:
        rules.append({"parent_class": kind, "quantizer_name": "*weight_quantizer", "cfg": weights})
        if kind != "nn.Embedding":
            inputs = {"num_bits": bits, "axis": None}
            rules.append({"parent_class": kind, "quantizer_name": "*input_quantizer", "cfg": inputs})
    rules += [{"quantizer_name": f"{pattern.rstrip('*')}*", "enable": False} for pattern in section.exclude]
    return {"quant_cfg": rules, "algorithm": section.algorithm}


def _forward(checkpoint: Checkpoint, dataset: Dataset, size: int) -> Callable[[nn.Module], None]:
    total = -(-dataset.rows["calibration"] // size)

    def loop(model: nn.Module) -> None:
        data = batches.batches(dataset, "calibration", batches.preprocessor(checkpoint), size)
        for batch in tqdm(data, total=total, desc="calibrate", unit="batch"):
            model(**batches.tensors(batch))

    return loop


def _quantizable(model: nn.Module) -> list[str]:
    from torch import nn

    kinds = tuple(getattr(nn, kind.removeprefix("nn.")) for kind in KINDS)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def _counts(model: nn.Module, looked_at: list[str]) -> Facts:
    enabled = checkpoints.quantizers(model)
    touched = {name.rpartition(".")[0] for name in enabled}
    return {
        "enabled": len(enabled),
        "weights": sum(name.endswith(".weight_quantizer") for name in enabled),
        "inputs": sum(name.endswith(".input_quantizer") for name in enabled),
        "left_out": sorted(set(looked_at) - touched),
    }
