"""The gate's rules about the metric: drop, ratio, forgetting, what the examples can tell, floors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from recipes.gate import Gate
from tasks import statistics
from tasks.artifacts import Rule
from tasks.errors import InputError
from tasks.measurements import (
    BASELINE,
    CANDIDATE,
    CHAMPION,
    UNMEASURED,
    Measurements,
    examples,
    examples_missing,
)
from tasks.metrics import Metric, metric
from tasks.sentences import bound, missing, span, texts, word
from tasks.statistics import Comparison

UNDEFINED = "it has no finite value on these examples"


def quality(measurements: Measurements, gate: Gate, seed: int) -> Iterator[Rule]:
    """The metric against each reference: its drop, its ratio, and whether the examples can tell."""
    if gate.max_drop is None and gate.min_ratio is None:
        return
    how = metric(gate.metric)
    for reference in (name for name in (BASELINE, CHAMPION) if name in measurements.engines):
        name = f"{word(how)}_vs_{reference}"
        if problem := examples_missing(measurements, (CANDIDATE, reference)):
            yield missing(name, f"{how.name} against the {reference}", problem, gate)
            continue
        found = compare(measurements, reference, how, gate, seed)
        if not math.isfinite(found.candidate - found.reference):
            yield missing(name, f"{how.name} against the {reference}", UNDEFINED, gate)
            continue
        if gate.max_drop is not None:
            yield drop(name, how.name, found, how, reference, gate.max_drop, gate)
        if gate.min_ratio is not None:
            yield ratio(found, how, reference, gate)
        limits = [
            gate.max_drop,
            None if gate.min_ratio is None else (1 - gate.min_ratio) * abs(found.reference),
        ]
        allowed = min(limit for limit in limits if limit is not None)
        n = len(examples(measurements.engines[CANDIDATE]))
        yield sensitivity(
            f"{word(how)}_sensitivity_vs_{reference}", (n, "examples"), found, how, allowed, gate
        )


def forgetting(measurements: Measurements, gate: Gate, seed: int) -> Iterator[Rule]:
    """The metric against the champion on the champion's own, previous held-out rows."""
    if gate.max_forgetting is None:
        return
    how, why = metric(gate.metric), measurements.facts.get(UNMEASURED)
    what = f"{how.name} on the previous held-out rows"
    if CHAMPION not in measurements.engines and not why:
        yield Rule("forgetting", True, "no other champion yet, nothing to forget")
        return
    previous = measurements.previous
    problem = why or ("they were not measured" if previous is None else _previous_missing(previous))
    if previous is None or problem:
        yield missing("forgetting", what, problem, gate)
        return
    found = compare(previous, CHAMPION, how, gate, seed)
    if not math.isfinite(found.candidate - found.reference):
        yield missing("forgetting", what, UNDEFINED, gate)
        return
    n = len(examples(previous.engines[CANDIDATE]))
    yield drop("forgetting", what, found, how, CHAMPION, gate.max_forgetting, gate)
    yield sensitivity(
        "forgetting_sensitivity", (n, "previous examples"), found, how, gate.max_forgetting, gate
    )


def _previous_missing(previous: Measurements) -> str:
    absent = [name for name in (CANDIDATE, CHAMPION) if name not in previous.engines]
    return (
        f"the {absent[0]} was not measured" if absent else examples_missing(previous, (CANDIDATE, CHAMPION))
    )


def drop(
    name: str, what: str, found: Comparison, how: Metric, reference: str, allowed: float, gate: Gate
) -> Rule:
    """The interval's worse end must be better than the allowed drop."""
    sign = 1 if how.higher_is_better else -1
    change = found.candidate - found.reference
    low, high = found.difference
    passed = (low if sign > 0 else -high) > -allowed
    unit = 100 if how.points else 1
    text = texts([unit * x for x in (abs(change), low, high, allowed)])
    verb = "is unchanged" if change == 0 else f"{'rose' if change > 0 else 'fell'} {text[0]}"
    points = " points" if how.points and change else ""
    sentence = (
        f"{what} {verb}{points} against the {reference} "
        f"({span(gate, found.difference, text[1:3])}), allowed {text[3]}"
    )
    facts = {**bound(sign > 0, "points" if how.points else how.name), **found.facts}
    facts |= {"candidate": found.candidate, "reference": found.reference}
    if found.telling:
        facts |= dict(zip(("detectable", "detectable_interval"), found.detectable, strict=True))
    ends = (low, high) if found.bounded else None
    return Rule(name, passed, sentence, change, -sign * allowed, ends, facts)


def ratio(found: Comparison, how: Metric, reference: str, gate: Gate) -> Rule:
    """The interval of candidate / reference (reference / candidate where lower is better) must stay above."""
    name, limit = f"{word(how)}_ratio_vs_{reference}", gate.min_ratio
    assert limit is not None
    if not (found.reference > 0 and found.candidate > 0) or any(map(math.isnan, found.ratio)):
        return missing(name, f"{how.name}'s ratio to the {reference}", "the metric is not positive", gate)
    value, (low, high) = found.candidate / found.reference, found.ratio
    if not how.higher_is_better:
        value, low, high = 1 / value, 1 / high, 1 / max(low, 1e-9)
    ends = (max(low, 0.0), high)
    text = texts([value, *ends, limit], 4)
    sentence = (
        f"{how.name} is {text[0]} of the {reference}'s "
        f"({span(gate, found.ratio, text[1:3])}), at least {text[3]}"
    )
    shown = ends if found.bounded else None
    return Rule(name, ends[0] > limit, sentence, value, limit, shown, bound(True, "metric ratio"))


def sensitivity(
    name: str, rows: tuple[int, str], found: Comparison, how: Metric, allowed: float, gate: Gate
) -> Rule:
    """Whether these examples can tell the allowed drop from noise.

    What they can tell is an estimate and stated as its interval. A set of which all of it is above what is
    allowed is too coarse: chance decides, and a pass does not count. Where the limit lies within, coarseness
    explains a refusal and leaves a pass alone. A set that can tell none is always too coarse.
    """
    if not found.telling:
        return _nothing_told(name, rows, found, how, allowed, gate)
    value, ends = found.detectable
    worst = found.difference[0] if how.higher_is_better else -found.difference[1]
    coarse = ends[0] > allowed or (value > allowed and worst <= -allowed)
    unit, points = (100, " points") if how.points else (1, "")
    text = texts([unit * x for x in (*ends, allowed)])
    sentence = (
        f"{rows[0]} {rows[1]} can tell a {_worsening(how)} of {text[0]} to {text[1]}{points} of {how.name} "
        "from noise, "
        f"allowed {text[2]}"
    )
    if coarse:
        sentence += f": too coarse, take more examples or allow more{_warning(gate)}"
    elif value > allowed:
        sentence += ": hardly fine enough"
    passed = not coarse or gate.on_coarse == "warn"
    return Rule(name, passed, sentence, value, allowed, ends, {"examples": rows[0], "coarse": coarse})


def _nothing_told(
    name: str, rows: tuple[int, str], found: Comparison, how: Metric, allowed: float, gate: Gate
) -> Rule:
    rare = found.facts.get("rarest")
    if rare and found.bounded:
        why = f"rests on the {rare[1]} of class {rare[0]!r}: take at least {statistics.FEW} of these"
    elif rare:
        why = (
            "is undefined on some random samples of them, "
            f"of which only {rare[1]} are of class {rare[0]!r}: take more of these"
        )
    else:
        why = "is undefined on some random samples of them, take more"
    sentence = (
        f"{rows[0]} {rows[1]} can tell no {_worsening(how)} of {how.name} from noise: too coarse, it {why}, "
        f"or another metric{_warning(gate)}"
    )
    facts = {"examples": rows[0], "coarse": True}
    return Rule(name, gate.on_coarse == "warn", sentence, None, allowed, None, facts)


def _worsening(how: Metric) -> str:
    return "drop" if how.higher_is_better else "rise"


def _warning(gate: Gate) -> str:
    return " (warning)" if gate.on_coarse == "warn" else ""


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
                yield missing(name, what, problem, gate)
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
    if not math.isfinite(value):
        return missing(name, what, UNDEFINED, gate)
    passed = ends[0] >= limit if how.higher_is_better else ends[1] <= limit
    text = texts([value, *ends, limit], 3)
    facts = {**bound(how.higher_is_better, "value"), "examples": len(rows)}
    sentence = (
        f"{what} is {text[0]} on {len(rows)} examples "
        f"({span(gate, ends, text[1:3])}), {facts['bound']} {text[3]}"
    )
    shown = ends if all(map(math.isfinite, ends)) else None
    return Rule(name, passed, sentence, value, limit, shown, facts)


def compare(measurements: Measurements, reference: str, how: Metric, gate: Gate, seed: int) -> Comparison:
    """Candidate against `reference` on these examples, by the method that fits the metric."""
    ours, theirs = measurements.engines[CANDIDATE], measurements.engines[reference]
    if ours.scores is not None and theirs.scores is not None:
        pair = [np.array(engine.scores, dtype=float) for engine in (ours, theirs)]
        return statistics.compare_scores(pair[0], pair[1], gate.confidence, seed)
    values = [partial(_value, measurements, name, how) for name in (CANDIDATE, reference)]
    changed = np.asarray(ours.predictions) != np.asarray(theirs.predictions)
    count, differing = len(changed), int(changed.reshape(len(changed), -1).any(axis=1).sum())
    name, rarest = _rarest(measurements) if how.takes in ("label", "probability") else (None, None)
    found = statistics.compare_statistic(
        values[0],
        values[1],
        count,
        differing,
        gate.confidence,
        seed,
        rarest if how.takes == "probability" else None,  # other metrics' intervals hold (docs/gate.md)
    )
    if found.telling or rarest is None:
        return found
    return replace(found, facts={**found.facts, "rarest": (name, len(rarest))})


def _rarest(measurements: Measurements) -> tuple[Any, Any]:
    """The class of fewest examples and their rows."""
    references = np.asarray(measurements.references)
    classes, counts = np.unique(references, return_counts=True)
    rare, labels = classes[counts.argmin()].item(), dict(enumerate(measurements.facts.get("labels", ())))
    return labels.get(rare, rare), np.flatnonzero(references == rare)


def _value(measurements: Measurements, engine: str, how: Metric, rows: Any) -> float:
    predictions = np.asarray(measurements.engines[engine].predictions)
    try:
        return how.value(predictions[rows], np.asarray(measurements.references)[rows])
    except (TypeError, ValueError, ZeroDivisionError) as problem:
        raise InputError(f"metric {how.name!r} does not fit these predictions: {problem}") from problem
