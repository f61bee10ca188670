"""LoRA with peft: small trained matrices beside frozen layers, added to their weights at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from recipes.compress import Lora
from tasks import checkpoints
from tasks.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tasks.types import TaskType

TOLERANCE = 1e-5


def attach(model: nn.Module, section: Lora, seed: int) -> nn.Module:
    """The network with adapters on the layers that `targets` names; besides them only `also` is trained."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model
    from torch import nn

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen = checkpoints.excluded(linear, section.targets, "finetune.lora.targets")
    whole = checkpoints.excluded(
        [name for name, _ in model.named_modules()], section.also, "finetune.lora.also"
    )
    if both := sorted(chosen & whole):
        raise InputError(f"finetune.lora: {', '.join(both)} stands in targets and in also; leave it in one")
    torch.manual_seed(seed)
    config = LoraConfig(r=section.rank, lora_alpha=section.alpha, target_modules=sorted(chosen))
    adapted: nn.Module = inject_adapter_in_model(config, model)
    for name in whole:
        adapted.get_submodule(name).requires_grad_(True)
    return adapted


def merged(model: nn.Module, kind: TaskType, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The plain network's weights, adapters added; RuntimeError unless it says the same of `batch`."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    model.eval()
    with torch.no_grad():
        before = kind.forward(model, batch)
        for name, module in list(model.named_modules()):
            if isinstance(module, BaseTunerLayer):
                layer: Any = module
                layer.merge(safe_merge=True)
                model.set_submodule(name, layer.get_base_layer())
        error = float((kind.forward(model, batch) - before).abs().max())
    if not error <= TOLERANCE * max(1.0, float(before.abs().max())):
        raise RuntimeError(f"the merged network is off by {error:.2g} from the one with adapters")
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
