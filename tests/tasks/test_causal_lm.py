"""A language model: trained, quantized, exported with a mask and without a cache, measured by perplexity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import recipes
from recipes.build import Export
from recipes.compress import Finetune, Quantize
from tasks import batches, checkpoints, load, metrics, store, types
from tasks.artifacts import Checkpoint, Dataset
from tasks.calibrate import calibrate
from tasks.engines import onnxruntime
from tasks.evaluate import run
from tasks.export import export
from tasks.finetune import finetune

TASK = "causal-lm"
KIND = types.load(TASK)


@pytest.fixture(scope="module")
def case(lm_recipe: Path) -> tuple[Dataset, Checkpoint]:
    """The rows, and the network after a few steps."""
    recipe = recipes.load(str(lm_recipe))
    dataset = load.load_data.fn(recipe.data, TASK, "content")
    start = load.load_model.fn(recipe.model, recipe.data, TASK, "content", 0)
    return dataset, finetune.fn(start, dataset, Finetune(epochs=0.5, batch_size=8, learning_rate=3e-3))


def test_training_lowers_the_loss(case: tuple[Dataset, Checkpoint]) -> None:
    curve = case[1].facts["curve"]
    assert curve[-1]["loss"] < 0.8 * curve[0]["loss"]


def test_the_exported_graph_has_the_perplexity_of_the_network(case: tuple[Dataset, Checkpoint]) -> None:
    """Padding, the mask and the shift by one, against transformers' own loss of one text at a time."""
    dataset, checkpoint = case
    quantized = calibrate.fn(checkpoint, dataset, Quantize(format="int8", exclude=("lm_head",)))
    assert quantized.facts["quantizers"]["weights"] == 14  # 7 in each of 2 layers
    made = export.fn(quantized, dataset, Export(), "fp32")
    encoded, _ = batches.examples(dataset, "test", batches.preprocessor(checkpoint))
    encoded = [*encoded[:6], {name: array[:1] for name, array in encoded[6].items() if array.ndim}]
    with onnxruntime.open(store.path(made.blob), None, level="disabled") as session:
        rows = run(session, TASK, encoded)
    network, _ = checkpoints.restore(quantized)
    for example, row in zip(encoded[:6], rows, strict=False):
        ids = torch.from_numpy(example["input_ids"])[None]
        with torch.no_grad():
            wanted = network(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        assert row.mean() == pytest.approx(float(wanted), rel=1e-3)
    assert rows[6].size == 0  # one token says nothing
    value = metrics.metric("perplexity").value(
        KIND.predictions(rows, "loss"), KIND.references(encoded, np.zeros(0), None)
    )
    assert value == pytest.approx(np.exp(np.concatenate(rows).mean()))


def test_it_goes_on_with_the_likeliest_token(case: tuple[Dataset, Checkpoint]) -> None:
    """Texts of unlike length together, each token by token; against transformers' greedy generation."""
    dataset, checkpoint = case
    made = export.fn(checkpoint, dataset, Export(), "fp32")
    folder = batches.preprocessor(checkpoint)
    texts = ["a good", "very bad film and"]
    examples = KIND.encode(folder, texts)
    with onnxruntime.open(store.path(made.blob), None, level="disabled") as session:
        told = KIND.answer(folder, examples, lambda some: session.run(KIND.collate(some))["logits"])
    network, _ = checkpoints.restore(checkpoint)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for example, row in zip(examples, told, strict=True):
        ids = torch.from_numpy(example["input_ids"])[None]
        with torch.no_grad():
            found = network.generate(ids, max_new_tokens=32, do_sample=False, eos_token_id=None)  # type: ignore[operator]
        assert row["text"] == tokenizer.decode(found[0, ids.shape[1] :].tolist())
        assert row["truncated"] is False
