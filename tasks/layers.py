"""Layers that compute with a `forward` of their own, which ModelOpt leaves alone without a word.

A convolution that only pads first (EfficientNet's "same" padding) becomes the plain convolution behind the
same padding, when outputs are bit for bit equal; any other such layer is left for `calibrate` to refuse.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

SIZES = ((17, 17), (24, 31))  # odd and even, square and not


def kinds() -> tuple[type[nn.Module], ...]:
    """What can be quantized: products with a weight, and look-ups in one."""
    from torch import nn

    return (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Embedding)


def quantizable(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer of these kinds by name, whatever its name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds())}


def overrides(module: nn.Module) -> bool:
    """Whether the layer's class has a `forward` of its own."""
    kind = next(kind for kind in kinds() if isinstance(module, kind))
    return type(module).forward is not kind.forward


def plain(network: nn.Module) -> nn.Module:
    """The network with every convolution that only pads first as padding and plain convolution.

    Names and parameters stay as they were, so a state dict of one loads into the other.
    """
    from torch import nn

    for name, module in quantizable(network).items():
        if isinstance(module, nn.Conv2d) and overrides(module):
            found = _behind_its_padding(module)
            if found is not None and _equal(module, found):
                network.set_submodule(name, found)
    return network


def _behind_its_padding(module: nn.Conv2d) -> nn.Conv2d | None:
    """A plain convolution with the same parameters behind the layer's only child, if it has just one."""
    from torch import nn

    children = list(module.children())
    if len(children) != 1 or list(children[0].parameters()):
        return None
    plain = nn.Conv2d(
        module.in_channels, module.out_channels, module.kernel_size, module.stride,  # type: ignore[arg-type]
        module.padding, module.dilation, module.groups, module.bias is not None,  # type: ignore[arg-type]
        module.padding_mode, device="meta",
    )  # fmt: skip
    plain.weight, plain.bias = module.weight, module.bias
    first = children[0]

    def pad(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (first(inputs[0]), *inputs[1:])

    plain.register_forward_pre_hook(pad)
    return plain.train(module.training)


def _equal(one: nn.Conv2d, other: nn.Conv2d) -> bool:
    import torch

    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for size in SIZES:
            inputs = torch.randn(2, one.in_channels, *size, generator=random)
            try:
                if not torch.equal(one(inputs), other(inputs)):
                    return False
            except RuntimeError:
                return False
    return True
