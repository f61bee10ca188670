"""How often the gate is wrong about metrics that are not 0 or 1 per example.

python -m benchmarks.gate metrics
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from benchmarks.gate_tables import CONFIDENCE, TRIALS, Table, percent, shares, table
from tasks import statistics
from tasks.metrics import metric


def metrics() -> None:
    """Metrics that are not 0 or 1."""
    table("Other metrics, candidates exactly at the limit: passed", other_metrics())
    table("Other metrics, equal engines, refused: by the interval / as too coarse / in total", equal_scores())


Draw = Callable[[Any, int], Any]
GAPS: dict[str, tuple[float, Draw]] = {  # name -> mean, and differences of candidate and reference
    "log-normal losses, σ = 1.5": (-np.exp(1.125), lambda g, n: -g.lognormal(0.0, 1.5, n)),
    "log-normal losses, σ = 1": (-np.exp(0.5), lambda g, n: -g.lognormal(0.0, 1.0, n)),
    "exponential losses of 5 %": (-0.05, lambda g, n: -g.exponential(1.0, n) * (g.random(n) < 0.05)),
    "normal differences": (0.0, lambda g, n: g.standard_normal(n)),
    "Student's t, 3 degrees": (0.0, lambda g, n: g.standard_t(3, n)),
    "normal differences of 6 %": (0.0, lambda g, n: g.standard_normal(n) * (g.random(n) < 0.06)),
}


def other_metrics() -> Table:
    """Means by the studentized bootstrap, macro F1 by the percentile one."""
    yield ["differences", "examples", "the gate", "studentized alone", "percentile bootstrap"]
    for name, (mean, draw) in GAPS.items():
        methods = METHODS if name == next(iter(GAPS)) else METHODS[:1]
        for n in (50, 100, 250, 500):
            generator = np.random.default_rng(n)
            gaps = [draw(generator, n) for _ in range(TRIALS // 2)]
            ends = [[method(gap, seed) > mean for seed, gap in enumerate(gaps)] for method in methods]
            yield [name, str(n), *(percent(column) for column in ends), *[""] * (3 - len(methods))]
    for n in (250, 500, 1000):
        yield ["macro F1, classes 85 : 15", str(n), percent(f1(n)), "", ""]


def gate_end(gap: Any, seed: int) -> float:
    """The interval's lower end."""
    return statistics.bootstrap_mean(gap, CONFIDENCE, seed, SPAN)[0]


def studentized_end(gap: Any, seed: int) -> float:
    """The same without what makes it wider."""
    return statistics.studentized(gap, CONFIDENCE, seed)[0] if gap.any() else 0.0


def percentile_end(gap: Any, seed: int) -> float:
    """The usual bootstrap's."""
    rows = np.random.default_rng(seed).integers(0, len(gap), size=(1000, len(gap)), dtype=np.int32)
    return float(np.quantile(gap[rows].mean(axis=1), (1 - CONFIDENCE) / 2))


METHODS = (gate_end, studentized_end, percentile_end)
SPAN = 20.0  # how far two scores can lie apart


def equal_scores() -> Table:
    """Symmetric differences of mean 0, allowed so many standard errors."""
    yield ["differences", "examples", *(f"max_drop {times:g} errors" for times in (3, 4, 5, 8))]
    for name, (mean, draw) in GAPS.items():
        for n in (100, 500) if mean == 0 else ():
            error = float(draw(np.random.default_rng(0), 1_000_000).std() / np.sqrt(n))
            generator = np.random.default_rng(n)
            found = [compared(draw(generator, n), seed) for seed in range(TRIALS // 2)]
            low, floor = np.array(found).T
            cells = [shares(low <= -k * error, (floor > k * error) & (low < 0)) for k in (3, 4, 5, 8)]
            yield [name, str(n), *cells]


def compared(gap: Any, seed: int) -> tuple[float, float]:
    """The difference's lower end, and that of the smallest drop that can be told."""
    base = np.where(np.arange(len(gap)) % 2, 0.0, SPAN / 2)
    found = statistics.compare_scores(base + gap, base, CONFIDENCE, seed)
    return found.difference[0], found.detectable[1][0]


def f1(n: int) -> Any:
    """Candidates that flip 3 % more answers than the baseline; their true drop of F1 is what is allowed."""
    generator = np.random.default_rng(n)

    def answers(size: int) -> tuple[Any, Any, Any]:
        truth = (generator.random(size) < 0.15).astype(int)
        base = truth ^ (generator.random(size) < 0.08)
        return truth, base, base ^ (generator.random(size) < 0.03)

    truth, base, ours = answers(4_000_000)
    drop, passed = macro_f1(2 * truth + base) - macro_f1(2 * truth + ours), []
    for seed in range(TRIALS // 2):
        truth, base, ours = answers(n)
        differing, kinds = int((ours != base).sum()), (2 * truth + ours, 2 * truth + base)
        assert seed or abs(macro_f1(kinds[0]) - metric("f1").value(ours, truth)) < 1e-12
        ours_of, base_of = (partial(_chosen, kind) for kind in kinds)
        ends = statistics.compare_statistic(ours_of, base_of, n, differing, CONFIDENCE, seed).difference
        passed.append(ends[0] > -drop)
    return np.array(passed)


def macro_f1(kinds: Any) -> float:
    """F1 of two classes from 2 * truth + answer: the gate's own metric, a hundred times as fast."""
    right_0, wrong_1, wrong_0, right_1 = (int(x) for x in np.bincount(kinds, minlength=4))
    wrong = wrong_0 + wrong_1
    found = [2 * hits / (2 * hits + wrong) for hits in (right_0, right_1) if hits + wrong]
    return sum(found) / len(found)


def _chosen(kinds: Any, rows: Any) -> float:
    return macro_f1(kinds[rows])
