"""The network of `bytes-llama-int8-ptq`: a Llama from a config, with random weights, over bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def build(labels: int) -> nn.Module:
    """A Llama of 2 layers, 128 wide, over 256 bytes; `labels` is 0, a language model has none."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=256,
        max_position_embeddings=512,
        pad_token_id=None,
        attn_implementation="eager",  # what ModelOpt's exporter can follow
    )
    network: nn.Module = LlamaForCausalLM(config)
    return network
