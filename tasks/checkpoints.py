"""Checkpoints on disk, exact: config, safetensors, and ModelOpt's state (mask, quantizers) beside them.

Restoring builds the network from its config, applies ModelOpt's state, then loads every tensor: bit for bit
what was saved, where `from_pretrained` would lose masks and nested models.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import layers, microscaled, norms, store, types
from tasks.artifacts import Checkpoint, Facts
from tasks.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

STATE, QUANTIZERS = "modelopt_state.pth", "quantizers.json"
NORMS = "norms_in_convolutions"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """ModelOpt prints and logs a line per step and warns of versions that work; none is for the user."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def from_pretrained(source: Path, task: str, labels: int, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """The task type's network from a Hugging Face folder; only a head for labels may be new."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig

    torch.manual_seed(seed)
    if not (source / "config.json").is_file():
        raise InputError(f"model.source: {source} has no config.json, so it is no Hugging Face checkpoint")
    options: dict[str, Any] = {"ignore_mismatched_sizes": True} if labels else {}
    try:
        config = AutoConfig.from_pretrained(source, **({"num_labels": labels} if labels else {}))
        model, report = _auto(task).from_pretrained(
            source,
            config=config,
            attn_implementation="eager",
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"model.source: {source} does not fit its config: {error}") from error
    # A pooler is part of the head: encoders trained without one are common.
    trunk = f"{model.base_model_prefix}." if labels else ""
    keys = [*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])]
    wrong = [key for key in keys if key.startswith(trunk) and "pooler." not in key]
    if wrong:
        raise InputError(
            f"model.source: {source} does not fit its config; wrong or missing: {', '.join(wrong[:5])}"
        )
    return _headless(model, task), model.config.to_dict()


def from_function(target: str, task: str, labels: int, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """The network that the user's `module:function` returns for a number of labels."""
    import torch

    torch.manual_seed(seed)
    config = {"model_type": "python", "function": target, "labels": labels}
    return _network(config, task), config


def from_modelopt(source: Path, task: str) -> tuple[nn.Module, dict[str, Any]]:
    """A network that ModelOpt pruned or quantized elsewhere, as `save_pretrained` wrote it."""
    missing = [name for name in ("config.json", STATE, "model.safetensors") if not (source / name).is_file()]
    if missing:
        raise InputError(
            f"model.source: {source} has no {', '.join(missing)}; save it with save_pretrained under "
            "mto.enable_huggingface_checkpointing()"
        )
    model, config = restore_folder(source, task)
    if not quantizers(model) and not sparse_modules(model):
        raise InputError(f"model.source: nothing in {source} is pruned or quantized; use path: for it")
    return model, config


def compression(model: nn.Module) -> Facts:
    """What of the network is pruned and quantized, as facts; empty when nothing is."""
    names, pruned = quantizers(model), sparsity(model)
    facts: Facts = {"sparsity": pruned} if pruned else {}
    if names:
        facts |= {"quantizers": counted(names), "format": _format(model, names)}
    return facts


def _format(model: nn.Module, names: Sequence[str]) -> str:
    """The recipe's word for what these quantizers do."""
    kinds = {
        str(getattr(part, "num_bits", None)) for name in names for part in model.get_submodule(name).modules()
    }
    scales = {microscaled.scale_bits(model.get_submodule(name)) for name in names}
    if scales & set(microscaled.FORMATS):
        return next(microscaled.FORMATS[bits] for bits in scales if bits)
    inputs = any(not name.endswith("weight_quantizer") for name in names)
    if "4" in kinds:
        return "w4a8" if "(4, 3)" in kinds else "int4"
    if "(4, 3)" in kinds:
        return "fp8"
    return "int8" if inputs else "int8-weight-only"


def untrained(checkpoint: Checkpoint) -> Facts:
    """The checkpoint's facts, but for those of its training: what is made of it was not trained so."""
    return {name: value for name, value in checkpoint.facts.items() if name not in ("curve", "training")}


def counted(names: Sequence[str]) -> Facts:
    """Enabled quantizers by kind."""
    return {
        "enabled": len(names),
        "weights": sum(name.endswith(".weight_quantizer") for name in names),
        "inputs": sum(name.endswith(".input_quantizer") for name in names),
    }


def plain(model: nn.Module, config: dict[str, Any], task: str) -> nn.Module:
    """The network that computes with the same weights, but without mask and quantizers."""
    import torch

    values = dict(model.state_dict())
    for name, module in model.named_modules():
        mask = getattr(module, "_weight_mask", None)
        if mask is not None:
            values[f"{name}.weight"] = values[f"{name}.weight"] * mask
        scale = getattr(getattr(module, "input_quantizer", None), "pre_quant_scale", None)
        if scale is not None:  # SmoothQuant divided the weights by what it multiplies the inputs with
            values[f"{name}.weight"] = values[f"{name}.weight"] * scale
    with torch.random.fork_rng():
        fresh = _network(config, task)
    fresh.load_state_dict({name: values[name] for name in fresh.state_dict()})
    return fresh.eval()


def save(model: nn.Module, config: dict[str, Any], folder: Path, task: str, facts: Facts) -> Checkpoint:
    """Write the model into a staging folder (which holds the preprocessor already) and commit it.

    Its identity is that of tensors, config, preprocessor and what each quantizer does: FP8 and NVFP4 may have
    the same tensors, and ModelOpt's own state other bytes in each process.
    """
    with quiet():
        import modelopt.torch.opt as mto
    import torch
    from safetensors.torch import save_file

    tensors = _apart(model.state_dict())
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    if broken:
        raise InputError(
            f"the weights hold NaN or infinity: {', '.join(broken[:5])}; lower the learning rate"
        )
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, sort_keys=True, indent=1, default=str))
    if told := _settings(model):
        (folder / QUANTIZERS).write_text(json.dumps(told, sort_keys=True, indent=1))
    identity = store.digest(folder)
    if mto.ModeloptStateManager.is_converted(model):
        torch.save(mto.modelopt_state(model), folder / STATE)
    return Checkpoint(store.commit(folder), task, identity, facts)


def _settings(model: nn.Module) -> dict[str, dict[str, str]]:
    """What each quantizer does, on or off; its range is among the tensors."""
    kinds = ("num_bits", "axis", "unsigned", "narrow_range", "is_enabled")
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "is_enabled") and hasattr(module, "num_bits"):
            blocks = sorted(map(repr, (module.block_sizes or {}).items()))
            found[name] = {kind: repr(getattr(module, kind)) for kind in kinds} | {"block_sizes": str(blocks)}
    return found


def _apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU; only what shares memory with another is copied."""
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in state.items():
        alone = tensor.detach().cpu().contiguous()
        place = alone.untyped_storage().data_ptr()
        found[name] = alone.clone() if place in taken else alone
        taken.add(place)
    return found


def restore(checkpoint: Checkpoint) -> tuple[nn.Module, dict[str, Any]]:
    """The network exactly as it was saved, and its config."""
    return restore_folder(store.path(checkpoint.blob), checkpoint.type)


def restore_folder(folder: Path, task: str) -> tuple[nn.Module, dict[str, Any]]:
    """The network in a checkpoint folder, and its config."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    model = _network(config, task)
    if (folder / STATE).is_file():
        with quiet():
            import modelopt.torch.opt as mto

            mto.restore_from_modelopt_state(model, modelopt_state_path=folder / STATE)
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except RuntimeError as error:
        raise InputError(f"the checkpoint does not fit its config: {error}") from error
    return model.eval(), config


def without_norms(
    model: nn.Module, config: dict[str, Any], forward: norms.Forward
) -> tuple[nn.Module, dict[str, Any]]:
    """The network with its batch norms in the convolutions before them, and a config that says so."""
    if quantizers(model) or any(hasattr(module, "_weight_mask") for module in model.modules()):
        return model, config
    model, into = norms.folded(model, forward)
    return model, {**config, NORMS: into} if into else config


def _network(config: dict[str, Any], task: str) -> nn.Module:
    """The network of a config, its weights not yet loaded."""
    if NORMS in config:
        whole = {name: value for name, value in config.items() if name != NORMS}
        return norms.without(_network(whole, task), config[NORMS])
    if config["model_type"] == "python":
        return _own(config["function"], task, config["labels"])
    from transformers import AutoConfig

    values = {name: value for name, value in config.items() if name != "model_type"}
    settings = AutoConfig.for_model(config["model_type"], **values)
    return _headless(_auto(task).from_config(settings, attn_implementation="eager"), task)


def _auto(task: str) -> Any:
    """The transformers class that reads a Hugging Face folder for this task."""
    import transformers

    return getattr(transformers, types.load(task).AUTO)


def _headless(model: nn.Module, task: str) -> nn.Module:
    """Without the pooler where the bare network is asked for: unused, it cannot be calibrated."""
    if types.load(task).AUTO == "AutoModel" and getattr(model, "pooler", None) is not None:
        model.pooler = None  # type: ignore[assignment]
    return model


def device() -> str:
    """Where PyTorch computes here: `cuda` or `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def parameters(model: nn.Module) -> int:
    """How many trained numbers the network has."""
    return sum(parameter.numel() for parameter in model.parameters())


def groups_2_4(weight: Tensor) -> tuple[int, int]:
    """Groups of 4 along K that hold at most 2 non-zeros, and all groups.

    K is the second axis of a linear weight (out, in) and of a convolution (out, in, kh, kw).
    """
    along_k = weight.movedim(1, -1).reshape(-1, weight.shape[1])
    whole = along_k[:, : along_k.shape[1] // 4 * 4].reshape(-1, 4)
    return int(((whole != 0).sum(dim=1) <= 2).sum()), whole.shape[0]


def sparse_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with a mask that masks something (ModelOpt gives a layer 2:4 cannot fit a mask of ones)."""
    masks = {name: getattr(module, "_weight_mask", None) for name, module in model.named_modules()}
    return {
        name: model.get_submodule(name) for name, mask in masks.items() if mask is not None and not mask.all()
    }


def excluded(names: Iterable[str], patterns: Sequence[str], key: str) -> set[str]:
    """The names that a pattern matches; raises InputError for a pattern that matches none."""
    found = {pattern: {name for name in names if fnmatchcase(name, pattern)} for pattern in patterns}
    for pattern, matched in found.items():
        if not matched:
            raise InputError(f"{key}: {pattern!r} matches no module; there are {', '.join(names)}")
    return set().union(*found.values())


def sparsity(model: nn.Module) -> Facts:
    """Exact 2:4 counts over the masked modules; empty when none is masked."""
    counts = {name: groups_2_4(module.weight.detach()) for name, module in sparse_modules(model).items()}  # type: ignore[operator]
    if not counts:
        return {}
    return {
        "modules": len(counts),
        "exact_modules": sum(valid == total for valid, total in counts.values()),
        "groups": sum(total for _, total in counts.values()),
        "valid_groups": sum(valid for valid, _ in counts.values()),
        "names": sorted(counts),
    }


def quantizers(model: nn.Module) -> list[str]:
    """Names of the enabled quantizers."""
    return [
        name
        for name, module in model.named_modules()
        if name.endswith("_quantizer") and getattr(module, "is_enabled", False)
    ]


def _own(target: str, task: str, labels: int) -> nn.Module:
    """The user's network; one that is not of transformers gets its inputs in the type's order."""
    from torch import nn
    from transformers import PreTrainedModel

    class Plain(nn.Module):
        """Gives a plain network the keyword inputs that everything here calls with."""

        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, **inputs: Tensor) -> Any:
            return self.net(*(inputs[name] for name in types.load(task).INPUTS))

    module, _, name = target.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # the user's module raises what it likes
        raise InputError(
            f"model.source: python:{target} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    try:
        net = function(labels)
    except OSError:  # a lost connection, which may pass by itself
        raise
    except Exception as error:
        raise InputError(
            f"model.source: python:{target} raised {type(error).__name__} for {labels} labels: {error}"
        ) from error
    if not isinstance(net, nn.Module):
        raise InputError(
            f"model.source: python:{target} returned {type(net).__name__}, not a torch.nn.Module"
        )
    net = layers.plain(net)
    return net if isinstance(net, PreTrainedModel) else Plain(net)
