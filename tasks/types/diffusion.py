"""Noised latents, timestep and conditioning in, the noise out: one step of a diffusion model.

A row is a clean image (or latent), noised to a timestep of its own, so that calibration rows are spread
over all of them. There are no labels and no training: metrics compare with the noise that the baseline
predicts. The registered model takes noise and answers with the picture that `STEPS` steps of DDIM make of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks import types
from tasks.types import Example, Run, images
from tasks.types.vectors import *  # noqa: F403

if TYPE_CHECKING:
    from torch import Tensor, nn

COLUMN, check, example, smoke = images.COLUMN, images.check, images.example, images.smoke
INPUTS = {"sample": {0: "batch"}, "timestep": {0: "batch"}, "encoder_hidden_states": {0: "batch"}}
OUTPUTS = {"noise": {0: "batch"}}
AUTO = ""  # transformers has none; the network is a python: model
ANSWER = {"image": "doubles"}
TIMESTEPS, STEPS = 1000, 20
CONDITION = (4, 32)
"""Tokens of conditioning and their width: what a text encoder would give."""
LEFT = np.cumprod(1 - np.linspace(1e-4, 0.02, TIMESTEPS))
"""The share of the picture's variance that is left at each timestep: DDPM's linear schedule."""


def encode(folder: Path, values: Sequence[Any]) -> list[Example]:
    """Each image noised to a timestep of its own, with conditioning; all three follow from its pixels.

    `start` is the image as it was given, where a picture begins.
    """
    return [_noised(example["pixel_values"]) for example in images.encode(folder, values)]


def _noised(image: np.ndarray) -> Example:
    random = np.random.default_rng(int.from_bytes(hashlib.sha256(image.tobytes()).digest()[:8], "little"))
    timestep = random.integers(TIMESTEPS)
    noise = random.standard_normal(image.shape)
    noised = np.sqrt(LEFT[timestep]) * image + np.sqrt(1 - LEFT[timestep]) * noise
    return {
        "sample": noised.astype(np.float32),
        "timestep": np.asarray(timestep, np.int64),
        "encoder_hidden_states": random.standard_normal(CONDITION).astype(np.float32),
        "start": image,
    }


def collate(examples: Sequence[Example]) -> Example:
    """Stack to batches of the three inputs."""
    return {name: np.stack([example[name] for example in examples]) for name in INPUTS}


def size(example: Example) -> float:
    """The timestep."""
    return float(example["timestep"])


def forward(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The predicted noise."""
    noise: Tensor = types.result(model(**inputs), "sample")
    return noise


def wrong(shape: tuple[int, ...], settings: dict[str, Any]) -> str:
    """Noise of the picture's shape."""
    wanted = (1, *settings["shape"])
    return "" if shape == wanted else f"the network gives {shape}, data.image.shape asks for {wanted}"


def row(output: np.ndarray, example: Example) -> np.ndarray:
    """The noise, flat."""
    return output.ravel()


def traits(row: np.ndarray) -> dict[str, float]:
    """How strong the noise is."""
    return {"strength": float(np.sqrt(np.mean(np.square(row))))}


def answer(folder: Path, examples: Sequence[Example], run: Run) -> list[dict[str, Any]]:
    """The picture that the steps make of each start, flat."""
    return [{"image": picture.ravel().tolist()} for picture in pictures(examples, run)]


def pictures(examples: Sequence[Example], run: Run) -> np.ndarray:
    """Pictures from the examples' starts: `STEPS` steps of DDIM, without further noise."""
    latents = np.stack([example["start"] for example in examples]).astype(np.float64)
    steps = np.linspace(TIMESTEPS - 1, 0, STEPS).round().astype(np.int64)
    for timestep, after in zip(steps, [*steps[1:], -1], strict=True):
        batch = [
            {**example, "sample": latent.astype(np.float32), "timestep": np.asarray(timestep)}
            for example, latent in zip(examples, latents, strict=True)
        ]
        noise = np.asarray(run(batch), np.float64)
        clean = (latents - np.sqrt(1 - LEFT[timestep]) * noise) / np.sqrt(LEFT[timestep])
        left = LEFT[after] if after >= 0 else 1.0
        latents = np.sqrt(left) * clean + np.sqrt(1 - left) * noise
    return np.asarray(latents)
