"""Drift: new inputs against the calibration rows, by what the engine does with them.

python -m flows watch MODEL --data SOURCE     (stage `survey`)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from recipes.compress import MICROSCALED
from recipes.schema import Drift
from tasks import batches, store, types
from tasks.artifacts import Dataset, Engine, Metrics, OnnxModel
from tasks.engines import together
from tasks.engines.common import Session
from tasks.errors import InputError
from tasks.running import opened
from tasks.stage import stage

BATCH, BINS = 32, 10
CHANCE = 0.001  # of a shift being told where there is none


@dataclass(frozen=True)
class Drifted:
    """What was seen, against which limits, and what it asks for: recalibrate, retrain, or nothing.

    `chance` is what each of `psi` reaches where nothing has moved.
    """

    rows: int
    overflow: dict[str, float]
    before: dict[str, float]
    psi: dict[str, float]
    chance: dict[str, float]
    asks: tuple[str, ...]
    reasons: tuple[str, ...]


@stage(uses=("onnxruntime", "numpy", "tokenizers"), name="survey", gpu=True, timeout_seconds=6 * 3600)
def survey(engine: Engine, model: OnnxModel | None, dataset: Dataset, part: str, host: str) -> Metrics:
    """One pass: each row's size and traits (class, score), and per quantizer the share of values at its ends.

    `model` is the ONNX to count in where the engine's runtime cannot (TensorRT); it runs on ONNX Runtime.
    """
    preprocessor = store.path(engine.preprocessor)
    kind = types.load(dataset.type)
    encoded = batches.inputs(dataset, part, preprocessor)
    order = sorted(range(len(encoded)), key=lambda k: max(array.size for array in encoded[k].values()))
    seen: dict[str, list[float]] = {"size": []}
    ends: dict[str, float] = {}
    total = 0
    with _counting(engine, model) as session:
        for start in range(0, len(order), BATCH):
            chosen = [encoded[k] for k in order[start : start + BATCH]]
            feed = kind.collate(chosen)
            outputs = session.run(feed)
            total += _add(outputs, feed, ends)
            for example, output in zip(chosen, types.joined(kind, outputs), strict=True):
                traits = {"size": kind.size(example), **kind.traits(kind.row(output, example))}
                for trait, value in traits.items():
                    seen.setdefault(trait, []).append(value)
    with store.staging() as folder:
        content = {**seen, "overflow": {name: share / total for name, share in sorted(ends.items())}}
        (folder / "seen.json").write_text(json.dumps(content))
        return Metrics({"rows": float(len(encoded))}, store.commit(folder))


def _counting(engine: Engine, model: OnnxModel | None) -> AbstractContextManager[Session]:
    from tasks.engines.onnxruntime_ranges import counting

    if engine.format in MICROSCALED:  # quantized as they come: no ONNX Runtime runs it, no range ends
        return opened(engine)
    assert model or engine.plan.runtime == "onnxruntime", "another runtime's engine is counted in its ONNX"
    plan = store.path(model.blob if model else engine.plan.blob)
    weights = store.path(engine.weights) if engine.weights and not model else None

    def one(part: str) -> AbstractContextManager[Session]:
        return counting(plan / part, together.below(weights, part) if part else weights)

    parts = together.parts_of(plan)
    return together.opened(parts, one) if parts else one("")


def _add(outputs: types.Example, feed: types.Example, ends: dict[str, float]) -> int:
    """Shares are weighed by how many input values the batch had, which is returned."""
    from tasks.engines.onnxruntime_ranges import shares

    weight = int(next(iter(feed.values())).size)
    for name, share in shares(outputs).items():
        ends[name] = ends.get(name, 0.0) + share * weight
    return weight


def check_rows(new: Dataset, section: Drift) -> None:
    """Raise InputError where the new inputs are fewer than a drift can be told by."""
    if (rows := new.rows["inputs"]) < section.min_rows:
        raise InputError(f"{rows} rows are too few to tell a drift (drift.min_rows: {section.min_rows})")


def compare(reference: Metrics, new: Metrics, section: Drift) -> Drifted:
    """What the new rows ask for, given what the calibration rows were like."""
    old, now = loaded(reference), loaded(new)
    index = {name: psi(old[name], now[name]) for name in old if name != "overflow"}
    chance = {name: psi_by_chance(old[name], now[name]) for name in index}
    # Calibration rows reach the end, too: whatever was largest there, and every value equal to it.
    excess = {name: share - old["overflow"].get(name, 0.0) for name, share in now["overflow"].items()}
    over = {name: more for name, more in excess.items() if more > section.max_overflow}
    reasons = []
    if over:
        worst = max(over, key=lambda name: over[name])
        reasons.append(
            f"{len(over)} of {len(excess)} quantizers are past their range: {worst} has "
            f"{now['overflow'][worst]:.1%} of its values at the end, {over[worst]:.1%} more than in "
            f"calibration, allowed {section.max_overflow:.1%}"
        )
    shifted = {name: value for name, value in index.items() if value > max(section.max_psi, chance[name])}
    for name, value in shifted.items():
        reasons.append(
            f"the {name}s have moved: PSI {value:.2f}, allowed {section.max_psi:.2f}, "
            f"by chance up to {chance[name]:.2f}"
        )
    asks = ("recalibrate",) * bool(over) + ("retrain",) * bool(shifted)
    return Drifted(len(now["size"]), now["overflow"], old["overflow"], index, chance, asks, tuple(reasons))


def psi(reference: Sequence[float], new: Sequence[float]) -> float:
    """Population stability index over the reference's deciles (or its values, where they are fewer).

    0 is no difference; above 0.2 is usually called a shift. A bin that only one side has counts as half a row
    of the other.
    """
    counts = np.maximum(_counts(reference, new), 0.5)
    before, after = counts / counts.sum(axis=1, keepdims=True)
    return float(((after - before) * np.log(after / before)).sum())


def psi_by_chance(reference: Sequence[float], new: Sequence[float]) -> float:
    """What the index of two samples of one distribution exceeds at rate CHANCE.

    Then it is 1/N + 1/M times a chi-squared number with a degree of freedom less than there are bins
    (Yurdakul and Naranjo, Journal of Risk Model Validation 14 (2020) 89-100).
    """
    from scipy import stats

    freedom = max(1, _counts(reference, new).shape[1] - 1)
    return float((1 / len(reference) + 1 / len(new)) * stats.chi2.isf(CHANCE, freedom))


def _counts(reference: Sequence[float], new: Sequence[float]) -> np.ndarray:
    """How many values of either lie in each bin that has any: shape (2, bins)."""
    old, now = np.asarray(reference, float), np.asarray(new, float)
    edges = _edges(old)
    counts = np.array([np.bincount(np.searchsorted(edges, x), minlength=len(edges) + 1) for x in (old, now)])
    return counts[:, counts.any(axis=0)]


def _edges(old: np.ndarray) -> np.ndarray:
    """Upper ends of bins. Few values, and one that several deciles fall on, have a bin each: what is new lies
    beside them, not among them."""
    values = np.unique(old)
    if len(values) <= BINS:
        return np.union1d(values, np.nextafter(values, -np.inf))
    deciles, times = np.unique(np.quantile(old, np.linspace(0, 1, BINS + 1)[1:-1]), return_counts=True)
    return np.union1d(deciles, np.nextafter(deciles[times > 1], -np.inf))


def loaded(seen: Metrics) -> dict[str, Any]:
    """What `seen.json` holds."""
    assert seen.blob is not None
    content: dict[str, Any] = json.loads((store.path(seen.blob) / "seen.json").read_text())
    return content
