"""Calibrate with ModelOpt: insert quantizers, run real rows through, keep the ranges.

python -m flows optimize RECIPE     (stage `calibrate`)
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from recipes.compress import MICROSCALED, Quantize
from tasks import auto_precision, batches, checkpoints, layers, microscaled, observe, store
from tasks.artifacts import Checkpoint, Dataset, Observations
from tasks.errors import InputError
from tasks.stage import stage

if TYPE_CHECKING:
    from torch import Tensor, nn

    Loop = Callable[[nn.Module], None]

FP8 = (4, 3)  # bits of exponent and mantissa
LINEAR_ONLY = ("int4", "w4a8", *MICROSCALED)
ALGORITHMS: dict[str, Any] = {"smoothquant": "smoothquant", "awq": {"method": "awq_lite"}}
BMM = ("q_bmm_quantizer", "k_bmm_quantizer", "p_bmm_quantizer", "v_bmm_quantizer")


@stage(
    uses=("torch", "nvidia-modelopt", "transformers"), name="calibrate", gpu=True, timeout_seconds=3 * 3600
)
def calibrate(
    checkpoint: Checkpoint, dataset: Dataset, section: Quantize, observations: Observations | None = None
) -> Checkpoint:
    """Quantize every linear layer, convolution and (where asked) embedding that is not excluded.

    The observations are those that `needs(section)` names; without them the rows run here.
    """
    check_calibration(section)
    model, config = checkpoints.restore(checkpoint)
    model, config = checkpoints.without_norms(model, config, batches.forward(dataset, checkpoint))
    model.to(checkpoints.device())
    looked_at = layers.quantizable(model)
    pruned = checkpoints.sparsity(model)
    left_out = reasons(section, looked_at)
    _check(section, looked_at, left_out)
    auto = _auto(checkpoint, dataset, section, looked_at, left_out)
    if auto:
        section = section.model_copy(update={"exclude": (*section.exclude, *auto.left)})
        left_out |= dict.fromkeys(auto.left, "kept for what it does to the loss (quantize.effective_bits)")
    loop = batches.forward_loop(dataset, batches.preprocessor(checkpoint), section.batch_size, "calibrate")
    model = quantized(model, section, loop, observe.read(observations) if observations else None)
    names = checkpoints.quantizers(model)
    _nothing_slipped_by(model, names, set(looked_at) - set(left_out), section)
    assert checkpoints.sparsity(model) == pruned
    with store.staging() as folder:
        shutil.copytree(batches.preprocessor(checkpoint), folder / "preprocessor")
        counts = (
            checkpoints.counted(names) | {"left_out": left_out} | ({"auto": asdict(auto)} if auto else {})
        )
        facts = {**checkpoints.untrained(checkpoint), "quantizers": counts, "format": section.format}
        return checkpoints.save(model, config, folder, dataset.type, facts)


@stage(
    uses=("torch", "nvidia-modelopt", "transformers"), name="recalibrate", gpu=True, timeout_seconds=3 * 3600
)
def recalibrate(checkpoint: Checkpoint, dataset: Dataset, section: Quantize) -> Checkpoint:
    """The same quantizers with the ranges of these rows and weights; SmoothQuant's and AWQ's shifts stay."""
    check_calibration(section)
    import torch

    with checkpoints.quiet():
        import modelopt.torch.quantization as mtq

    model, config = checkpoints.restore(checkpoint)
    model.to(checkpoints.device())
    before = checkpoints.quantizers(model)
    loop = batches.forward_loop(dataset, batches.preprocessor(checkpoint), section.batch_size, "recalibrate")
    with torch.no_grad(), checkpoints.quiet():
        model = mtq.calibrate(model, "max", loop)
    if needs(section) == "histograms":
        _take(model, section, _unquantized(model, loop))
    assert checkpoints.quantizers(model) == before
    with store.staging() as folder:
        shutil.copytree(batches.preprocessor(checkpoint), folder / "preprocessor")
        return checkpoints.save(model, config, folder, dataset.type, checkpoints.untrained(checkpoint))


def check_calibration(section: Quantize | None) -> None:
    """Raise InputError for what this machine can never calibrate, before anything costly.

    On a CPU ModelOpt says that NVFP4 and MXFP8 were calibrated, and then every forward fails.
    """
    if section and section.format in MICROSCALED and checkpoints.device() != "cuda":
        raise InputError(
            f"quantize.format: {section.format} needs an NVIDIA GPU with PyTorch's CUDA build to calibrate, "
            "and PyTorch finds none here; its engines run on TensorRT 10.8 or newer with compute capability "
            "10.0 or newer. Run this recipe on such a worker, or use fp8, int4 or int8"
        )


def needs(section: Quantize) -> observe.Kind | None:
    """What of the layers' inputs settles their ranges; None where the rows themselves are needed, or none.

    MXFP8 needs none: the scales of an activation come with it.
    """
    if _inputs(section) is None or section.attention or section.format == "mxfp8":
        return None
    kinds: dict[str, observe.Kind] = {"max": "ranges", "entropy": "histograms", "percentile": "histograms"}
    return kinds.get(section.algorithm)


def quantized(
    model: nn.Module, section: Quantize, loop: Loop, seen: dict[str, Tensor] | None = None
) -> nn.Module:
    """The network with quantizers whose ranges the rows of `loop` settle, or what was `seen` of them."""
    import torch

    with checkpoints.quiet():
        import modelopt.torch.quantization as mtq

    kind = needs(section)
    if kind and seen is None:
        seen = observe.observed(model, kind, loop)
    rows = loop if section.attention or section.algorithm in ALGORITHMS else None
    rules = quant_config(section, layers.quantizable(model))
    with torch.no_grad(), checkpoints.quiet():
        model = mtq.quantize(model, rules, rows)
    if seen is not None:
        _take(model, section, seen)
    return model


def quant_config(section: Quantize, modules: dict[str, nn.Module]) -> dict[str, Any]:
    """ModelOpt's configuration, a rule for each module by its name.

    ModelOpt's own defaults leave out modules by name (every vision tower, for one) and quantize
    LayerNorm's inputs, which costs accuracy; and a rule by class misses layers that are pruned.
    """
    from torch import nn

    left_out = reasons(section, modules)
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    inputs = _inputs(section)
    for name, module in modules.items():
        if name in left_out:
            continue
        embedding = isinstance(module, nn.Embedding)
        rules.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": _weights(section, embedding)})
        if inputs and not embedding:
            rules.append({"quantizer_name": f"{name}.input_quantizer", "cfg": inputs})
    if section.attention:
        rules += [{"quantizer_name": f"*{name}", "cfg": inputs} for name in BMM]
    return {"quant_cfg": rules, "algorithm": ALGORITHMS.get(section.algorithm, "max")}


def _auto(
    checkpoint: Checkpoint,
    dataset: Dataset,
    section: Quantize,
    modules: dict[str, nn.Module],
    out: dict[str, str],
) -> auto_precision.Choice | None:
    """ModelOpt's choice among the layers that nothing else leaves out; None where all are quantized."""
    from torch import nn

    if section.effective_bits is None:
        return None
    searched = {n: m for n, m in modules.items() if n not in out and not isinstance(m, nn.Embedding)}
    rules = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": _weights(section, embedding=False)},
    ]
    if inputs := _inputs(section):
        rules.append({"quantizer_name": "*input_quantizer", "cfg": inputs})
    formats = [{"quant_cfg": rules, "algorithm": ALGORITHMS.get(section.algorithm, "max")}]
    return auto_precision.choose(checkpoint, dataset, section, searched, formats)


def reasons(section: Quantize, modules: dict[str, nn.Module]) -> dict[str, str]:
    """The layers that stay as they are, and why."""
    from torch import nn

    excluded = checkpoints.excluded(modules, section.exclude, "quantize.exclude")
    found: dict[str, str] = {}
    for name, module in modules.items():
        if name in excluded:
            found[name] = "named by quantize.exclude"
        elif isinstance(module, nn.Embedding):
            if not section.embeddings:
                found[name] = "an embedding, and quantize.embeddings is not set"
        elif section.format in LINEAR_ONLY and not isinstance(module, nn.Linear):
            found[name] = f"{section.format} is for linear layers; no runtime has such convolutions"
    return found


def _weights(section: Quantize, embedding: bool) -> Any:
    int8, fp8 = {"num_bits": 8, "axis": 0}, {"num_bits": FP8, "axis": None}
    if section.format == "fp8":
        return fp8
    if embedding or section.format in ("int8", "int8-weight-only"):
        return int8
    if section.format in MICROSCALED:
        return microscaled.QUANTIZERS[section.format]
    int4 = {"num_bits": 4, "block_sizes": {-1: section.block_size}}
    return [int4, fp8] if section.format == "w4a8" else int4


def _inputs(section: Quantize) -> dict[str, Any] | None:
    """One scale for each activation, or small blocks; None where only weights are quantized."""
    if section.format in MICROSCALED:
        return microscaled.QUANTIZERS[section.format]
    bits: dict[str, Any] = {"int8": 8, "fp8": FP8, "w4a8": FP8}
    return {"num_bits": bits[section.format], "axis": None} if section.format in bits else None


def _check(section: Quantize, modules: dict[str, nn.Module], left_out: dict[str, str]) -> None:
    """Raises InputError before anything costly for what cannot be quantized."""
    from torch import nn

    chosen = {name: module for name, module in modules.items() if name not in left_out}
    if not chosen:
        raise InputError(
            f"quantize: nothing was quantized (exclude: {', '.join(section.exclude) or 'nothing'}). "
            f"Looked at: {', '.join(modules) or 'no linear layer or convolution'}"
        )
    if own := [name for name, module in chosen.items() if layers.overrides(module)]:
        raise InputError(
            f"quantize: {', '.join(own)} have a forward of their own, which a quantizer cannot stand in for, "
            "and it is not plain padding before the convolution; use torch's layers, or name them in "
            "quantize.exclude to leave them as they are"
        )
    if section.format not in LINEAR_ONLY:
        return
    size = MICROSCALED.get(section.format, section.block_size)
    linear = {n: m.in_features for n, m in chosen.items() if isinstance(m, nn.Linear)}
    if odd := [f"{name} ({width})" for name, width in linear.items() if width % size]:
        where = f"the inputs of {', '.join(odd)}"
        what = f"quantize.block_size: {size} does not divide {where}; use a smaller one, or"
        if section.format in MICROSCALED:
            what = f"quantize.format: blocks of {size} do not divide {where};"
        raise InputError(f"{what} name them in quantize.exclude")


def _nothing_slipped_by(model: nn.Module, names: list[str], chosen: set[str], section: Quantize) -> None:
    """ModelOpt leaves out without a word what it does not know, and what never runs keeps no range."""
    if missed := sorted(chosen - {name.rpartition(".")[0] for name in names}):
        raise InputError(
            f"quantize: ModelOpt cannot quantize {', '.join(missed)}; name them in quantize.exclude"
        )
    inputs = {name: model.get_submodule(name) for name in names if not name.endswith("weight_quantizer")}
    idle = [
        name.rpartition(".")[0]
        for name, quantizer in inputs.items()
        if quantizer.amax is None and microscaled.scale_bits(quantizer) != microscaled.E8M0_SCALES
    ]  # MXFP8 has no range of the whole
    if idle:
        raise InputError(
            f"quantize: {', '.join(idle)} never ran while calibrating, so they have no range; name them in "
            "quantize.exclude"
        )
    if section.attention and not any(name.endswith(BMM) for name in names):
        raise InputError(
            "quantize.attention: ModelOpt found no attention of a known kind (transformers' eager attention) "
            "in this network; leave it out"
        )


def _take(model: nn.Module, section: Quantize, seen: dict[str, Tensor]) -> None:
    """The ranges of the inputs' quantizers from what was seen; of a layer that never ran there is nothing."""
    device = next(model.parameters()).device
    for name in checkpoints.quantizers(model):
        layer, _, which = name.rpartition(".")
        if which != "input_quantizer" or not {layer, f"{layer}.counts"} & set(seen):
            continue
        quantizer: Any = model.get_submodule(name)
        end = seen[layer] if layer in seen else _end(quantizer, section, seen, layer)
        quantizer.amax = end.to(device)


def _end(quantizer: Any, section: Quantize, seen: dict[str, Tensor], layer: str) -> Tensor:
    """Where ModelOpt ends the range of a histogram."""
    from modelopt.torch.quantization.calib import HistogramCalibrator

    with checkpoints.quiet():
        found = HistogramCalibrator(quantizer.num_bits, None, quantizer.unsigned)
        found._calib_hist, found._calib_bin_edges = seen[f"{layer}.counts"], seen[f"{layer}.edges"]
        end: Tensor = (
            found.compute_amax("entropy")
            if section.algorithm == "entropy"
            else found.compute_amax("percentile", percentile=section.percentile)
        )
    return end


def _unquantized(model: nn.Module, loop: Loop) -> dict[str, Tensor]:
    """Histograms of a quantized network's inputs, with its quantizers off."""
    every: list[Any] = [model.get_submodule(name) for name in checkpoints.quantizers(model)]
    for quantizer in every:
        quantizer.disable_quant()
    try:
        return observe.observed(model, "histograms", loop)
    finally:
        for quantizer in every:
            quantizer.enable_quant()
