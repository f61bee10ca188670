from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sklearn

from recipes.gate import Gate
from tasks.errors import InputError
from tasks.evaluate import check
from tasks.metrics import OWN, metric, scores


def per_example(predictions: Any, references: Any) -> Any:
    return np.minimum(predictions, references)


per_example.per_example = True  # type: ignore[attr-defined]


def largest_error(predictions: Any, references: Any) -> float:
    return float(np.abs(predictions - references).max())


largest_error.higher_is_better = False  # type: ignore[attr-defined]


def test_the_example_of_a_metric_of_your_own_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text().split("## A metric of your own")[1]
    (tmp_path / "within.py").write_text(page.split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    found = metric("python:within:one")
    assert (found.takes, found.higher_is_better, found.points) == ("label", True, True)
    assert scores(found, [1, 5, 3], [2, 2, 3]) == (1.0, 0.0, 1.0)
    assert found.value(np.array([1, 5]), np.array([2, 2])) == 0.5


@pytest.mark.parametrize(
    ("name", "predictions", "references", "expected"),
    [
        ("accuracy", [1, 0, 2, 2], [1, 1, 2, 0], [1, 0, 1, 0]),
        ("mae", [1.0, 2.0], [2.0, 2.5], [1.0, 0.5]),
        ("mse", [1.0, 2.0], [2.0, 2.5], [1.0, 0.25]),
        ("cosine", [[3.0, 4.0], [1.0, 0.0]], [[6.0, 8.0], [0.0, 1.0]], [1.0, 0.0]),
    ],
)
def test_means_have_a_score_for_each_example(
    name: str, predictions: Any, references: Any, expected: Any
) -> None:
    found = metric(name)
    assert scores(found, predictions, references) == pytest.approx(expected)
    assert found.value(predictions, references) == pytest.approx(np.mean(expected))


def test_recall_counts_what_is_among_the_k_nearest_and_ties_against_it() -> None:
    documents = np.eye(3)
    queries = np.array([[1.0, 0.5, 0.1], [1.0, 0.5, 0.1], [1.0, 1.0, 1.0]])
    assert scores(metric("recall@1"), queries, documents) == (1, 0, 0)
    assert scores(metric("recall@2"), queries, documents) == (1, 1, 0)
    assert scores(metric("recall@3"), queries, documents) == (1, 1, 1)


def test_neighbours_are_shares_of_the_other_rows() -> None:
    vectors = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    assert scores(metric("neighbours@1"), vectors, vectors) == (1, 1, 1)
    assert scores(metric("neighbours@1"), vectors[[0, 2, 1]], vectors) == (0, 0, 0)
    assert scores(metric("neighbours@5"), vectors[:2], vectors[1:]) == (1, 1)
    with pytest.raises(InputError, match=r"a single row has no neighbours; raise data\.split\.test"):
        scores(metric("neighbours@1"), vectors[:1], vectors[:1])


def test_images_and_texts_find_each_other_by_the_number_of_the_text() -> None:
    images = np.array([[1.0, 0], [0.9, 0.1], [0, 1], [0.8, 0.2]])
    texts = np.array([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    pairs, numbers = np.concatenate([images, texts], axis=1), np.array([0, 0, 1, 1])
    assert scores(metric("image-to-text@1"), pairs, numbers) == (1, 1, 1, 0)  # the last looks like the others
    assert scores(metric("image-to-text@2"), pairs, numbers) == (1, 1, 1, 1)
    assert scores(metric("text-to-image@1"), pairs, numbers) == (1, 1, 1, 1)
    apart = np.concatenate([images, texts[[2, 2, 0, 0]]], axis=1)
    assert scores(metric("text-to-image@1"), apart, numbers) == (0, 0, 0, 0)
    assert scores(metric("text-to-image@2"), apart, numbers) == (0, 0, 0, 0)
    assert scores(metric("text-to-image@3"), apart, numbers) == (1, 1, 1, 1)
    tied = np.concatenate([images, np.ones((4, 2))], axis=1)
    assert scores(metric("image-to-text@1"), tied, numbers) == (0, 0, 0, 0)


def test_f1_is_the_macro_average() -> None:
    generator = np.random.default_rng(0)
    truth, guess = generator.integers(0, 4, (2, 200))
    expected = sklearn.f1_score(truth, guess, average="macro")
    assert metric("f1").value(guess, truth) == pytest.approx(expected)
    assert metric("f1").value(np.array(["a", "b"]), np.array(["a", "a"])) == pytest.approx(1 / 3)
    assert scores(metric("f1"), guess, truth) is None


def test_perplexity_weighs_tokens() -> None:
    assert metric("perplexity").value([10.0, 2.0], [4, 1]) == pytest.approx(np.exp(12 / 5))
    assert not metric("perplexity").higher_is_better


def test_scikit_learn_by_the_names_it_uses() -> None:
    generator = np.random.default_rng(1)
    truth, guess = generator.integers(0, 2, (2, 100))
    share = generator.random((100, 2))
    assert metric("f1_weighted").value(guess, truth) == sklearn.f1_score(truth, guess, average="weighted")
    assert metric("matthews_corrcoef").value(guess, truth) == sklearn.matthews_corrcoef(truth, guess)
    assert metric("roc_auc").value(share, truth) == sklearn.roc_auc_score(truth, share[:, 1])
    assert metric("roc_auc").takes == "probability"
    assert metric("r2").takes == metric("mean_absolute_error").takes == "value"
    found = metric("mean_absolute_error")
    assert found.value(guess, truth) == sklearn.mean_absolute_error(truth, guess)
    assert not found.higher_is_better
    assert metric("neg_mean_absolute_error").higher_is_better
    assert metric("neg_mean_absolute_error").value(guess, truth) == -found.value(guess, truth)


def test_a_function_of_ones_own() -> None:
    mean = metric("python:statistics:fmean")
    assert mean.value([1.0, 3.0], [1.0, 1.0]) == 2.0
    with_scores = metric(f"python:{__name__}:per_example")
    assert scores(with_scores, [1.0, 5.0], [2.0, 3.0]) == (1.0, 3.0)
    worst = metric(f"python:{__name__}:largest_error")
    assert worst.value(np.array([1.0, 5.0]), np.array([2.0, 3.0])) == 2.0
    assert not worst.higher_is_better


@pytest.mark.parametrize(
    "name", ["python:statistics:nothing", "python:no.such:f", "python:statistics", "python:"]
)
def test_a_function_that_is_not_there(name: str) -> None:
    with pytest.raises(InputError, match=r"python:package\.module:function"):
        metric(name)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def score(p, r)", "SyntaxError: expected ':'"),
        ("undefined", "NameError: name 'undefined' is not defined"),
        ("def score(p, r): raise KeyError('x')", "score' raised KeyError: 'x'"),
        ("def score(p, r): return 1.0\nscore.per_example = True", r"of shape \(\); return one number per"),
        (
            "def score(p, r): return [1.0]\nscore.per_example = True",
            r"4 examples have scores of shape \(1,\)",
        ),
    ],
)
def test_what_a_function_does_wrong_is_told_before_training(
    text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd_metric.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "odd_metric", raising=False)
    with pytest.raises(InputError, match=words):
        check(Gate(metric="python:odd_metric:score", max_drop=0.1), "text-classification", 2)


@pytest.mark.parametrize(("name", "near"), [("acuracy", "accuracy"), ("recall@0", "recall@1"), ("F1", "f1")])
def test_an_unknown_name_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(InputError, match=f"Nearest: .*{near}"):
        metric(name)


@pytest.mark.parametrize("name", OWN)
def test_each_is_known_by_its_name(name: str) -> None:
    assert metric(name).name == name
