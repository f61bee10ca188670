"""Decide: gather what was measured on every engine and let the gate judge it.

python -m flows optimize RECIPE     (stage `gate`)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recipes.gate import Gate
from tasks import benchmark, evaluate, load, store
from tasks.artifacts import Dataset, Engine, Metrics, Verdict
from tasks.gate import UNMEASURED, judge
from tasks.measurements import Measured, Measurements, measurements_to_json, verdict_bytes
from tasks.stage import stage


@stage(uses=("scipy", "numpy", "scikit-learn"), name="gate", timeout_seconds=1800)
def decide(
    engines: dict[str, Engine],
    scores: dict[str, Metrics],
    timing: Metrics,
    dataset: Dataset,
    section: Gate,
    unmeasured: str | None,
) -> tuple[Verdict, Metrics]:
    """The verdict, and the measurements it can be recomputed from (`measurements.json`, `verdict.json`).

    `unmeasured` says why a champion that there is could not be measured.
    """
    found = measurements(engines, scores, timing, dataset, section.metric, unmeasured)
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
) -> Measurements:
    """Everything the gate may look at, per engine: candidate, baseline and perhaps champion."""
    table = load.rows(dataset, "test")
    kept = {name: column for name, column in table.items() if name not in ("text", "image", "label")}
    slices: dict[str, Sequence[Any]] = {"label": [dataset.labels[k] for k in table["label"]], **kept}
    rounds = benchmark.loaded(timing)
    per_row = {name: evaluate.loaded(found) for name, found in scores.items()}
    measured = {}
    for name, engine in engines.items():
        means = per_row[name]["scores"] is not None
        proof = engine.facts.get("proof", {})
        measured[name] = Measured(
            proved=engine.proved,
            scores=per_row[name]["scores"],
            predictions=None if means else per_row[name]["predictions"],
            bytes=engine.bytes,
            peak_memory_bytes=int(timing.values[f"{name}_peak_memory"]),
            latency=rounds[name],
            parity=scores[name].values.get("parity"),
            quantized_share=proof.get("quantized_share"),
            sparse_share=proof.get("sparse_share"),
        )
    references = per_row["candidate"]["references"]
    facts = {"labels": list(dataset.labels), UNMEASURED: unmeasured}
    return Measurements(metric, measured, slices, references, facts)
