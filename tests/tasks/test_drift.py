"""Drift is seen for every kind of task: in what goes in, in what the quantizers meet, in what comes out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import recipes
from recipes.build import Build, Export
from recipes.compress import Quantize
from recipes.schema import Drift
from tasks import load
from tasks.build import build, host
from tasks.calibrate import calibrate
from tasks.drift import compare, loaded, psi, psi_by_chance, survey
from tasks.export import export


@pytest.mark.parametrize(
    ("name", "traits"),
    [("tiny_recipe", {"size", "class", "score"}), ("embedding_recipe", {"size"})],
)
def test_the_same_rows_have_not_drifted(name: str, traits: set[str], request: pytest.FixtureRequest) -> None:
    file: Path = request.getfixturevalue(name)
    recipe = recipes.load(str(file))
    dataset = load.load_data.fn(recipe.data, recipe.task, "content")
    start = load.load_model.fn(recipe.model, recipe.data, recipe.task, "content", 0)
    candidate = calibrate.fn(start, dataset, Quantize(format="int8"))
    model = export.fn(candidate, dataset, Export(), "fp32")
    engine = build.fn(model, candidate, dataset, Build(), "onnxruntime", host("onnxruntime"))

    seen = survey.fn(engine, None, dataset, "test", "here")
    content = loaded(seen)
    assert set(content) == traits | {"overflow"}
    assert len(content["size"]) == dataset.rows["test"]
    assert content["overflow"]
    found = compare(seen, seen, Drift())
    assert set(found.psi) == traits
    assert all(value == pytest.approx(0) for value in found.psi.values())


CUT = [128.0] * 280 + [float(k) for k in range(20)]


@pytest.mark.parametrize(
    ("reference", "new"),
    [
        ([128.0] * 256, [7.0] * 400),  # every calibration text was cut
        ([0.0] * 256, [1.0] * 400),  # every calibration row is of one class
        ([0.0] * 256, [-1.0] * 400),
        ([1.0, 2.0] * 128, [1.0, 3.0] * 200),
        (CUT, [20.5] * 400),
    ],
)
def test_values_that_were_never_seen_are_a_shift(reference: list[float], new: list[float]) -> None:
    assert psi(reference, new) > 0.5
    assert psi(reference, reference * 3) == pytest.approx(0)


@pytest.mark.parametrize("calibrated", [32, 128])
def test_samples_of_one_distribution_are_not_a_shift(calibrated: int) -> None:
    rng, limited, told = np.random.default_rng(0), 0, 0
    for _ in range(200):
        old, new = rng.normal(size=calibrated), rng.normal(size=200)
        limited += psi(old, new) > 0.2
        told += psi(old, new) > max(0.2, psi_by_chance(old, new))
        assert psi(old, new + 3) > psi_by_chance(old, new + 3)
    assert limited >= 10
    assert told < limited / 5


def test_one_value_alone_has_a_chance_too() -> None:
    assert psi_by_chance([1.0] * 50, [1.0] * 50) == pytest.approx(0.433, abs=0.001)


def test_deciles_tell_a_moved_mean_from_another_sample() -> None:
    rng = np.random.default_rng(0)
    old, other = rng.normal(size=1000), rng.normal(size=1000)
    assert psi(old, other) < 0.05
    assert psi(old, other + 0.7) > 0.2
