"""The network of `digits-dit-int8-ptq`: a small, faithful diffusion transformer (DiT) with random weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

WIDTH, HEADS, BLOCKS, PATCH, CONDITION = 64, 4, 2, 2, 32


def build(labels: int) -> nn.Module:
    """Latents (batch, 1, 8, 8), timesteps (batch,), conditioning (batch, tokens, 32) to noise.

    Patches, sinusoidal timesteps, blocks with adaptive LayerNorm (shift, scale, gate), attention to the
    conditioning. A trained DiT's gates start at zero; here nothing is trained, so they start at random.
    """
    import torch
    from torch import nn

    class Attention(nn.Module):
        """Queries of one sequence, keys and values of another."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(width, WIDTH)
            self.value, self.output = nn.Linear(width, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, context: Tensor) -> Any:
            query, key, value = (
                layer(source).unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2)
                for layer, source in ((self.query, x), (self.key, context), (self.value, context))
            )
            weights = (query @ key.transpose(-2, -1) / math.sqrt(WIDTH // HEADS)).softmax(dim=-1)
            return self.output((weights @ value).transpose(1, 2).flatten(2))

    class Block(nn.Module):
        """Attention to itself, to the conditioning, two layers; the timestep shifts, scales and gates."""

        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(3))
            self.itself, self.condition = Attention(WIDTH), Attention(CONDITION)
            self.wide = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
            self.modulation = nn.Linear(WIDTH, 6 * WIDTH)

        def forward(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
            changes = self.modulation(nn.functional.silu(time)).unsqueeze(1).chunk(6, dim=-1)
            first = self.norms[0](x) * (1 + changes[1]) + changes[0]
            x = x + changes[2] * self.itself(first, first)
            x = x + self.condition(self.norms[1](x), condition)
            last: Tensor = x + changes[5] * self.wide(self.norms[2](x) * (1 + changes[4]) + changes[3])
            return last

    class DiT(nn.Module):
        """Patches in, patches of noise out."""

        frequencies: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(1, WIDTH, PATCH, stride=PATCH)
            self.places = nn.Parameter(torch.randn(1, 16, WIDTH) * 0.1)
            self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
            self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
            self.norm = nn.LayerNorm(WIDTH)
            self.output = nn.Linear(WIDTH, PATCH * PATCH)
            powers = torch.arange(WIDTH // 2) / (WIDTH // 2)
            self.register_buffer("frequencies", torch.exp(-math.log(10000) * powers))

        def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
            angles = timestep.float().unsqueeze(1) * self.frequencies
            time = self.time(torch.cat([angles.cos(), angles.sin()], dim=1))
            x = self.patches(sample).flatten(2).transpose(1, 2) + self.places
            for block in self.blocks:
                x = block(x, time, encoder_hidden_states)
            noise = self.output(self.norm(x)).transpose(1, 2).unflatten(2, (4, 4))
            return nn.functional.pixel_shuffle(noise, PATCH)

    return DiT()
