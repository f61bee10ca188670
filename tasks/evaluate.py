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
from tasks.engines.common import Session
from tasks.errors import InputError
from tasks.running import opened
from tasks.stage import stage

BATCH = 32
PARITY_ROWS = 64
TAKEN = ("label", "probability")


def check(gate: Gate, classes: int) -> None:
    """Raise InputError for a metric that does not exist or cannot judge so many classes."""
    how = metrics.metric(gate.metric)
    if how.takes not in TAKEN:
        raise InputError(
            f"gate.metric: {gate.metric} takes a {how.takes}; a classifier gives {' and '.join(TAKEN)}"
        )
    for key in ("max_drop", "max_forgetting"):
        if how.points and (getattr(gate, key) or 0) >= 1:
            raise InputError(f"gate.{key}: {getattr(gate, key)} is more than all of it; 2 points are 0.02")
    references = np.arange(2 * classes) % classes
    try:
        how.value(_predictions(np.eye(classes)[references], how.takes), references)
    except Exception as error:  # scikit-learn's and the user's own functions raise what they like
        raise InputError(f"gate.metric: {gate.metric} cannot judge {classes} classes: {error}") from error


@stage(
    uses=("onnxruntime", "scikit-learn", "tokenizers", "numpy"),
    name="evaluate",
    gpu=True,
    timeout_seconds=6 * 3600,
)
def evaluate(
    engine: Engine, model: OnnxModel | None, dataset: Dataset, metric: str, content: str, host: str
) -> Metrics:
    """The metric over the test rows, each row's prediction and score, and parity with the ONNX it came from.

    A row whose outputs are NaN or infinite has neither, and the metric is then left out: the gate refuses
    such an engine. `model` is that ONNX (None for a champion, whose parity was judged when it was made);
    `content` is the fingerprint of a metric of the user's own.
    """
    how = metrics.metric(metric)
    encoded, labels = batches.examples(dataset, "test", store.path(engine.preprocessor))
    with opened(engine) as session:
        logits = run(session, dataset.type, encoded)
    finite = np.isfinite(logits).all(axis=1)
    predictions = _predictions(np.where(finite[:, None], logits, 0.0), how.takes)
    per_row = metrics.scores(how, predictions, labels)
    values = {}
    if finite.all():
        values[metric] = float(np.mean(per_row) if per_row is not None else how.value(predictions, labels))
    if model is not None and finite[:PARITY_ROWS].all():
        values["parity"] = _parity(model, dataset, engine, logits, encoded)
    with store.staging() as folder:
        logged = {
            "predictions": _known(predictions.tolist(), finite),
            "references": labels.tolist(),
            "scores": None if per_row is None else _known(list(per_row), finite),
        }
        (folder / "scores.json").write_text(json.dumps(logged))
        blob = store.commit(folder)
    facts = {"rows": len(labels), "metric": metric, "not_finite": int((~finite).sum())}
    return Metrics(values, blob, facts)


def _known(rows: list[Any], finite: np.ndarray) -> list[Any]:
    """The rows, with None for every value of one whose outputs were NaN or infinite."""
    gone = [None] * len(rows[0]) if isinstance(rows[0], list) else None
    return [row if known else gone for row, known in zip(rows, finite, strict=True)]


def run(session: Session, task: str, encoded: list[types.Example]) -> np.ndarray:
    """Logits of shape (rows, classes), in the rows' order; rows of like length run together."""
    collate, size = types.load(task).collate, min(BATCH, getattr(session, "max_batch", BATCH))
    order = sorted(range(len(encoded)), key=lambda k: max(array.size for array in encoded[k].values()))
    logits: list[Any] = [None] * len(encoded)
    for start in tqdm(range(0, len(order), size), desc="evaluate", unit="batch"):
        chosen = order[start : start + size]
        (output,) = session.run(collate([encoded[k] for k in chosen])).values()
        for k, row in zip(chosen, output, strict=True):
            logits[k] = row
    return np.stack(logits).astype(np.float64)


def _parity(
    model: OnnxModel, dataset: Dataset, engine: Engine, logits: np.ndarray, encoded: list[types.Example]
) -> float:
    """The least cosine over some rows between the engine and the unoptimized ONNX it was built from."""
    from tasks.engines import onnxruntime

    count = min(PARITY_ROWS, len(encoded))
    with onnxruntime.open(store.path(model.blob), None, level="disabled") as reference:
        expected = run(reference, dataset.type, encoded[:count])
    ours = logits[:count]
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(expected, axis=1)
    return float(((ours * expected).sum(axis=1) / norms).min())


def _predictions(logits: np.ndarray, takes: str) -> np.ndarray:
    if takes == "label":
        return np.asarray(logits.argmax(axis=1))
    return types.probabilities(logits)


def loaded(scores: Metrics) -> dict[str, list[Any] | None]:
    """What `scores.json` holds: predictions, references, scores."""
    assert scores.blob is not None
    content: dict[str, list[Any] | None] = json.loads((store.path(scores.blob) / "scores.json").read_text())
    return content
