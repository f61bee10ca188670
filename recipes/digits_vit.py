"""The network of `digits-vit-int8-qat-24`: a transformers model from a config, with random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def build(labels: int) -> nn.Module:
    """A ViT of 4 layers, 64 wide: (batch, 1, 8, 8) pixels in 16 patches to (batch, labels) logits."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=labels,
        attn_implementation="eager",  # what ModelOpt's exporter can follow
    )
    network: nn.Module = ViTForImageClassification(config)
    return network
