"""What a verdict is made from: the measurements of every engine, and their exact JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from tasks.artifacts import Facts, Rule, Verdict
from tasks.errors import InputError

Rounds = Sequence[Sequence[float]]
CANDIDATE, BASELINE, CHAMPION = "candidate", "baseline", "champion"
UNMEASURED = "champion_unmeasured"  # in the facts: why a champion that there is could not be measured


@dataclass(frozen=True)
class Measured:
    """What was measured on one engine; None where it was not.

    `scores`: one per example, the metric is their mean. Otherwise `predictions`, one per example, as the
    metric takes them. `latency`: batch size -> rounds -> seconds of each call; round i of every engine ran
    side by side.
    `parity`: the least cosine between the engine's outputs and its own unlowered reference's.
    """

    proved: str
    scores: Sequence[float | None] | None = None
    predictions: Sequence[Any] | None = None
    bytes: int | None = None
    peak_memory_bytes: int | None = None
    latency: dict[int, Rounds] = field(default_factory=dict)
    parity: float | None = None
    quantized_share: float | None = None
    sparse_share: float | None = None


@dataclass(frozen=True)
class Measurements:
    """Candidate, baseline and perhaps champion, on the same examples: `engines` has them by these names.

    `slices`: column -> its value for each example. `references`: needed where engines carry predictions.
    `previous`: candidate and champion on the champion's own held-out rows, with their own references.
    """

    metric: str
    engines: dict[str, Measured]
    slices: dict[str, Sequence[Any]] = field(default_factory=dict)
    references: Sequence[Any] | None = None
    facts: Facts = field(default_factory=dict)
    previous: Measurements | None = None


def measurements_to_json(measurements: Measurements) -> str:
    """Canonical JSON, exact for every float; what is not finite becomes null."""
    return _canonical(_plain(_record(measurements)))


def _record(measurements: Measurements) -> dict[str, Any]:
    """Without `previous` where there is none: the bytes are those of measurements that never had it."""
    value = asdict(replace(measurements, previous=None))
    del value["previous"]
    return value | ({"previous": _record(measurements.previous)} if measurements.previous else {})


def measurements_from_json(text: str | bytes) -> Measurements:
    """The measurements that were logged."""
    return _measurements(json.loads(text))


def _measurements(value: dict[str, Any]) -> Measurements:
    for engine in value["engines"].values():
        engine["latency"] = {int(batch): rounds for batch, rounds in engine["latency"].items()}
    value["engines"] = {name: Measured(**engine) for name, engine in value["engines"].items()}
    previous = _measurements(value["previous"]) if value.get("previous") else None
    return Measurements(**{**value, "previous": previous})


def verdict_bytes(verdict: Verdict) -> bytes:
    """Canonical JSON: the same verdict is the same bytes."""
    return _canonical(_plain({**asdict(verdict), "reasons": verdict.reasons})).encode()


def verdict_from_bytes(data: str | bytes) -> Verdict:
    """The verdict that `verdict_bytes` wrote."""
    value = json.loads(data)
    rules = [
        {**rule, "interval": tuple(rule["interval"]) if rule["interval"] else None} for rule in value["rules"]
    ]
    return Verdict(value["passed"], tuple(Rule(**rule) for rule in rules))


def same_verdict(one: bytes, other: bytes) -> bool:
    """Whether two verdicts say the same of every rule: outcome, value, limit and interval.

    Their words may differ: another release may put it otherwise.
    """
    first, second = (
        (
            found.passed,
            [(rule.name, rule.passed, rule.value, rule.limit, rule.interval) for rule in found.rules],
        )
        for found in map(verdict_from_bytes, (one, other))
    )
    return first == second


def latency_summary(rounds: Rounds, batch: int) -> dict[str, float]:
    """p50 and p99 of all calls in seconds, no outlier dropped, and examples a second."""
    calls = np.array([call for calls in rounds for call in calls], dtype=float)
    p50, p99 = (float(x) for x in np.quantile(calls, [0.5, 0.99]))
    return {
        "p50": p50,
        "p99": p99,
        "throughput": float(batch * len(calls) / calls.sum()),
        "rounds": len(rounds),
    }


def examples(engine: Measured) -> Sequence[Any]:
    """One result per example: scores, or else predictions; empty when there is neither."""
    return engine.scores if engine.scores is not None else engine.predictions or ()


def examples_missing(measurements: Measurements, names: tuple[str, ...]) -> str:
    """Why the metric of these engines cannot be had; empty when it can."""
    for name in names:
        engine = measurements.engines[name]
        values = examples(engine)
        if not values:
            return f"the {name} has no result per example"
        if engine.scores is None and measurements.references is None:
            return "the references are missing"
        bad = sum(x is None for x in np.array(values, dtype=object).ravel())
        if bad:
            return f"{bad} of the {name}'s {len(values)} results are not finite"
    return ""


def check(measurements: Measurements, metric: str) -> None:
    """The measurements must hold the engines, the metric and the same examples."""
    absent = [name for name in (CANDIDATE, BASELINE) if name not in measurements.engines]
    if absent:
        raise InputError(
            f"measurements: no {' and no '.join(absent)}; they have {sorted(measurements.engines)}"
        )
    for part in (measurements, measurements.previous):
        if part is not None:
            _fits(part, metric)


def _fits(measurements: Measurements, metric: str) -> None:
    if measurements.metric != metric:
        raise InputError(f"measurements are of {measurements.metric!r}, the gate asks for {metric!r}")
    columns = {f"engine {name}": examples(engine) for name, engine in measurements.engines.items()}
    columns |= {f"slice {name}": values for name, values in measurements.slices.items()}
    lengths = {name: len(values) for name, values in columns.items() if values}
    if len(set(lengths.values())) > 1:
        raise InputError(f"measurements are not of the same examples: {lengths}")


def rounded(rule: Rule) -> Rule:
    """Ten significant digits: what differs beyond them is the machine's summation order."""
    return Rule(**_significant(asdict(rule)))


def _significant(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.10g}")
    if isinstance(value, dict):
        return {key: _significant(x) for key, x in value.items()}
    return type(value)(_significant(x) for x in value) if isinstance(value, (list, tuple)) else value


def _plain(value: Any) -> Any:
    """As JSON has it: arrays and tuples become lists, what is not finite null, keys strings."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(x) for key, x in value.items()}
    return [_plain(x) for x in value] if isinstance(value, (list, tuple)) else value


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
