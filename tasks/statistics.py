"""Intervals for paired differences and ratios: what a gate may conclude from so many examples or rounds.

All intervals are central and two-sided at `confidence`. docs/gate.md says why these methods, with their
measured error rates. Seeds are given, so the same measurements give the same numbers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from tasks.errors import InputError

Array = np.ndarray[Any, np.dtype[np.float64]]
Ends = tuple[float, float]
UNBOUNDED: Ends = (-math.inf, math.inf)
DRAWS = 2000
CHUNK = 2_000_000  # resampled values held at once
FEW = 50  # examples of a class: fewer leave the interval of what rests on them too narrow (docs/gate.md)


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
    """Studentized bootstrap of a mean; `span`: how far two values can lie apart.

    Its percentiles are expanded as for so many values as carry the spread: a few that stand out say little
    of those that have not been seen. And where few values differ from the rest, resamples have none of them:
    then the ends are where all that may differ, by Wilson's interval, do so by `span`.
    """
    n, rest = len(values), float(np.median(values))
    if _standard_error(values) == 0:
        return nothing_differs(float(values.mean()), n, span, confidence)
    low, high = studentized(values, _expanded(confidence, effective(values)), seed)
    most = span * wilson(int((values != rest).sum()), n, confidence)[1]
    return max(low, rest - most), min(high, rest + most)


def studentized(values: Array, confidence: float, seed: int) -> Ends:
    """Studentized bootstrap of a mean, as it is: too narrow where the tail is long and the values few."""
    n, mean, error = len(values), float(values.mean()), _standard_error(values)
    generator, centred, scores = np.random.default_rng(seed), values - mean, []
    for draws in _chunks(n):
        sample = centred[generator.integers(0, n, size=(draws, n), dtype=np.int32)]
        means = sample.mean(axis=1)
        squares = np.einsum("ij,ij->i", sample, sample) / n - means**2
        scores.append(means / np.sqrt(np.maximum(squares / (n - 1), 1e-300)))
    low, high = _percentiles(np.concatenate(scores), confidence)
    return mean - high * error, mean - low * error


def effective(values: Array) -> float:
    """How many values carry the spread: half of all if they are normal, D if D of many differ alike."""
    squares = np.square(values - values.mean())
    spread = float(squares.var() / squares.mean() ** 2)  # kurtosis - 1
    return max(2.0, len(values) / max(1.0, spread))


def bootstrap_statistic(
    statistic: Callable[[Any], float], n: int, confidence: float, seed: int, draws: int = 1000
) -> tuple[Ends, float]:
    """Percentile bootstrap of `statistic(rows)` over `n` examples, and its standard error.

    Where a draw leaves it undefined (none of a rare class is in it), both are infinite: what so few examples
    carry is not known.
    """
    generator = np.random.default_rng(seed)
    with warnings.catch_warnings(action="ignore"):  # scikit-learn's, once for every such draw
        values = np.array([_drawn(statistic, generator.integers(0, n, size=n)) for _ in range(draws)])
    if not np.isfinite(values).all():
        return UNBOUNDED, math.inf
    return _percentiles(values, confidence), float(values.std(ddof=1))


def _drawn(statistic: Callable[[Any], float], rows: Any) -> float:
    """NaN where the metric refuses these rows: on all of them it has a value, or the caller is told."""
    try:
        return statistic(rows)
    except InputError:
        return math.nan


def nothing_differs(estimate: float, n: int, span: float, confidence: float) -> Ends:
    """The interval where no example differs: at most z²/(n + z²) of all examples can, each by `span`."""
    square = normal_quantile(confidence) ** 2
    half = span * square / (n + square)
    return estimate - half, estimate + half


def rests_on(statistic: Callable[[Any], float], chosen: Array, n: int, seed: int, error: float) -> bool:
    """Whether most of a statistic's variance is that of the `chosen` rows, drawn again beside the others."""
    generator, rows = np.random.default_rng(seed), np.arange(n)

    def again() -> float:
        rows[chosen] = generator.choice(chosen, len(chosen))
        return _drawn(statistic, rows)

    return float(np.var([again() for _ in range(DRAWS // 10)], ddof=1)) > error**2 / 2


def mean_interval(values: Array, confidence: float, seed: int) -> tuple[float, Ends]:
    """The mean of some scores and its interval."""
    if np.isin(values, (0.0, 1.0)).all():
        return float(values.mean()), wilson(int(values.sum()), len(values), confidence)
    return float(values.mean()), bootstrap_mean(values, confidence, seed, float(np.ptp(values)) or 1.0)


def statistic_interval(
    statistic: Callable[[Any], float], n: int, confidence: float, seed: int
) -> tuple[float, Ends]:
    """`statistic` of all rows and its interval."""
    value = statistic(np.arange(n))
    ends, error = bootstrap_statistic(statistic, n, confidence, seed)
    if _beyond_rounding(error, value) == 0:
        ends = nothing_differs(value, n, max(1.0, abs(value)), confidence)
    return value, ends


def smallest_drop_counts(disagree: int, n: int, confidence: float) -> tuple[float, Ends]:
    """The least `max_drop` that an engine as good, disagreeing this often, meets at rate `confidence`.

    With it its own interval, which follows from that of the share of disagreements (Clopper and Pearson).
    """
    tail = (1 - beyond_doubt(confidence)) / 2
    least = stats.beta.ppf(tail, disagree, n - disagree + 1) if disagree else 0.0
    most = stats.beta.ppf(1 - tail, disagree + 1, n - disagree) if disagree < n else 1.0
    counts = np.array([disagree, n * least, n * most])
    excess = np.minimum(stats.norm.ppf(confidence) * np.sqrt(counts), counts)
    unlucky = float(stats.binom.ppf(confidence, disagree, 0.5))
    wins, losses = (counts - excess) / 2, (counts + excess) / 2
    reach = -tango(np.append(wins, disagree - unlucky), np.append(losses, unlucky), n, confidence)[0]
    value = float(max(reach[0], reach[3]))
    return value, (min(float(reach[1]), value), max(float(reach[2]), value))


def smallest_drop(
    estimate: float, ends: Ends, error: float, freedom: float, confidence: float
) -> tuple[float, Ends]:
    """The same for a difference with this interval and standard error, which has degrees of freedom."""
    reach = max(estimate - ends[0], ends[1] - estimate)
    if error == 0:
        return reach, (reach, reach)
    value, upper = reach + float(stats.norm.ppf(confidence)) * error, 0.5 + beyond_doubt(confidence) / 2
    low, high = (math.sqrt(freedom / stats.chi2.ppf(share, freedom)) for share in (upper, 1 - upper))
    return value, (value * low, value * high)


def beyond_doubt(confidence: float) -> float:
    """0.999 at 0.95: what overrules a pass at this confidence adds next to nothing to the rate of errors."""
    return 1 - (1 - confidence) / 50


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
    return _beyond_rounding(error, float(values.mean()))


def _beyond_rounding(error: float, size: float) -> float:
    """The error, or 0 where it is no more than what summing numbers of this size leaves."""
    return error if error > 1e-12 * max(1.0, abs(size)) else 0.0


def _expanded(confidence: float, n: float) -> float:
    wide = stats.t.ppf(0.5 + confidence / 2, n - 1) * np.sqrt(n / (n - 1))
    return float(2 * stats.norm.cdf(wide) - 1)


def _percentiles(values: Array, confidence: float) -> Ends:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _chunks(n: int) -> list[int]:
    size = max(1, min(DRAWS, CHUNK // n))
    return [size] * (DRAWS // size) + ([DRAWS % size] if DRAWS % size else [])


@dataclass(frozen=True)
class Comparison:
    """Candidate against reference on the same examples; every value in the metric's own direction.

    `detectable`: the least `max_drop` that these examples can tell from noise (`smallest_drop_counts`), and
    between which values it is beyond doubt; infinite where they can tell none.
    """

    candidate: float
    reference: float
    difference: Ends
    ratio: Ends
    detectable: tuple[float, Ends]
    facts: dict[str, Any]

    @property
    def bounded(self) -> bool:
        """Whether these examples bound the difference at all."""
        return all(map(math.isfinite, self.difference))

    @property
    def telling(self) -> bool:
        """Whether these examples can tell any drop from noise."""
        return all(map(math.isfinite, self.detectable[1]))


def compare_scores(candidate: Array, reference: Array, confidence: float, seed: int) -> Comparison:
    """Means of paired scores: the score interval where all are 0 or 1, else a studentized bootstrap."""
    both = np.concatenate([candidate, reference])
    if np.isin(both, (0.0, 1.0)).all():
        return _compare_answers(candidate, reference, confidence, seed)
    gap, base = candidate - reference, float(reference.mean())
    span = float(np.ptp(both)) or float(np.abs(both).max()) or 1.0
    ends, error = bootstrap_mean(gap, confidence, seed, span), _standard_error(gap)
    freedom = 2 * effective(gap) if error else 0.0
    detectable = smallest_drop(float(gap.mean()), ends, error, freedom, confidence)
    facts = {"method": "studentized bootstrap"}
    return Comparison(float(candidate.mean()), base, ends, _scaled(ends, base), detectable, facts)


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
    detectable = smallest_drop_counts(wins + losses, n, confidence)
    return Comparison(float(candidate.mean()), base, ends, _scaled(ends, base), detectable, facts)


def compare_statistic(
    candidate: Callable[[Any], float],
    reference: Callable[[Any], float],
    n: int,
    differing: int,
    confidence: float,
    seed: int,
    rarest: Array | None = None,
) -> Comparison:
    """A metric of all examples at once: `candidate(rows)` and `reference(rows)` on resampled rows.

    Only the `differing` examples tell the two apart, so the percentiles are expanded as for so many values.
    No drop can be told where the difference rests on FEW examples, those of the `rarest` class.
    """
    rows = np.arange(n)
    now, base = candidate(rows), reference(rows)
    wide = _expanded(confidence, max(2, differing))

    def difference(rows: Any) -> float:
        return candidate(rows) - reference(rows)

    ends, error = bootstrap_statistic(difference, n, wide, seed)
    error = _beyond_rounding(error, base)
    few = rarest if rarest is not None and len(rarest) < FEW else None
    if error == 0:
        carrying = n if few is None else len(few)
        ends = nothing_differs(now - base, carrying, max(1.0, abs(base)), confidence)
    detectable = smallest_drop(now - base, ends, error, 2 * max(1, differing), confidence)
    if few is not None and math.isfinite(error) and rests_on(difference, few, n, seed, error):
        detectable = (math.inf, (math.inf, math.inf))
    ratio = _scaled(ends, base) if base else (math.nan, math.nan)
    return Comparison(now, base, ends, ratio, detectable, {"method": "percentile bootstrap"})


def _scaled(difference: Ends, base: float) -> Ends:
    """1 + difference / reference: the reference's own noise is second to that of the difference."""
    return (1 + difference[0] / base, 1 + difference[1] / base) if base > 0 else (math.nan, math.nan)
