"""Sentence embeddings without labels: pooled and normalised in the graph, judged against the baseline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import recipes
from recipes.build import Export
from recipes.compress import Quantize
from tasks import batches, checkpoints, load, metrics, store, types
from tasks.artifacts import Checkpoint, Dataset
from tasks.calibrate import calibrate
from tasks.engines import onnxruntime
from tasks.evaluate import run
from tasks.export import export

TASK = "sentence-embedding"


@pytest.fixture(scope="module")
def case(embedding_recipe: Path) -> tuple[Dataset, Checkpoint]:
    recipe = recipes.load(str(embedding_recipe))
    dataset = load.load_data.fn(recipe.data, TASK, "content")
    return dataset, load.load_model.fn(recipe.model, recipe.data, TASK, "content", 0)


def test_rows_need_no_labels(case: tuple[Dataset, Checkpoint]) -> None:
    dataset, checkpoint = case
    assert dataset.labels == ()
    assert set(load.rows(dataset, "test")) == {"text", "file"}
    encoded, labels = batches.examples(dataset, "test", batches.preprocessor(checkpoint))
    assert (len(encoded), len(labels)) == (dataset.rows["test"], 0)


def test_the_graph_pools_and_normalises_whatever_the_padding(case: tuple[Dataset, Checkpoint]) -> None:
    dataset, checkpoint = case
    made = export.fn(checkpoint, dataset, Export(), "fp32")
    encoded, _ = batches.examples(dataset, "test", batches.preprocessor(checkpoint))
    kind = types.load(TASK)
    longest = max(encoded, key=lambda example: example["input_ids"].size)
    with onnxruntime.open(store.path(made.blob), None, level="disabled") as session:
        alone = session.run(kind.collate(encoded[:1]))["embedding"]
        padded = session.run(kind.collate([encoded[0], longest]))["embedding"]
    np.testing.assert_allclose(alone[0], padded[0], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(padded, axis=1), 1, atol=1e-5)
    model, _ = checkpoints.restore(checkpoint)
    hidden = model(**batches.tensors(kind.collate(encoded[:1]))).last_hidden_state.detach().numpy()[0]
    mean = hidden.mean(axis=0)
    np.testing.assert_allclose(alone[0], mean / np.linalg.norm(mean), atol=1e-5)


def test_nothing_that_is_not_used_is_quantized(case: tuple[Dataset, Checkpoint]) -> None:
    """The bare network's pooler would keep a quantizer that no row ever reaches."""
    dataset, checkpoint = case
    quantized = calibrate.fn(checkpoint, dataset, Quantize(format="int8"))
    assert quantized.facts["quantizers"]["weights"] == 12
    made = export.fn(quantized, dataset, Export(), "fp32")
    found = []
    encoded, _ = batches.examples(dataset, "test", batches.preprocessor(checkpoint))
    for model in (made, export.fn(checkpoint, dataset, Export(), "fp32")):
        with onnxruntime.open(store.path(model.blob), None, level="disabled") as session:
            found.append(np.stack(run(session, TASK, encoded)))
    cosine = metrics.metric("cosine").value(*found)
    assert 0.9 < cosine < 1


def test_neighbours_are_those_of_the_references() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(50, 8))
    how = metrics.metric("neighbours@5")
    assert how.takes == "vector"
    assert how.value(vectors, vectors) == 1
    turned = vectors @ np.linalg.qr(rng.normal(size=(8, 8)))[0]
    assert how.value(turned, vectors) == pytest.approx(1)  # a rotation moves no neighbour
    assert how.value(rng.normal(size=(50, 8)), vectors) < 0.4
    assert metrics.scores(how, vectors, vectors) == (1.0,) * 50
    assert how.value(vectors[:3], vectors[:3]) == 1  # fewer than five others
