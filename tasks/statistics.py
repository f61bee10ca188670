"""Intervals for paired differences and ratios: what a gate may conclude from so many examples or rounds.

All intervals are central and two-sided at `confidence`. docs/gate.md says why these methods, with their
measured error rates. Seeds are given, so the same measurements give the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

Array = np.ndarray[Any, np.dtype[np.float64]]
Ends = tuple[float, float]
DRAWS = 2000
CHUNK = 2_000_000  # resampled values held at once


def normal_quantile(confidence: float) -> float:
    """The z of a two-sided interval: 1.96 at 0.95."""
    return float(stats.norm.ppf(0.5 + confidence / 2))


def tango(wins: Any, losses: Any, n: int, confidence: float) -> tuple[Array, Array]:
    """Score interval of (wins - losses) / n, the difference of paired proportions; takes arrays of counts.

    Tango, Statistics in Medicine 17 (1998) 891-908. Unlike a bootstrap it does not collapse when few pairs,
    or none, disagree: without any the ends are -z²/(n + z²) and z²/(n + z²).
    """
    wins, losses = (np.atleast_1d(np.asarray(x, dtype=float)) for x in (wins, losses))
    z, estimate = normal_quantile(confidence), (wins - losses) / n
    low = _root(wins, losses, n, z, np.full_like(estimate, -1.0), estimate)
    return low, -_root(losses, wins, n, z, np.full_like(estimate, -1.0), -estimate)


def _root(wins: Array, losses: Array, n: int, z: float, low: Array, high: Array) -> Array:
    for _ in range(60):  # bisection: the score falls as the difference grows
        middle = (low + high) / 2
        outside = _score(wins, losses, n, middle) > z
        low, high = np.where(outside, middle, low), np.where(outside, high, middle)
    return np.asarray((low + high) / 2)


def _score(wins: Array, losses: Array, n: int, difference: Array) -> Array:
    b = (2 * n - wins + losses) * difference - wins - losses
    c = -losses * difference * (1 - difference)
    lost = (np.sqrt(np.maximum(b * b - 8 * n * c, 0)) - b) / (
        4 * n
    )  # its likeliest share, given the difference
    variance = n * (2 * lost + difference * (1 - difference))
    return np.asarray((wins - losses - n * difference) / np.sqrt(np.maximum(variance, 1e-300)))


def wilson(right: int, n: int, confidence: float) -> Ends:
    """Score interval of one proportion."""
    interval = stats.binomtest(right, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(wins: int, losses: int) -> float:
    """Exact two-sided p-value that the disagreements favour neither side."""
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def bootstrap_counts(wins: int, losses: int, n: int, confidence: float, seed: int) -> Ends:
    """Percentile paired bootstrap of (wins - losses) / n: resampling pairs is resampling these counts."""
    shares = [wins / n, losses / n, max(0.0, 1 - (wins + losses) / n)]
    counts = np.random.default_rng(seed).multinomial(n, shares, size=10 * DRAWS)
    return _percentiles((counts[:, 0] - counts[:, 1]) / n, confidence)


def bootstrap_mean(values: Array, confidence: float, seed: int, span: float) -> Ends:
    """Studentized bootstrap of a mean; `span`: how far two values can lie apart, if all are the same."""
    n, mean, error = len(values), float(values.mean()), _standard_error(values)
    if error == 0:
        return nothing_differs(mean, n, span, confidence)
    generator, scores = np.random.default_rng(seed), []
    for draws in _chunks(n):
        sample = values[generator.integers(0, n, size=(draws, n))]
        errors = sample.std(axis=1, ddof=1) / np.sqrt(n)
        scores.append((sample.mean(axis=1) - mean) / np.maximum(errors, 1e-300))
    low, high = _percentiles(np.concatenate(scores), confidence)
    return max(mean - high * error, mean - span), min(mean - low * error, mean + span)


def bootstrap_statistic(
    statistic: Callable[[Any], float], n: int, confidence: float, seed: int, draws: int = 1000
) -> tuple[Ends, float]:
    """Percentile bootstrap of `statistic(rows)` over `n` examples, and its standard error."""
    generator = np.random.default_rng(seed)
    values = np.array([statistic(generator.integers(0, n, size=n)) for _ in range(draws)])
    return _percentiles(values, confidence), float(values.std(ddof=1))


def nothing_differs(estimate: float, n: int, span: float, confidence: float) -> Ends:
    """The interval where no example differs: at most z²/(n + z²) of all examples can, each by `span`."""
    square = normal_quantile(confidence) ** 2
    half = span * square / (n + square)
    return estimate - half, estimate + half


def mean_interval(values: Array, confidence: float, seed: int) -> tuple[float, Ends]:
    """The mean of some scores and its interval."""
    if np.isin(values, (0.0, 1.0)).all():
        return float(values.mean()), wilson(int(values.sum()), len(values), confidence)
    return float(values.mean()), bootstrap_mean(values, confidence, seed, float(np.ptp(values)) or 1.0)


def statistic_interval(
    statistic: Callable[[Any], float], n: int, confidence: float, seed: int
) -> tuple[float, Ends]:
    """`statistic` of all rows and its interval."""
    ends, _ = bootstrap_statistic(statistic, n, confidence, seed)
    return statistic(np.arange(n)), ends


def smallest_drop_counts(wins: int, losses: int, n: int, confidence: float) -> float:
    """The least `max_drop` that an engine as good, disagreeing this often, meets at rate `confidence`."""
    disagree = wins + losses
    unlucky = int(stats.binom.ppf(confidence, disagree, 0.5))
    return float(-tango(disagree - unlucky, unlucky, n, confidence)[0][0])


def smallest_drop(error: float, confidence: float) -> float:
    """The same for a difference with this standard error."""
    return (normal_quantile(confidence) + float(stats.norm.ppf(confidence))) * error


def error_of_ratio(ends: Ends, confidence: float) -> float:
    """The standard error of the logarithm that such an interval implies."""
    return math.log(ends[1] / ends[0]) / 2 / normal_quantile(confidence)


def bootstrap_rounds(candidate: Array, reference: Array, confidence: float, seed: int) -> tuple[float, Ends]:
    """Median over rounds of candidate / reference, and its bootstrap interval; rounds stay paired.

    The percentiles are expanded as a t interval is (Hesterberg, The American Statistician 69 (2015) 371-386):
    plain ones are too narrow for the few rounds that one can afford.
    """
    ratios = np.log(candidate) - np.log(reference)
    rows = np.random.default_rng(seed).integers(0, len(ratios), size=(5 * DRAWS, len(ratios)))
    low, high = _percentiles(np.median(ratios[rows], axis=1), _expanded(confidence, len(ratios)))
    return float(np.exp(np.median(ratios))), (float(np.exp(low)), float(np.exp(high)))


def _standard_error(values: Array) -> float:
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
    return error if error > 1e-12 * max(1.0, abs(float(values.mean()))) else 0.0


def _expanded(confidence: float, n: int) -> float:
    wide = stats.t.ppf(0.5 + confidence / 2, n - 1) * np.sqrt(n / (n - 1))
    return float(2 * stats.norm.cdf(wide) - 1)


def _percentiles(values: Array, confidence: float) -> Ends:
    low, high = np.quantile(values[np.isfinite(values)], [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _chunks(n: int) -> list[int]:
    size = max(1, min(DRAWS, CHUNK // n))
    return [size] * (DRAWS // size) + ([DRAWS % size] if DRAWS % size else [])


@dataclass(frozen=True)
class Comparison:
    """Candidate against reference on the same examples; every value in the metric's own direction.

    `detectable`: the least `max_drop` that an equally good engine meets with probability `confidence`.
    """

    candidate: float
    reference: float
    difference: Ends
    ratio: Ends
    detectable: float
    facts: dict[str, Any]


def compare_scores(candidate: Array, reference: Array, confidence: float, seed: int) -> Comparison:
    """Means of paired scores: the score interval where all are 0 or 1, else a studentized bootstrap."""
    both = np.concatenate([candidate, reference])
    if np.isin(both, (0.0, 1.0)).all():
        return _compare_answers(candidate, reference, confidence, seed)
    gap, base = candidate - reference, float(reference.mean())
    span = float(np.ptp(both)) or float(np.abs(both).max()) or 1.0
    ends = bootstrap_mean(gap, confidence, seed, span)
    error = _standard_error(gap)
    detectable = smallest_drop(error, confidence) if error else float(gap.mean()) - ends[0]
    ratio = _ratio_of_means(candidate, reference, confidence, seed) if error else _scaled(ends, base)
    return Comparison(
        float(candidate.mean()), base, ends, ratio, detectable, {"method": "studentized bootstrap"}
    )


def _compare_answers(candidate: Array, reference: Array, confidence: float, seed: int) -> Comparison:
    n, base = len(candidate), float(reference.mean())
    wins, losses = int((candidate > reference).sum()), int((candidate < reference).sum())
    low, high = tango(wins, losses, n, confidence)
    ends = float(low[0]), float(high[0])
    facts = {
        "method": "score interval of paired proportions (Tango)",
        "wins": wins,
        "losses": losses,
        "mcnemar_p": mcnemar(wins, losses),
        "bootstrap_interval": bootstrap_counts(wins, losses, n, confidence, seed),
    }
    detectable = smallest_drop_counts(wins, losses, n, confidence)
    return Comparison(float(candidate.mean()), base, ends, _scaled(ends, base), detectable, facts)


def compare_statistic(
    candidate: Callable[[Any], float],
    reference: Callable[[Any], float],
    n: int,
    differing: int,
    confidence: float,
    seed: int,
) -> Comparison:
    """A metric of all examples at once: `candidate(rows)` and `reference(rows)` on resampled rows.

    Only the `differing` examples tell the two apart, so the percentiles are expanded as for so many values.
    """
    rows = np.arange(n)
    now, base = candidate(rows), reference(rows)
    wide = _expanded(confidence, max(2, differing))
    ends, error = bootstrap_statistic(lambda rows: candidate(rows) - reference(rows), n, wide, seed)
    if error == 0:
        ends = nothing_differs(now - base, n, max(1.0, abs(base)), confidence)
    detectable = smallest_drop(error, confidence) if error else now - base - ends[0]
    ratio = _scaled(ends, base) if base else (math.nan, math.nan)
    return Comparison(now, base, ends, ratio, detectable, {"method": "percentile bootstrap"})


def _ratio_of_means(candidate: Array, reference: Array, confidence: float, seed: int) -> Ends:
    generator, n = np.random.default_rng(seed), len(candidate)
    rows = [generator.integers(0, n, size=(draws, n)) for draws in _chunks(n)]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.concatenate([candidate[r].mean(axis=1) / reference[r].mean(axis=1) for r in rows])
    return _percentiles(ratios, confidence)


def _scaled(difference: Ends, base: float) -> Ends:
    """1 + difference / reference: the reference's own noise is second to that of the difference."""
    return (1 + difference[0] / base, 1 + difference[1] / base) if base > 0 else (math.nan, math.nan)
