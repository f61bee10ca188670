"""A UNet as diffusion models use it, in plain PyTorch with random weights: for bytes and seconds."""

from __future__ import annotations

import torch
from torch import nn

CHANNELS = (320, 640, 1280)


class _Block(nn.Module):
    """Two convolutions with a shortcut; the time embedding is added between them."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.GroupNorm(32, inside), nn.SiLU(), nn.Conv2d(inside, outside, 3, padding=1)
        )
        self.time = nn.Linear(1280, outside)
        self.second = nn.Sequential(
            nn.GroupNorm(32, outside), nn.SiLU(), nn.Conv2d(outside, outside, 3, padding=1)
        )
        self.short = nn.Conv2d(inside, outside, 1)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.first(x) + self.time(time)[:, :, None, None]
        return self.second(found) + self.short(x)  # type: ignore[no-any-return]


class _Attention(nn.Module):
    """Self-attention over the pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.GroupNorm(32, width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, width, high, wide = x.shape
        flat = self.norm(x).reshape(batch, width, high * wide).transpose(1, 2)
        q, k, v = self.qkv(flat).chunk(3, dim=-1)
        mixed = torch.softmax(q @ k.transpose(1, 2) * width**-0.5, dim=-1) @ v
        back: torch.Tensor = self.out(mixed).transpose(1, 2).reshape(batch, width, high, wide)
        return x + back


def _twice(x: torch.Tensor) -> torch.Tensor:
    """Every pixel as two by two: nearest upsampling in ops that ONNX's evaluator is quick at."""
    batch, width, high, wide = x.shape
    wider = x[:, :, :, None, :, None].expand(batch, width, high, 2, wide, 2)
    return wider.reshape(batch, width, 2 * high, 2 * wide)


class UNet(nn.Module):
    """Latents (batch, 4, 32, 32) and a time embedding (batch, 1280), float32, to latents, float32."""

    def __init__(self, channels: tuple[int, ...] = CHANNELS) -> None:
        super().__init__()
        self.enter = nn.Conv2d(4, channels[0], 3, padding=1)
        pairs = list(zip((channels[0], *channels), channels, strict=False))
        self.down = nn.ModuleList(_Block(a, b) for a, b in pairs)
        self.smaller = nn.ModuleList(nn.Conv2d(c, c, 3, stride=2, padding=1) for c in channels)
        self.middle = _Attention(channels[-1])
        self.up = nn.ModuleList(_Block(2 * b, a) for a, b in reversed(pairs))
        self.leave = nn.Conv2d(channels[0], 4, 3, padding=1)

    def forward(self, latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """One denoising step."""
        kind = self.enter.weight.dtype
        x, time, kept = self.enter(latents.to(kind)), time.to(kind), []
        for block, smaller in zip(self.down, self.smaller, strict=True):
            x = block(x, time)
            kept.append(x)
            x = smaller(x)
        x = self.middle(x)
        for block in self.up:
            x = block(torch.cat((_twice(x), kept.pop()), dim=1), time)
        found: torch.Tensor = self.leave(x).float()
        return found
