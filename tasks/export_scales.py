"""Ranges that an exporter can write down: a quantizer that saw nothing but zeros has none."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def fill_empty(model: nn.Module) -> list[str]:
    """Give each quantizer whose whole range is zero a scale of one; returns their names.

    Exact for weights, whose codes are all zero. ModelOpt's exporter does the same for INT8, channel by
    channel; for FP8 it divides by the scale, and TensorRT refuses a scale that is not positive.
    """
    found = []
    for name, module in model.named_modules():
        amax = getattr(module, "_amax", None)
        if name.endswith("_quantizer") and amax is not None and amax.numel() and not amax.any():
            amax.fill_(module.maxbound)
            found.append(name)
    return found
