"""Decide: gather what was measured on every engine and let the gate judge it.

python -m flows optimize RECIPE     (stage `gate`)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from recipes.gate import Gate
from tasks import benchmark, evaluate, load, store
from tasks.artifacts import Dataset, Engine, Metrics, Verdict
from tasks.gate import judge
from tasks.measurements import UNMEASURED, Measured, Measurements, measurements_to_json, verdict_bytes
from tasks.stage import stage


@stage(uses=("scipy", "numpy", "scikit-learn"), name="gate", timeout_seconds=1800)
def decide(
    engines: dict[str, Engine],
    scores: dict[str, Metrics],
    timing: Metrics,
    dataset: Dataset,
    section: Gate,
    content: str,
    unmeasured: str | None,
    previous: dict[str, Metrics] | None = None,
) -> tuple[Verdict, Metrics]:
    """The verdict, and the measurements it can be recomputed from (`measurements.json`, `verdict.json`).

    `content` is the fingerprint of a metric of the user's own; `unmeasured` says why a champion that there
    is could not be measured; `previous` has the metric of candidate and champion on the champion's own
    held-out rows, for `max_forgetting`.
    """
    found = measurements(engines, scores, timing, dataset, section.metric, unmeasured, previous)
    verdict = judge(found, section)
    with store.staging() as folder:
        (folder / "measurements.json").write_text(measurements_to_json(found))
        (folder / "verdict.json").write_bytes(verdict_bytes(verdict))
        return verdict, Metrics({}, store.commit(folder))


def measurements(
    engines: dict[str, Engine],
    scores: dict[str, Metrics],
    timing: Metrics,
    dataset: Dataset,
    metric: str,
    unmeasured: str | None,
    previous: dict[str, Metrics] | None = None,
) -> Measurements:
    """Everything the gate may look at, per engine: candidate, baseline and perhaps champion."""
    table = load.rows(dataset, "test")
    kept = {
        name: column for name, column in table.items() if name not in (load.column(dataset.type), "label")
    }
    slices: dict[str, Sequence[Any]] = {**kept}
    if "label" in table:
        slices["label"] = [dataset.labels[k] for k in table["label"]]
    rounds = benchmark.loaded(timing)
    per_row = {name: evaluate.loaded(found) for name, found in scores.items()}
    measured = {}
    for name, engine in engines.items():
        proof = engine.facts.get("proof", {})
        measured[name] = replace(
            _results(engine, per_row[name]),
            bytes=engine.bytes,
            peak_memory_bytes=int(timing.values[f"{name}_peak_memory"]),
            latency=rounds[name],
            parity=scores[name].values.get("parity"),
            quantized_share=proof.get("quantized_share"),
            sparse_share=proof.get("sparse_share"),
        )
    references = per_row["candidate"]["references"]
    facts = {"labels": list(dataset.labels), UNMEASURED: unmeasured}
    earlier = _previous(engines, previous, metric) if previous else None
    return Measurements(metric, measured, slices, references, facts, earlier)


def _previous(engines: dict[str, Engine], scores: dict[str, Metrics], metric: str) -> Measurements:
    """The same engines on the previous held-out rows; only the metric is judged there."""
    per_row = {name: evaluate.loaded(found) for name, found in scores.items()}
    measured = {name: _results(engines[name], found) for name, found in per_row.items()}
    return Measurements(metric, measured, references=next(iter(per_row.values()))["references"])


def _results(engine: Engine, per_row: dict[str, Any]) -> Measured:
    """One result per example: scores where the metric is their mean, else predictions."""
    scores = per_row["scores"]
    return Measured(engine.proved, scores, per_row["predictions"] if scores is None else None)
