"""The task types: each offers every name, agrees with the recipes' schema, and turns values into answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import recipes
from recipes.gate import Gate
from recipes.schema import TASKS
from tasks import evaluate, types
from tasks.errors import InputError
from tests.conftest import bert_folder

FOLDER = Path(types.__file__).parent
SHARED = {"__init__", "texts", "images", "classes", "vectors"}


def test_the_folder_is_the_schema_s_tasks() -> None:
    files = {file.stem.replace("_", "-") for file in FOLDER.glob("*.py") if file.stem not in SHARED}
    assert files == set(TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_every_type_offers_every_name_and_agrees_with_the_schema(task: str) -> None:
    kind = types.load(task)
    missing = [name for name in types.TaskType.__annotations__ if not hasattr(kind, name)]
    assert not missing
    assert TASKS[task].column == kind.COLUMN
    assert (kind.REFERENCES == "labels") is TASKS[task].labels
    assert len(kind.OUTPUTS) == 1
    parts = types.parts(kind).values()
    assert {name for part in parts for name in part.INPUTS} == set(kind.INPUTS)
    assert all(len(part.OUTPUTS) == 1 for part in parts)


@pytest.mark.parametrize(
    ("task", "good", "bad", "words"),
    [
        ("text-classification", "accuracy", "cosine", "takes a vector; text-classification gives label and"),
        ("image-classification", "log_loss", "mae", "takes a value; image-classification gives label"),
        ("sentence-embedding", "neighbours@10", "accuracy", "takes a label; sentence-embedding gives vector"),
        ("sentence-embedding", "recall@1", "perplexity", "takes a loss; sentence-embedding gives vector"),
        ("causal-lm", "perplexity", "accuracy", "takes a label; causal-lm gives loss"),
        ("image-text", "image-to-text@1", "recall@1", "takes a vector; image-text gives pair"),
        ("image-text", "text-to-image@5", "accuracy", "takes a label; image-text gives pair"),
        ("diffusion", "cosine", "perplexity", "takes a loss; diffusion gives vector"),
    ],
)
def test_a_metric_must_fit_the_type(task: str, good: str, bad: str, words: str) -> None:
    labels = 3 if TASKS[task].labels else 0
    evaluate.check(Gate(metric=good, max_drop=0.1), task, labels)
    with pytest.raises(InputError, match=words):
        evaluate.check(Gate(metric=bad, max_drop=0.1), task, labels)


SETTINGS = {"shape": [1, 2, 3], "scale": 0.5, "mean": [1.0], "std": [2.0]}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("a cat", "expected an image as an array of numbers, got 'a cat'"),
        (None, "expected an image|not finite"),
        ([], "empty"),
        ([[[1, 2, 3], [4, 5, float("nan")]]], "not finite"),
        (np.zeros((3, 2, 3)), r"shape \(1, 2, 3\) \(channels, height, width\), got one of shape \(3, 2, 3\)"),
        (np.zeros((3, 2)), r"got one of shape \(3, 2\)"),
        ([[1, 2], [3]], "expected an image"),
    ],
)
def test_what_is_no_image_is_told(value: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        types.load("image-classification").check(value, SETTINGS)


def test_pixels_are_scaled_then_normalised(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text('{"shape": [1, 2, 3], "scale": 0.5, "mean": [1.0], "std": [2.0]}')
    kind = types.load("image-classification")
    (example,) = kind.encode(tmp_path, [[[2, 4, 6], [8, 10, 12]]])
    assert example["pixel_values"].tolist() == [[[0.0, 0.5, 1.0], [1.5, 2.0, 2.5]]]


@pytest.mark.parametrize("task", ["text-classification", "sentence-embedding"])
def test_a_text_that_is_cut_says_so(task: str, tmp_path: Path) -> None:
    folder = bert_folder(tmp_path)
    (folder / "settings.json").write_text('{"max_length": 4, "labels": ["bad", "good"]}')
    kind = types.load(task)
    examples = kind.encode(folder, ["a good film", "a very good film and a book"])
    assert [len(example["input_ids"]) for example in examples] == [3, 4]
    told = kind.answer(folder, examples, lambda found: np.ones((len(found), 2)))
    assert [row["truncated"] for row in told] == [False, True]
    assert set(told[0]) == set(kind.ANSWER)
    for value, words in ((1.5, "expected text, got float"), ("", "empty"), (b"x", "got bytes")):
        with pytest.raises(InputError, match=words):
            kind.check(value, {})


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("finetune={epochs: 1}", "is not trained here, the weights are model.source's; remove finetune"),
        ("data.label=rating", "labels: name the classes of `label`"),
        ("data.labels=[a, b]", "no `label` says where they are"),
        ("data.text=null", "needs data.text"),
        ("task=text-classification", "needs data.label and data.labels"),
        ("model.source=python:a.b:c", "has no tokenizer; say where one is: model.tokenizer"),
    ],
)
def test_a_recipe_without_labels_is_checked(override: str, words: str) -> None:
    with pytest.raises(recipes.RecipeError, match=words):
        recipes.load("embeddings-minilm-int8-ptq", [override])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.image.mean=[0.1, 0.2, 0.3]", "mean has 3 values, the images have 1 channels"),
        ("data.image.std=[0]", "greater than 0"),
        ("data.image.shape=[1, 0, 8]", "greater than or equal to 1"),
    ],
)
def test_an_image_section_is_checked(override: str, words: str) -> None:
    with pytest.raises(recipes.RecipeError, match=words):
        recipes.load("digits-vit-int8-qat-24", [override])


PAIR = (
    "task=image-text",
    "model={name: a, source: 'path:.', tokenizer: 'path:.'}",
    "gate.metric=image-to-text@1",
)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            (),
            "needs a text for each image: data.text names its column, or data.prompt makes it of data.label",
        ),
        (("data.prompt=a {label}", "data.text=caption"), "set one of the two"),
        (("data.prompt=a thing",), "prompt is a text around {label}"),
        (("data.prompt=a {label}", "data.image=null"), "needs data.image"),
        (("data.prompt=a {label}", "model={name: a, source: 'python:a.b:c'}"), "model.tokenizer"),
    ],
)
def test_a_recipe_of_pairs_is_checked(overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(recipes.RecipeError, match=words):
        recipes.load("digits-vit-int8-qat-24", [*PAIR, *overrides])
    assert recipes.load("digits-vit-int8-qat-24", [*PAIR, "data.prompt=a {label}"]).data.prompt


def test_equal_texts_of_a_batch_share_the_loss() -> None:
    import torch

    kind = types.load("image-text")
    ids = np.array([[4, 5], [4, 6], [4, 5]])
    numbers = kind.targets({"input_ids": ids}, np.zeros(3))
    assert numbers[0] == numbers[2] != numbers[1]

    class Found:
        logits_per_image = logits_per_text = torch.tensor([[9.0, 0, 9], [0, 9, 0], [9, 0, 9]])

    right = kind.loss(Found(), torch.as_tensor(numbers))
    assert float(right) == pytest.approx(np.log(2) * 2 / 3, abs=1e-3)  # two rows cannot be told apart
    assert float(kind.loss(Found(), torch.tensor([0, 0, 1]))) > right + 1
