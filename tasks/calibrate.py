"""Calibrate with ModelOpt: insert quantizers, run real rows through, keep the ranges.

python -m flows optimize RECIPE     (stage `calibrate`)
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from recipes.schema import Quantize
from tasks import batches, checkpoints, store
from tasks.artifacts import Checkpoint, Dataset, Facts
from tasks.errors import InputError
from tasks.stage import stage

if TYPE_CHECKING:
    from torch import nn

BITS: dict[str, Any] = {"int8": 8, "fp8": (4, 3)}


@stage(
    uses=("torch", "nvidia-modelopt", "transformers"), name="calibrate", gpu=True, timeout_seconds=3 * 3600
)
def calibrate(checkpoint: Checkpoint, dataset: Dataset, section: Quantize) -> Checkpoint:
    """Quantize every linear layer, convolution and (where asked) embedding that is not excluded."""
    import torch

    with checkpoints.quiet():
        import modelopt.torch.quantization as mtq

    model, config = checkpoints.restore(checkpoint)
    model.to(checkpoints.device())
    looked_at = _quantizable(model)
    pruned = checkpoints.sparsity(model)
    loop = batches.forward_loop(dataset, batches.preprocessor(checkpoint), section.batch_size, "calibrate")
    with torch.no_grad(), checkpoints.quiet():
        model = mtq.quantize(model, quant_config(section, looked_at), loop)
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


@stage(
    uses=("torch", "nvidia-modelopt", "transformers"), name="recalibrate", gpu=True, timeout_seconds=3 * 3600
)
def recalibrate(checkpoint: Checkpoint, dataset: Dataset, section: Quantize) -> Checkpoint:
    """The same quantizers with the ranges of these rows and weights; SmoothQuant's shifts stay."""
    import torch

    with checkpoints.quiet():
        import modelopt.torch.quantization as mtq

    model, config = checkpoints.restore(checkpoint)
    model.to(checkpoints.device())
    before = checkpoints.quantizers(model)
    loop = batches.forward_loop(dataset, batches.preprocessor(checkpoint), section.batch_size, "recalibrate")
    with torch.no_grad(), checkpoints.quiet():
        model = mtq.calibrate(model, "max", loop)
    assert checkpoints.quantizers(model) == before
    with store.staging() as folder:
        shutil.copytree(batches.preprocessor(checkpoint), folder / "preprocessor")
        facts = {name: value for name, value in checkpoint.facts.items() if name != "curve"}
        return checkpoints.save(model, config, folder, dataset.type, facts)


def quant_config(section: Quantize, modules: dict[str, nn.Module]) -> dict[str, Any]:
    """ModelOpt's configuration, a rule for each module by its name.

    ModelOpt's own defaults leave out modules by name (every vision tower, for one) and quantize
    LayerNorm's inputs, which costs accuracy; and a rule by class misses layers that are pruned.
    """
    from torch import nn

    weights = {"num_bits": BITS[section.format], "axis": 0 if section.format == "int8" else None}
    inputs = {"num_bits": BITS[section.format], "axis": None}
    left_out = checkpoints.excluded(modules, section.exclude, "quantize.exclude")
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name, module in modules.items():
        embedding = isinstance(module, nn.Embedding)
        if name in left_out or (embedding and not section.embeddings):
            continue
        rules.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": weights})
        if not embedding:
            rules.append({"quantizer_name": f"{name}.input_quantizer", "cfg": inputs})
    return {"quant_cfg": rules, "algorithm": section.algorithm}


def _quantizable(model: nn.Module) -> dict[str, nn.Module]:
    from torch import nn

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Embedding)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def _counts(model: nn.Module, looked_at: Iterable[str]) -> Facts:
    enabled = checkpoints.quantizers(model)
    touched = {name.rpartition(".")[0] for name in enabled}
    return checkpoints.counted(enabled) | {"left_out": sorted(set(looked_at) - touched)}
