"""Evaluate an engine, the engine itself, on every held-out row with the recipe's metric.

python -m flows optimize RECIPE     (stage `evaluate`)
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from tqdm import tqdm

from recipes.gate import Gate
from tasks import batches, metrics, store, types
from tasks.artifacts import Dataset, Engine, Metrics, OnnxModel
from tasks.engines import open_engine
from tasks.engines.common import Session
from tasks.errors import InputError
from tasks.running import opened
from tasks.stage import stage

BATCH = 32
PARITY_ROWS = 64


def check(gate: Gate, task: str, classes: int) -> None:
    """Raise InputError for a metric that does not exist or cannot judge this task with so many classes."""
    how, kind = metrics.metric(gate.metric), types.load(task)
    if how.takes not in kind.TAKES:
        raise InputError(
            f"gate.metric: {gate.metric} takes a {how.takes}; {task} gives {' and '.join(kind.TAKES)}"
        )
    for key in ("max_drop", "max_forgetting"):
        if how.points and (getattr(gate, key) or 0) >= 1:
            raise InputError(f"gate.{key}: {getattr(gate, key)} is more than all of it; 2 points are 0.02")
    rows, references = kind.trial(classes)
    try:
        predictions = kind.predictions(rows, how.takes)
        how.value(predictions, references)
        metrics.scores(how, predictions, references)
    except Exception as error:  # scikit-learn's and the user's own functions raise what they like
        what = f"{classes} classes" if classes else task
        raise InputError(f"gate.metric: {gate.metric} cannot judge {what}: {error}") from error


@stage(
    uses=("onnxruntime", "scikit-learn", "tokenizers", "numpy"),
    name="evaluate",
    gpu=True,
    timeout_seconds=6 * 3600,
)
def evaluate(
    engine: Engine,
    model: OnnxModel | None,
    dataset: Dataset,
    metric: str,
    content: str,
    host: str,
    baseline: Engine | None = None,
) -> Metrics:
    """The metric over the test rows, each row's prediction and score, and parity with the ONNX it came from.

    A row whose outputs are NaN or infinite has neither, and the metric is then left out: the gate refuses
    such an engine. `model` is that ONNX (None for a champion, whose parity was judged when it was made);
    `content` is the fingerprint of a metric of the user's own; `baseline` is the engine to compare with
    where rows have no labels.
    """
    how, kind = metrics.metric(metric), types.load(dataset.type)
    encoded, labels = batches.examples(dataset, "test", store.path(engine.preprocessor))
    with opened(engine) as session:
        rows = run(session, dataset.type, encoded)
    finite = np.array([bool(np.isfinite(row).all()) for row in rows])
    predictions = kind.predictions(_without(rows, finite), how.takes)
    references = kind.references(encoded, labels, _baseline(baseline, dataset))
    per_row = metrics.scores(how, predictions, references)
    values = {}
    if finite.all():
        values[metric] = float(
            np.mean(per_row) if per_row is not None else how.value(predictions, references)
        )
    if model is not None and finite[:PARITY_ROWS].all():
        values["parity"] = _parity(model, dataset, rows, encoded)
    # Scores judge; vectors beside them would be most of what a run keeps.
    told = how.takes not in ("vector", "pair") or per_row is None
    with store.staging() as folder:
        logged = {
            "predictions": _known(predictions.tolist(), finite) if told else None,
            "references": references.tolist() if told else None,
            "scores": None if per_row is None else _known(list(per_row), finite),
        }
        (folder / "scores.json").write_text(json.dumps(logged))
        blob = store.commit(folder)
    facts = {"rows": len(rows), "metric": metric, "not_finite": int((~finite).sum())}
    return Metrics(values, blob, facts)


def _baseline(engine: Engine | None, dataset: Dataset) -> list[np.ndarray] | None:
    """The baseline's rows, where the task has no labels."""
    if engine is None:
        return None
    encoded, _ = batches.examples(dataset, "test", store.path(engine.preprocessor))
    with opened(engine) as session:
        return run(session, dataset.type, encoded)


def _without(rows: list[np.ndarray], finite: np.ndarray) -> list[np.ndarray]:
    """The rows, with zeros for those that are not finite."""
    return [row if known else np.zeros_like(row) for row, known in zip(rows, finite, strict=True)]


def _known(rows: list[Any], finite: np.ndarray) -> list[Any]:
    """The rows, with None for every value of one whose outputs were NaN or infinite."""
    gone = [None] * len(rows[0]) if isinstance(rows[0], list) else None
    return [row if known else gone for row, known in zip(rows, finite, strict=True)]


def run(session: Session, task: str, encoded: list[types.Example]) -> list[np.ndarray]:
    """What is kept of each example's output, in the rows' order; rows of like length run together."""
    kind, size = types.load(task), min(BATCH, getattr(session, "max_batch", BATCH))
    order = sorted(range(len(encoded)), key=lambda k: max(array.size for array in encoded[k].values()))
    rows: list[Any] = [None] * len(encoded)
    for start in tqdm(range(0, len(order), size), desc="evaluate", unit="batch"):
        chosen = order[start : start + size]
        output = types.joined(kind, session.run(kind.collate([encoded[k] for k in chosen])))
        for k, found in zip(chosen, output, strict=True):
            rows[k] = kind.row(found, encoded[k]).astype(np.float64)
    return rows


def _parity(
    model: OnnxModel, dataset: Dataset, rows: list[np.ndarray], encoded: list[types.Example]
) -> float:
    """The least cosine over some rows, and over the graphs of several, between the engine and the unoptimized
    ONNX that it was built from."""
    count, parts = min(PARITY_ROWS, len(encoded)), len(types.parts(types.load(dataset.type)))
    with open_engine("onnxruntime", store.path(model.blob), None, level="disabled") as reference:
        expected = run(reference, dataset.type, encoded[:count])
    return min(
        _cosine(*halves)
        for pair in zip(rows[:count], expected, strict=True)
        for halves in zip(*(np.split(row, parts) for row in pair), strict=True)
    )


def _cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    """0 where only one is all zeros: NaN would be no minimum, and such a row no difference."""
    if np.array_equal(ours, theirs):  # a text of one token has no loss at all
        return 1.0
    norms = float(np.linalg.norm(ours) * np.linalg.norm(theirs))
    return float(ours @ theirs) / norms if norms else 0.0


def loaded(scores: Metrics) -> dict[str, list[Any] | None]:
    """What `scores.json` holds: predictions, references, scores."""
    assert scores.blob is not None
    content: dict[str, list[Any] | None] = json.loads((store.path(scores.blob) / "scores.json").read_text())
    return content
