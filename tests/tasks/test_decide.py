from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from recipes.gate import Gate
from tasks import load, store
from tasks.artifacts import Blob, Dataset, Engine, Metrics, Plan
from tasks.decide import decide
from tasks.measurements import measurements_from_json


def engine(name: str) -> Engine:
    blob = Blob(name, 100)
    return Engine(Plan(blob, "graph", "onnxruntime", "1", "cpu"), None, blob, "fp32", "executed")


def kept(file: str, content: Any) -> Blob:
    with store.staging() as folder:
        (folder / file).write_text(json.dumps(content))
        return store.commit(folder)


def scored(references: list[int], wrong: int) -> Metrics:
    """What `evaluate` keeps: predictions, the first `wrong` of them off."""
    predictions = [(label + (k < wrong)) % 10 for k, label in enumerate(references)]
    scores = (np.array(predictions) == references).astype(float).tolist()
    logged = {"predictions": predictions, "references": references, "scores": scores}
    return Metrics({"accuracy": float(np.mean(scores))}, kept("scores.json", logged))


def timed(names: list[str]) -> Metrics:
    rounds = {name: {"1": [[0.001] * 3] * 6} for name in names}
    return Metrics({f"{name}_peak_memory": 1e6 for name in names}, kept("latency.json", rounds))


def test_the_previous_rows_are_judged_and_logged(image: Any) -> None:
    dataset: Dataset = image.dataset
    labels = load.rows(dataset, "test")["label"]
    earlier = [k % 10 for k in range(400)]
    names = ["candidate", "baseline", "champion"]
    engines, scores = {name: engine(name) for name in names}, {name: scored(labels, 3) for name in names}
    previous = {"candidate": scored(earlier, 40), "champion": scored(earlier, 4)}
    section = Gate(max_drop=0.05, max_forgetting=0.08)
    verdict, logged = decide.fn(engines, scores, timed(names), dataset, section, "", None, previous)
    assert [rule.name for rule in verdict.rules if not rule.passed] == ["forgetting"]
    assert "fell 9.0 points against the champion" in verdict.reasons[0]
    assert logged.blob is not None
    text = Path(store.path(logged.blob), "measurements.json").read_text()
    found = measurements_from_json(text).previous
    assert found is not None
    assert found.references == earlier
    assert sum(found.engines["candidate"].scores or ()) == 360
    without, _ = decide.fn(engines, scores, timed(names), dataset, section, "", None)
    assert "they were not measured" in without.reasons[0]


def test_a_corrected_metric_function_is_judged_again() -> None:
    """Its predictions, and so the file that holds them, are the same as before."""
    blob, data = (
        Blob("a" * 64, 3),
        Dataset(Blob("b" * 64, 3), "text-classification", ("no", "yes"), {"test": 2}),
    )
    engines, timing = {"candidate": engine("candidate")}, Metrics({"candidate_peak_memory": 1.0}, blob)
    section = Gate(metric="python:mine:score", max_drop=0.1)

    def key(value: float, content: str, parity: float = 1.0) -> str:
        scores = {"candidate": Metrics({section.metric: value, "parity": parity}, blob)}
        return decide.key(engines, scores, timing, data, section, content, None)

    assert key(0.5, "before") == key(0.5, "before") != key(0.5, "after")
    assert key(0.5, "before") != key(0.6, "before") != key(0.6, "before", parity=0.9)
