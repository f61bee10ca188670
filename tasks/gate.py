"""The gate: from measurements to a verdict, by small pure rules that each explain themselves in a sentence.

`judge` needs nothing but what was logged, so every verdict can be recomputed, byte for byte.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from recipes.gate import Gate
from tasks import statistics
from tasks.artifacts import Rule, Verdict
from tasks.errors import InputError
from tasks.measurements import (
    Measured,
    Measurements,
    Rounds,
    check,
    examples,
    examples_missing,
    latency_summary,
    measurements_from_json,
    measurements_to_json,
    rounded,
    verdict_bytes,
    verdict_from_bytes,
)
from tasks.metrics import Metric, metric
from tasks.statistics import Comparison

__all__ = [
    "Measured",
    "Measurements",
    "judge",
    "latency_summary",
    "measurements_from_json",
    "measurements_to_json",
    "verdict_bytes",
    "verdict_from_bytes",
]

CANDIDATE, BASELINE, CHAMPION = "candidate", "baseline", "champion"
MIN_ROUNDS = 6  # fewer cannot give a 95 % interval of a median, however they fall
UNMEASURED = "champion_unmeasured"  # in a measurement's facts: why a champion could not be measured


def judge(measurements: Measurements, gate: Gate) -> Verdict:
    """Every rule of the section on these measurements; the same measurements give the same verdict."""
    text = measurements_to_json(measurements)
    measurements = measurements_from_json(text)
    check(measurements, gate.metric)
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    rules = [evidence(measurements.engines[CANDIDATE])]
    if why := measurements.facts.get(UNMEASURED):
        rules.append(_missing("champion", "the comparison with the champion", why, gate))
    rules += [
        *quality(measurements, gate, seed),
        *floors(measurements, gate, seed),
        *sizes(measurements, gate),
    ]
    rules += [*latencies(measurements, gate, seed), *shares(measurements, gate)]
    rules += finite(measurements.engines[CANDIDATE])
    rules = [rounded(rule) for rule in rules]
    return Verdict(all(rule.passed for rule in rules), tuple(rules))


def evidence(candidate: Measured) -> Rule:
    """Only what ran here, on its target, can pass."""
    executed = candidate.proved == "executed"
    how = "ran on its target" if executed else f"did not run on its target (only {candidate.proved})"
    return Rule("evidence", executed, f"the candidate {how}", facts={"proved": candidate.proved})


def finite(candidate: Measured) -> Iterator[Rule]:
    """An engine that answers NaN or infinity never passes, whatever `on_missing` says."""
    rows = [row if isinstance(row, (list, tuple)) else (row,) for row in examples(candidate)]
    if bad := sum(None in row for row in rows):
        sentence = f"{bad} of the candidate's {len(rows)} outputs are NaN or infinite"
        yield Rule("finite", False, sentence, float(bad), 0.0)


def quality(measurements: Measurements, gate: Gate, seed: int) -> Iterator[Rule]:
    """The metric against each reference: its drop, its ratio, and whether the examples can tell."""
    if gate.max_drop is None and gate.min_ratio is None:
        return
    how = metric(gate.metric)
    for reference in _references(measurements):
        problem = examples_missing(measurements, (CANDIDATE, reference))
        if problem:
            yield _missing(
                f"{_word(how)}_vs_{reference}", f"{how.name} against the {reference}", problem, gate
            )
            continue
        found = _compare(measurements, reference, how, gate, seed)
        if gate.max_drop is not None:
            yield drop(found, how, reference, gate.max_drop, gate.confidence)
        if gate.min_ratio is not None:
            yield ratio(found, how, reference, gate)
        yield sensitivity(found, how, reference, len(examples(measurements.engines[CANDIDATE])), gate)


def drop(found: Comparison, how: Metric, reference: str, allowed: float, confidence: float) -> Rule:
    """The interval's worse end must be better than the allowed drop."""
    sign = 1 if how.higher_is_better else -1
    change = found.candidate - found.reference
    low, high = found.difference
    passed = (low if sign > 0 else -high) > -allowed
    unit = 100 if how.points else 1
    text = _texts([unit * x for x in (abs(change), low, high, allowed)])
    verb = "is unchanged" if change == 0 else f"{'rose' if change > 0 else 'fell'} {text[0]}"
    points = " points" if how.points and change else ""
    sentence = (
        f"{how.name} {verb}{points} against the {reference} "
        f"({_percent(confidence)} interval {text[1]} to {text[2]}), allowed {text[3]}"
    )
    facts = {**_bound(sign > 0, "points" if how.points else how.name), **found.facts}
    facts |= {"candidate": found.candidate, "reference": found.reference, "detectable": found.detectable}
    return Rule(f"{_word(how)}_vs_{reference}", passed, sentence, change, -sign * allowed, (low, high), facts)


def ratio(found: Comparison, how: Metric, reference: str, gate: Gate) -> Rule:
    """The interval of candidate / reference (reference / candidate where lower is better) must stay above."""
    name, limit = f"{_word(how)}_ratio_vs_{reference}", gate.min_ratio
    assert limit is not None
    if not (found.reference > 0 and found.candidate > 0 and all(map(math.isfinite, found.ratio))):
        return _missing(name, f"{how.name}'s ratio to the {reference}", "the metric is not positive", gate)
    value, (low, high) = found.candidate / found.reference, found.ratio
    if not how.higher_is_better:
        value, low, high = 1 / value, 1 / high, 1 / max(low, 1e-9)
    ends = (max(low, 0.0), high)
    text = _texts([value, *ends, limit], 4)
    sentence = (
        f"{how.name} is {text[0]} of the {reference}'s "
        f"({_percent(gate.confidence)} interval {text[1]} to {text[2]}), at least {text[3]}"
    )
    return Rule(name, ends[0] > limit, sentence, value, limit, ends, _bound(True, "metric ratio"))


def sensitivity(found: Comparison, how: Metric, reference: str, n: int, gate: Gate) -> Rule:
    """Whether these examples can tell the allowed drop from noise."""
    limits = [gate.max_drop, None if gate.min_ratio is None else (1 - gate.min_ratio) * abs(found.reference)]
    allowed = min(limit for limit in limits if limit is not None)
    coarse = found.detectable > allowed
    unit, points = (100, " points") if how.points else (1, "")
    text = _texts([unit * found.detectable, unit * allowed], plus=False)
    sentence = (
        f"{n} examples can tell a drop of {text[0]}{points} of {how.name} from noise, allowed {text[1]}"
    )
    if coarse:
        sentence += ": too coarse, take more examples or allow more" + (
            " (warning)" if gate.on_coarse == "warn" else ""
        )
    passed = not coarse or gate.on_coarse == "warn"
    name = f"{_word(how)}_sensitivity_vs_{reference}"
    return Rule(name, passed, sentence, found.detectable, allowed, facts={"examples": n, "coarse": coarse})


def floors(measurements: Measurements, gate: Gate, seed: int) -> Iterator[Rule]:
    """The candidate's metric on each named slice: the interval's lower end must reach the floor."""
    how = metric(gate.metric)
    for column, values in sorted(gate.floors.items()):
        for value, limit in sorted(values.items()):
            name, what = f"floor_{column}_{value}", f"{how.name} where {column} is {value}"
            rows = [i for i, x in enumerate(measurements.slices.get(column, ())) if str(x) == value]
            problem = examples_missing(measurements, (CANDIDATE,))
            problem = problem or ("" if rows else "no example is in this slice")
            if problem:
                yield _missing(name, what, problem, gate)
            else:
                yield floor(name, what, measurements, how, np.array(rows), limit, gate, seed)


def floor(
    name: str,
    what: str,
    measurements: Measurements,
    how: Metric,
    rows: Any,
    limit: float,
    gate: Gate,
    seed: int,
) -> Rule:
    """One slice against its floor (a ceiling, where lower is better)."""
    engine = measurements.engines[CANDIDATE]
    if engine.scores is not None:
        value, ends = statistics.mean_interval(np.array(engine.scores, float)[rows], gate.confidence, seed)
    else:
        value, ends = statistics.statistic_interval(
            lambda chosen: _value(measurements, CANDIDATE, how, rows[chosen]),
            len(rows),
            gate.confidence,
            seed,
        )
    passed = ends[0] >= limit if how.higher_is_better else ends[1] <= limit
    text = _texts([value, *ends, limit], 3, plus=False)
    facts = {**_bound(how.higher_is_better, "value"), "examples": len(rows)}
    sentence = (
        f"{what} is {text[0]} on {len(rows)} examples "
        f"({_percent(gate.confidence)} interval {text[1]} to {text[2]}), {facts['bound']} {text[3]}"
    )
    return Rule(name, passed, sentence, value, limit, ends, facts)


def sizes(measurements: Measurements, gate: Gate) -> Iterator[Rule]:
    """Bytes on disk and peak memory, of the baseline's."""
    candidate, baseline = measurements.engines[CANDIDATE], measurements.engines[BASELINE]
    wanted = (
        ("size", gate.max_size_ratio, candidate.bytes, baseline.bytes),
        ("memory", gate.max_memory_ratio, candidate.peak_memory_bytes, baseline.peak_memory_bytes),
    )
    for name, limit, ours, theirs in wanted:
        if limit is None:
            continue
        if not ours or not theirs:
            who = CANDIDATE if not ours else BASELINE
            yield _missing(name, name, f"the {who}'s was not measured", gate)
            continue
        value = ours / theirs
        sentence = (
            f"{name} is {value:.3f} of the baseline's ({ours:,} of {theirs:,} bytes), at most {limit:g}"
        )
        facts = {**_bound(False, "ratio"), "candidate": ours, "baseline": theirs}
        yield Rule(name, value <= limit, sentence, value, limit, facts=facts)


def latencies(measurements: Measurements, gate: Gate, seed: int) -> Iterator[Rule]:
    """Latency in paired rounds, against baseline and champion, at each batch size."""
    if gate.max_latency_ratio is None:
        return
    engines = measurements.engines
    batches = sorted({batch for engine in engines.values() for batch in engine.latency})
    if not batches:
        yield _missing("latency", "latency", "no rounds were measured", gate)
    for reference in _references(measurements):
        limit = gate.max_latency_ratio if reference == BASELINE else gate.champion_latency_ratio
        for batch in batches:
            pair = engines[CANDIDATE].latency.get(batch), engines[reference].latency.get(batch)
            yield latency(batch, reference, pair, limit, gate, seed)


def latency(
    batch: int, reference: str, pair: tuple[Rounds | None, Rounds | None], limit: float, gate: Gate, seed: int
) -> Rule:
    """The interval's upper end must be within the limit."""
    name, what = f"latency_vs_{reference}_batch_{batch}", f"latency at batch {batch} against the {reference}"
    if not pair[0] or not pair[1] or len(pair[0]) != len(pair[1]):
        return _missing(name, what, "both need the same rounds, side by side", gate)
    if len(pair[0]) < MIN_ROUNDS:
        return _missing(name, what, f"{len(pair[0])} rounds are too few, take {MIN_ROUNDS} or more", gate)
    ours, theirs = (np.array([np.median(calls) for calls in rounds]) for rounds in (pair[0], pair[1]))
    value, ends = statistics.bootstrap_rounds(ours, theirs, gate.confidence, seed)
    text = _texts([value, *ends, limit], 3, plus=False)
    interval = f"{_percent(gate.confidence)} interval {text[1]} to {text[2]}"
    sentence = f"{what} is {text[0]} times ({interval}), at most {text[3]}"
    if value <= limit < ends[1]:
        error = statistics.error_of_ratio(ends, gate.confidence)
        seen = math.exp(statistics.smallest_drop(error, gate.confidence))
        sentence += f": these rounds can tell {seen:.3f} from noise, take more or longer ones"
    facts = _bound(False, "ratio")
    facts |= {"candidate": latency_summary(pair[0], batch), "reference": latency_summary(pair[1], batch)}
    return Rule(name, ends[1] <= limit, sentence, value, limit, ends, facts)


def shares(measurements: Measurements, gate: Gate) -> Iterator[Rule]:
    """Parity with the unlowered reference, and what really runs quantized or sparse."""
    candidate = measurements.engines[CANDIDATE]
    wanted = (
        ("parity", gate.min_parity, candidate.parity, "the engine's worst cosine to its unlowered reference"),
        ("quantized_share", gate.min_quantized_share, candidate.quantized_share, "the quantized share"),
        ("sparse_share", gate.min_sparse_share, candidate.sparse_share, "the sparse share"),
    )
    for name, limit, value, what in wanted:
        if limit is None:
            continue
        if value is None:
            yield _missing(name, what, "it was not measured", gate)
        else:
            sentence = f"{what} is {value:.6g}, at least {limit:g}"
            yield Rule(name, value >= limit, sentence, value, limit, facts=_bound(True, "value"))


def _compare(measurements: Measurements, reference: str, how: Metric, gate: Gate, seed: int) -> Comparison:
    ours, theirs = measurements.engines[CANDIDATE], measurements.engines[reference]
    if ours.scores is not None and theirs.scores is not None:
        pair = [np.array(engine.scores, dtype=float) for engine in (ours, theirs)]
        return statistics.compare_scores(pair[0], pair[1], gate.confidence, seed)
    values = [partial(_value, measurements, name, how) for name in (CANDIDATE, reference)]
    changed = np.asarray(ours.predictions) != np.asarray(theirs.predictions)
    count, differing = len(changed), int(changed.reshape(len(changed), -1).any(axis=1).sum())
    return statistics.compare_statistic(values[0], values[1], count, differing, gate.confidence, seed)


def _value(measurements: Measurements, engine: str, how: Metric, rows: Any) -> float:
    predictions = np.asarray(measurements.engines[engine].predictions)
    try:
        return how.value(predictions[rows], np.asarray(measurements.references)[rows])
    except (TypeError, ValueError) as problem:
        raise InputError(f"metric {how.name!r} does not fit these predictions: {problem}") from problem


def _references(measurements: Measurements) -> list[str]:
    return [name for name in (BASELINE, CHAMPION) if name in measurements.engines]


def _missing(name: str, what: str, why: str, gate: Gate) -> Rule:
    sentence = f"{what} could not be evaluated: {why} (on_missing: {gate.on_missing})"
    return Rule(name, gate.on_missing == "pass", sentence, facts={"missing": True})


def _word(how: Metric) -> str:
    """The metric's name as rule names and logged keys carry it."""
    return re.sub(r"[^A-Za-z0-9_]+", "_", how.name)


def _bound(least: bool, unit: str) -> dict[str, Any]:
    """Which side of its limit a rule allows, and in what unit: for whoever draws it."""
    return {"bound": "at least" if least else "at most", "unit": unit}


def _percent(confidence: float) -> str:
    return f"{100 * confidence:g} %"


def _texts(values: list[float], digits: int = 1, plus: bool = True) -> list[str]:
    """Numbers with just enough decimals that the last, a limit, does not look equal to another it is not."""
    for more in range(digits, digits + 4):
        texts = [f"{x:.{more}f}" for x in values]
        limit, others = values[-1], [abs(x) for x in values[:-1]]
        if all(x == limit or f"{x:.{more}f}" != f"{limit:.{more}f}" for x in others):
            break
    return texts
