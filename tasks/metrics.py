"""Metrics by name: what they take, which way is better, and the score of each example where there is one."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from tasks.errors import InputError

Takes = Literal["label", "probability", "value", "vector", "pair", "loss"]
PairFunction = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Metric:
    """A metric of (predictions, references).

    `takes` says what a prediction is: a class label, class probabilities, a number, a vector (the reference
    is one, too), the vectors of an image and its text (the reference is the text's number, the same for the
    same text), or the summed loss of a text (the reference is its number of tokens). With `scores` the
    metric is the mean of these per-example values. `points`: a share, spoken of in points of 100.
    """

    name: str
    value: Callable[[Any, Any], float]
    scores: PairFunction | None = None
    takes: Takes = "label"
    higher_is_better: bool = True
    points: bool = True


def metric(name: str) -> Metric:
    """The metric of this name; an unknown one is an InputError that names the nearest."""
    if name.startswith("python:"):
        return _python(name)
    if found := re.fullmatch(r"(recall|neighbours)@([1-9]\d*)", name):
        function = _retrieved if found[1] == "recall" else _neighbours
        return _mean(name, partial(function, k=int(found[2])), takes="vector")
    if found := re.fullmatch(r"(image-to-text|text-to-image)@([1-9]\d*)", name):
        function = _texts_found if found[1] == "image-to-text" else _images_found
        return _mean(name, partial(function, k=int(found[2])), takes="pair")
    return OWN[name] if name in OWN else _sklearn(name)


def scores(metric: Metric, predictions: Any, references: Any) -> tuple[float, ...] | None:
    """Each example's score, or None where the metric is not a mean of them."""
    if metric.scores is None:
        return None
    values = np.asarray(metric.scores(np.asarray(predictions), np.asarray(references)), dtype=float)
    if values.shape != (len(references),):
        raise InputError(
            f"metric {metric.name!r}: {len(references)} examples have scores of shape {values.shape}; "
            "return one number per example"
        )
    return tuple(values.tolist())


def _mean(name: str, function: PairFunction, **options: Any) -> Metric:
    return Metric(name, lambda p, r: float(np.mean(function(p, r))), function, **options)


def _right(predictions: Any, references: Any) -> Any:
    return np.asarray(predictions) == np.asarray(references)


def _squared(predictions: Any, references: Any) -> Any:
    return np.square(_numbers(predictions) - _numbers(references))


def _absolute(predictions: Any, references: Any) -> Any:
    return np.abs(_numbers(predictions) - _numbers(references))


def _cosine(predictions: Any, references: Any) -> Any:
    return np.sum(_unit(predictions) * _unit(references), axis=1)


def _retrieved(predictions: Any, references: Any, k: int) -> Any:
    """Whether query i finds document i among the k nearest; a tie counts against it."""
    similar = _unit(predictions) @ _unit(references).T
    return (similar >= np.diag(similar)[:, None]).sum(axis=1) <= k


def _texts_found(predictions: Any, references: Any, k: int) -> Any:
    """Whether image i finds its text among the k nearest of all different texts."""
    images, texts = np.split(_numbers(predictions), 2, axis=1)
    different, first = np.unique(references, return_index=True)
    return _crossed((images, references), (texts[first], different), k)


def _images_found(predictions: Any, references: Any, k: int) -> Any:
    """Whether text i finds an image of its own among the k nearest of all images."""
    images, texts = np.split(_numbers(predictions), 2, axis=1)
    return _crossed((texts, references), (images, references), k)


def _crossed(queries: tuple[Any, Any], documents: tuple[Any, Any], k: int) -> Any:
    """Whether a document with the query's number is among the k nearest; a tie counts against it."""
    similar = _unit(queries[0]) @ _unit(documents[0]).T
    own = np.asarray(queries[1])[:, None] == np.asarray(documents[1])[None]
    best = np.where(own, similar, -np.inf).max(axis=1, keepdims=True)
    return ((similar >= best) & ~own).sum(axis=1) < k


def _neighbours(predictions: Any, references: Any, k: int) -> Any:
    """Which share of the k rows nearest to row i by the references is nearest by the predictions, too."""
    if len(references) < 2:
        raise InputError("metric neighbours@k: a single row has no neighbours; raise data.split.test")
    found = [_nearest(vectors, k) for vectors in (predictions, references)]
    return np.array([len(set(ours) & set(theirs)) / len(theirs) for ours, theirs in zip(*found, strict=True)])


def _nearest(vectors: Any, k: int) -> Any:
    """The rows of largest cosine to each row, itself left out: shape (rows, k)."""
    similar = _unit(vectors) @ _unit(vectors).T
    np.fill_diagonal(similar, -np.inf)
    k = min(k, len(similar) - 1)
    return np.argpartition(-similar, k - 1, axis=1)[:, :k]


def _macro_f1(predictions: Any, references: Any) -> float:
    labels, codes = np.unique(np.concatenate([references, predictions]), return_inverse=True)
    true, guess = codes[: len(references)], codes[len(references) :]
    hits = np.bincount(true[true == guess], minlength=len(labels))
    total = np.bincount(true, minlength=len(labels)) + np.bincount(guess, minlength=len(labels))
    return float(np.mean(2 * hits / total))


def _perplexity(predictions: Any, references: Any) -> float:
    return float(np.exp(_numbers(predictions).sum() / _numbers(references).sum()))


def _rmse(predictions: Any, references: Any) -> float:
    return float(np.sqrt(np.mean(_squared(predictions, references))))


def _numbers(values: Any) -> Any:
    return np.asarray(values, dtype=float)


def _unit(vectors: Any) -> Any:
    vectors = _numbers(vectors)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)


OWN: dict[str, Metric] = {
    made.name: made
    for made in (
        _mean("accuracy", _right),
        Metric("f1", _macro_f1),
        _mean("mae", _absolute, takes="value", higher_is_better=False, points=False),
        _mean("mse", _squared, takes="value", higher_is_better=False, points=False),
        Metric("rmse", _rmse, takes="value", higher_is_better=False, points=False),
        _mean("cosine", _cosine, takes="vector", points=False),
        Metric("perplexity", _perplexity, takes="loss", higher_is_better=False, points=False),
    )
}


def _python(name: str) -> Metric:
    """A function(predictions, references) -> a float, or one value per example.

    Optional attributes of the function: `per_example`, `takes`, `higher_is_better`, `points`.
    """
    module, _, attribute = name.removeprefix("python:").partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as problem:  # the user's module raises what it likes
        raise InputError(
            f"metric {name!r}: {type(problem).__name__}: {problem}. Write python:package.module:function, "
            "importable from here."
        ) from problem
    options = {
        key: getattr(function, key)
        for key in ("takes", "higher_is_better", "points")
        if hasattr(function, key)
    }

    def called(predictions: Any, references: Any) -> Any:
        try:
            return function(predictions, references)
        except Exception as problem:
            raise InputError(f"metric {name!r} raised {type(problem).__name__}: {problem}") from problem

    if getattr(function, "per_example", False):
        return _mean(name, called, **{"points": False, **options})
    return Metric(name, lambda p, r: float(called(p, r)), **{"points": False, **options})


def _sklearn(name: str) -> Metric:
    """A scorer (`f1_weighted`, `r2`, `roc_auc`) or a function (`matthews_corrcoef`) of scikit-learn."""
    from sklearn import metrics

    if name in metrics.get_scorer_names():
        return _scorer(name, metrics.get_scorer(name))
    function = getattr(metrics, name, None)
    if not inspect.isfunction(function) or list(inspect.signature(function).parameters)[:1] != ["y_true"]:
        raise InputError(_unknown(name))
    lower = name.endswith(("_error", "_loss", "_deviance"))
    second = list(inspect.signature(function).parameters)[1]
    takes: Takes = (
        "probability" if second in ("y_score", "y_prob", "y_proba") else "value" if lower else "label"
    )
    return Metric(name, lambda p, r: float(function(r, p)), None, takes, not lower, not lower)


def _scorer(name: str, scorer: Any) -> Metric:
    asked = scorer._response_method
    takes: Takes = "probability" if asked != "predict" else "value" if name in REGRESSION else "label"
    takes = "value" if name.startswith("neg_") and takes == "label" else takes

    def value(predictions: Any, references: Any) -> float:
        if np.shape(predictions)[1:] == (2,) and name != "neg_log_loss":
            predictions = predictions[:, 1]  # scikit-learn wants the second class's alone
        return float(scorer._sign * scorer._score_func(references, predictions, **scorer._kwargs))

    return Metric(name, value, None, takes, points=takes != "value" and not name.startswith("neg_"))


REGRESSION = ("r2", "explained_variance", "d2_absolute_error_score")


def _unknown(name: str) -> str:
    from sklearn import metrics

    known = [
        *OWN,
        "recall@1",
        "recall@5",
        "recall@10",
        "neighbours@10",
        "image-to-text@1",
        *metrics.get_scorer_names(),
    ]
    known += [other for other in dir(metrics) if other.endswith(("_score", "_error", "_loss", "_corrcoef"))]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f" Nearest: {', '.join(near)}." if near else ""
    return f"metric {name!r} is not known.{hint} Or name a function: python:package.module:function."
