"""A tiny text classifier and a small CNN, both real, untrained, each with its data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from recipes import load as recipe
from recipes.data import Data
from recipes.schema import Model
from tasks import load
from tasks.artifacts import Checkpoint, Dataset


@dataclass(frozen=True)
class Case:
    """A dataset and the untrained network for it."""

    dataset: Dataset
    checkpoint: Checkpoint
    model: Model
    data: Data


@pytest.fixture(scope="session")
def text(tiny_recipe: Path) -> Case:
    tiny = recipe(str(tiny_recipe))
    return _case(tiny.model, tiny.data, tiny.task)


@pytest.fixture(scope="session")
def image() -> Case:
    digits = recipe("digits-cnn-int8-ptq")
    return _case(digits.model, digits.data, digits.task)


def _case(model: Model, data: Data, task: str) -> Case:
    dataset = load.load_data.fn(data, task, "content")
    return Case(dataset, load.load_model.fn(model, data, task, "content", 0), model, data)
