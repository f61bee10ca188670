"""A diffusion model: calibrated over timesteps, the noise of the engine PyTorch's, pictures side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import recipes
from recipes.build import Build, Export
from tasks import batches, checkpoints, load, store, types
from tasks.artifacts import Checkpoint, Dataset
from tasks.build import build
from tasks.calibrate import calibrate
from tasks.engines import onnxruntime
from tasks.export import export
from tasks.pictures import _draw, pictures

KIND: Any = types.load("diffusion")
SETTINGS = {
    "type": "diffusion",
    "labels": [],
    "shape": [1, 8, 8],
    "scale": 0.0625,
    "mean": [0.5],
    "std": [0.5],
}


@pytest.fixture(scope="module")
def case() -> tuple[Dataset, Checkpoint, Checkpoint]:
    """The digits, the network as it starts, and in INT8."""
    recipe = recipes.load("digits-dit-int8-ptq")
    assert recipe.quantize is not None
    dataset = load.load_data.fn(recipe.data, recipe.task, "content")
    start = load.load_model.fn(recipe.model, recipe.data, recipe.task, "content", 0)
    return dataset, start, calibrate.fn(start, dataset, recipe.quantize)


def test_rows_are_spread_over_the_timesteps_and_are_what_the_schedule_says(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    values = np.random.default_rng(0).integers(0, 17, (200, 64)).astype(float)
    examples = KIND.encode(tmp_path, values)
    timesteps = np.array([example["timestep"] for example in examples])
    assert np.histogram(timesteps, bins=5, range=(0, 1000))[0].min() > 20
    for example in examples[:20]:
        left = KIND.LEFT[example["timestep"]]
        noise = (example["sample"] - np.sqrt(left) * example["start"]) / np.sqrt(1 - left)
        assert 0.6 < noise.std() < 1.4
    again = KIND.encode(tmp_path, values[:3])
    assert all(
        np.array_equal(one["sample"], other["sample"]) for one, other in zip(examples, again, strict=False)
    )


def test_the_true_noise_leads_back_to_the_picture(tmp_path: Path) -> None:
    """DDIM with an oracle that knows the picture ends at it."""
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    (example,) = KIND.encode(tmp_path, [np.arange(64) % 17])
    picture = example["start"]
    start = {**example, "start": np.random.default_rng(1).standard_normal(picture.shape)}

    def oracle(batch: list[types.Example]) -> np.ndarray:
        left = KIND.LEFT[batch[0]["timestep"]]
        return np.stack([(item["sample"] - np.sqrt(left) * picture) / np.sqrt(1 - left) for item in batch])

    np.testing.assert_allclose(KIND.pictures([start], oracle)[0], picture, atol=1e-3)
    (told,) = KIND.answer(tmp_path, [start], oracle)
    assert len(told["image"]) == 64


def test_the_engine_predicts_pytorch_s_noise(case: tuple[Dataset, Checkpoint, Checkpoint]) -> None:
    dataset, start, quantized = case
    assert quantized.facts["quantizers"]["weights"] == 22
    model = export.fn(quantized, dataset, Export(), "fp32")
    batch = batches.samples(dataset, batches.preprocessor(start), count=1)[0]
    network, _ = checkpoints.restore(quantized)
    with torch.no_grad():
        wanted = network(**batches.tensors(batch)).numpy()
    with onnxruntime.open(store.path(model.blob), None, level="disabled") as session:
        assert list(session.inputs) == list(KIND.INPUTS)
        np.testing.assert_allclose(session.run(batch)["noise"], wanted, atol=1e-4)
        one = {name: array[:1] for name, array in batch.items()}
        np.testing.assert_allclose(session.run(one)["noise"], wanted[:1], atol=1e-4)


def test_pictures_stand_side_by_side(case: tuple[Dataset, Checkpoint, Checkpoint]) -> None:
    from PIL import Image

    dataset, start, quantized = case
    engines = [
        build.fn(export.fn(item, dataset, Export(), "fp32"), item, dataset, Build(), "onnxruntime", "")
        for item in (quantized, start)
    ]
    drawn = pictures.fn(*engines, dataset, "")
    assert 0 < drawn.values["picture_error"] < 0.5
    assert drawn.blob is not None
    with Image.open(store.path(drawn.blob) / "pair.png") as picture:
        assert picture.size == (6 * 100, 2 * 96 + 4)
    assert pictures.fn(engines[1], engines[1], dataset, "").values["picture_error"] == 0


def test_colors_and_scale_of_the_pair(tmp_path: Path) -> None:
    from PIL import Image

    above = np.zeros((2, 3, 4, 4))
    above[1, 0] = 1.0
    _draw(above, above * 2, tmp_path / "pair.png")
    pixels = np.asarray(Image.open(tmp_path / "pair.png"))
    assert pixels[10, 10].tolist() == [0, 0, 0]
    assert pixels[10, 120].tolist() == [255, 0, 0]
    assert pixels[96 + 4 + 10, 120].tolist() == [255, 0, 0]  # beyond the scale is cut


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.source=path:somewhere", "task diffusion needs a network of your own"),
        ("finetune={epochs: 1}", "task diffusion is not trained here"),
        ("data.label=class", "labels: name the classes"),
        ("data.image=null", "task diffusion needs data.image"),
    ],
)
def test_a_recipe_that_does_not_fit_is_told(override: str, words: str) -> None:
    with pytest.raises(recipes.RecipeError, match=words):
        recipes.load("digits-dit-int8-ptq", [override])
