"""How often the gate is wrong: planted truth, counted. Prints the tables of docs/gate.md.

python -m benchmarks.gate             everything, one process; the engines want a quiet machine
python -m benchmarks.gate accuracy    some parts: accuracy, metrics, seeds, rounds, engines
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np

from benchmarks.gate_latency import engines, rounds
from benchmarks.gate_scores import metrics
from benchmarks.gate_tables import CONFIDENCE, TRIALS, Table, percent, shares, table
from recipes.gate import Gate
from tasks import statistics
from tasks.gate import judge
from tasks.measurements import Measured, Measurements

SIZES = (250, 500, 1000, 2000, 4000)
DROPS = (0.005, 0.01, 0.02)
ALLOWED = (*DROPS, 0.03)
DISCORDANCE = (0.01, 0.03, 0.10)


def counts(n: int, discordance: float, drop: float, seed: int) -> tuple[Any, Any]:
    """Wins and losses of candidates that disagree this often and are worse by exactly `drop`."""
    shares = [(discordance - drop) / 2, (discordance + drop) / 2, 1 - discordance]
    drawn = np.random.default_rng(seed).multinomial(n, shares, size=TRIALS)
    return drawn[:, 0], drawn[:, 1]


@cache
def told(disagree: int, n: int) -> tuple[float, float]:
    """The smallest drop that n examples with so many disagreements can tell, and its interval's lower end."""
    value, ends = statistics.smallest_drop_counts(disagree, n, CONFIDENCE)
    return value, ends[0]


def accuracy() -> None:
    """Simulated flips: what is refused that is as good, what passes that is not, what is seen."""
    table("Engines of equal quality, refused: by the interval / as too coarse / in total", equal())
    table("Examples needed: an equally good engine is refused, for either reason, at most 5 %", needed())
    table("Exactly at -max_drop, passed: the gate / a one-sided bound / a percentile bootstrap", at_limit())
    table("A drop told from noise (the interval lies below zero)", seen())


def equal() -> Table:
    """One row per size and discordance, one column per `max_drop`; bold where the set is fine enough."""
    heads = (f"max_drop {100 * drop:g} points" for drop in ALLOWED)
    yield ["examples", "discordance", *heads, "at most refused as worse"]
    for n in SIZES:
        for discordance in DISCORDANCE:
            found = [refusals(n, discordance, drop) for drop in ALLOWED]
            worst = max(float(unexplained.mean()) for _, _, unexplained in found)
            yield [str(n), f"{100 * discordance:g} %", *(shares(*f[:2]) for f in found), percent(worst)]


def refusals(n: int, discordance: float, drop: float) -> tuple[Any, Any, Any]:
    """Of equally good engines: refused by the interval, as coarse, and as worse, not called coarse."""
    wins, losses = counts(n, discordance, 0.0, seed=n)
    low, _ = statistics.tango(wins, losses, n, CONFIDENCE)
    value, floor = np.array([told(int(k), n) for k in wins + losses]).T
    refused = low <= -drop
    return refused, floor > drop, refused & (value <= drop)


def needed() -> Table:
    """The least size of a series in steps of 5 % where either refusal is rare enough."""
    yield ["discordance", *(f"max_drop {100 * drop:g} points" for drop in ALLOWED)]
    for discordance in DISCORDANCE:
        cells = []
        for drop in ALLOWED:
            n = int(8 * discordance / drop**2)
            while either(n, discordance, drop) > 1 - CONFIDENCE:
                n = int(1.05 * n) + 1
            cells.append(f"{n:,}")
        yield [f"{100 * discordance:g} %", *cells]


def either(n: int, discordance: float, drop: float) -> float:
    """The share of equally good engines that the interval or the coarseness refuses."""
    refused, coarse, _ = refusals(n, discordance, drop)
    return float((refused | coarse).mean())


def at_limit() -> Table:
    """False passes of the rule itself, whether or not the set is too coarse."""
    yield ["examples", "discordance", *(f"max_drop {100 * drop:g} points" for drop in DROPS)]
    for n in SIZES:
        for discordance in DISCORDANCE:
            cells = [false_passes(n, discordance, drop) if drop <= discordance else "" for drop in DROPS]
            yield [str(n), f"{100 * discordance:g} %", *cells]


def false_passes(n: int, discordance: float, drop: float) -> str:
    """By the gate's interval, by a one-sided bound, by the percentile bootstrap."""
    wins, losses = counts(n, discordance, drop, seed=n + 1)
    two, one = (statistics.tango(wins, losses, n, level)[0] for level in (CONFIDENCE, 2 * CONFIDENCE - 1))
    plain = np.array([bootstrap(int(w), int(c), n) for w, c in zip(wins, losses, strict=True)])
    return " / ".join(percent(low > -drop) for low in (two, one, plain))


@cache
def bootstrap(wins: int, losses: int, n: int) -> float:
    """The percentile bootstrap's lower end, for comparison."""
    return statistics.bootstrap_counts(wins, losses, n, CONFIDENCE, seed=0)[0]


def seen() -> Table:
    """Power to call a drop a drop."""
    yield ["examples", "discordance", *(f"{100 * drop:g} points worse" for drop in DROPS)]
    for n in SIZES:
        for discordance in (0.02, 0.03, 0.10):
            cells = []
            for drop in DROPS:
                wins, losses = counts(n, discordance, drop, seed=n + 2)
                cells.append(percent(statistics.tango(wins, losses, n, CONFIDENCE)[1] < 0))
            yield [str(n), f"{100 * discordance:g} %", *cells]


def seeds() -> None:
    """Networks trained from other seeds, through `judge` itself."""
    table(
        "Networks of other seeds, through the whole gate",
        other_seeds(),
    )


def other_seeds() -> Table:
    """The most alike of six networks, and the most different: the latter's true gap is the allowed drop."""
    right = trained()
    pairs = sorted(combinations(right, 2), key=lambda pair: abs(float(pair[0].mean() - pair[1].mean())))
    worse, better = sorted(pairs[-1], key=lambda each: float(each.mean()))
    gap = float(better.mean() - worse.mean())
    yield [
        "candidate",
        "examples",
        "discordance",
        "true change",
        "max_drop",
        "refused by the interval",
        "as too coarse",
        "in total",
        "as worse",
    ]
    for n, drop in ((500, 0.04), (1000, 0.025), (2000, 0.018), (4000, 0.012)):
        yield ["as good", *sampled(*pairs[0], n, drop)]
    for n in SIZES:
        yield ["at the limit", *sampled(worse, better, n, gap)]


def sampled(candidate: Any, baseline: Any, n: int, drop: float) -> list[str]:
    """Many sets of n examples of the 200,000, each through the whole gate."""
    generator, found = np.random.default_rng(n), []
    for _ in range(TRIALS // 2):
        rows = generator.choice(len(candidate), n, replace=False)
        found.append(verdict(candidate[rows], baseline[rows], drop))
    refused, coarse = np.array(found).T
    facts = [
        str(n),
        percent(candidate != baseline),
        f"{100 * float((candidate - baseline).mean()):+.2f} points",
    ]
    shown = (refused, coarse & ~refused, refused | coarse, refused & ~coarse)
    return [*facts, f"{100 * drop:.2f} points", *(percent(x) for x in shown)]


def verdict(candidate: Any, baseline: Any, drop: float) -> tuple[bool, bool]:
    """Whether the interval refused, and whether the set was called coarse."""
    engines = {"candidate": Measured("executed", candidate), "baseline": Measured("executed", baseline)}
    rules = judge(Measurements("accuracy", engines), Gate(max_drop=drop)).rules
    return not rules[1].passed, not rules[2].passed


def trained() -> list[Any]:
    """Six small networks, other seeds: right or wrong on each of 200,000 rows."""
    from sklearn.datasets import make_classification
    from sklearn.neural_network import MLPClassifier

    x, y = make_classification(204_000, n_features=20, n_informative=12, class_sep=1.0, random_state=0)
    right = []
    for seed in range(6):
        network = MLPClassifier((32,), max_iter=200, random_state=seed, early_stopping=True)
        right.append((network.fit(x[:4000], y[:4000]).predict(x[4000:]) == y[4000:]).astype(float))
    return right


PARTS: dict[str, Callable[[], None]] = {
    part.__name__: part for part in (accuracy, metrics, seeds, rounds, engines)
}

if __name__ == "__main__":
    for wanted in sys.argv[1:] or PARTS:
        PARTS[wanted]()
