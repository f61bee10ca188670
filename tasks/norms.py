"""Batch norms into the convolutions before them, before anything is pruned or quantized.

A norm between a convolution and the next quantizer would keep every runtime from convolving in integers, and
ModelOpt's FP8 exporter is off by 0.5 with one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    Forward = Callable[[nn.Module], Tensor]

NEAR = 1e-3  # of the largest output


def folded(network: nn.Module, forward: Forward) -> tuple[nn.Module, dict[str, str]]:
    """The network without the norms that directly follow a convolution, and which went into which.

    `forward` runs a network on real inputs; where outputs then differ, the network stays as it was.
    """
    import torch

    if not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules()):
        return network, {}
    network.eval()
    with torch.no_grad():
        into = _behind_convolutions(network, forward)
        if not into:
            return network, {}
        changed = copy.deepcopy(network)
        for norm, convolution in into.items():
            _fold(changed.get_submodule(norm), changed.get_submodule(convolution))
        without(changed, into)
        wanted, found = forward(network), forward(changed)
        near = NEAR * max(1.0, float(wanted.abs().max()))
        return (changed, into) if float((wanted - found).abs().max()) <= near else (network, {})


def without(network: nn.Module, into: dict[str, str]) -> nn.Module:
    """The network as `folded` leaves it, whatever its weights: identities, and biases before them."""
    import torch
    from torch import nn

    for norm, convolution in into.items():
        network.set_submodule(norm, nn.Identity())
        layer: Any = network.get_submodule(convolution)
        if layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros(layer.out_channels))
    return network


def _behind_convolutions(network: nn.Module, forward: Forward) -> dict[str, str]:
    """Each norm that is given a convolution's very output, with that convolution's name."""
    from torch import nn

    made: dict[int, tuple[str, Any]] = {}
    found: dict[str, str] = {}
    hooks = []

    def keeps(name: str) -> Callable[..., None]:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            made[id(output)] = (name, output)  # held, so that the id stays its own

        return keep

    def looks(name: str) -> Callable[..., None]:
        def look(_module: nn.Module, inputs: Any) -> None:
            if id(inputs[0]) in made:
                found[name] = made[id(inputs[0])][0]

        return look

    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(keeps(name)))
        elif isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            hooks.append(module.register_forward_pre_hook(looks(name)))
    forward(network)
    for hook in hooks:
        hook.remove()
    return found if len(set(found.values())) == len(found) else {}


def _fold(norm: Any, convolution: Any) -> None:
    from torch.nn.utils import fuse_conv_bn_weights

    convolution.weight, convolution.bias = fuse_conv_bn_weights(
        convolution.weight,
        convolution.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
