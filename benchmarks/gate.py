"""How often the gate is wrong: planted truth, counted. Prints the tables of docs/gate.md.

python -m benchmarks.gate             everything, one process; the engines want a quiet machine
python -m benchmarks.gate accuracy    some parts: accuracy, metrics, seeds, rounds, engines
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from recipes.gate import Gate
from tasks import statistics
from tasks.gate import judge
from tasks.measurements import Measured, Measurements
from tasks.metrics import metric

TRIALS, ENGINE_TRIALS, ROUNDS, CALLS = 2000, 100, 30, 20
SIZES = (250, 500, 1000, 2000, 4000)
DROPS = (0.005, 0.01, 0.02)
ALLOWED = (*DROPS, 0.03)
DISCORDANCE = (0.01, 0.03, 0.10)
SLOWER = (0.0, 0.03, 0.05, 0.10)
CONFIDENCE = 0.95
Table = Iterator[list[str]]


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
    yield ["examples", "discordance", *heads, "most refused without a word of coarseness"]
    for n in SIZES:
        for discordance in DISCORDANCE:
            found = [refusals(n, discordance, drop) for drop in ALLOWED]
            worst = max(float(unexplained.mean()) for _, _, unexplained in found)
            yield [str(n), f"{100 * discordance:g} %", *(shares(*f[:2]) for f in found), percent(worst)]


def shares(refused: Any, coarse: Any) -> str:
    """By the interval, as too coarse, for either reason."""
    text = " / ".join(percent(x) for x in (refused, coarse, refused | coarse))
    return f"**{text}**" if refused.mean() <= (1 - CONFIDENCE) / 2 else text


def refusals(n: int, discordance: float, drop: float) -> tuple[Any, Any, Any]:
    """Of equally good engines: refused by the interval, as coarse, by the interval without a reason why."""
    wins, losses = counts(n, discordance, 0.0, seed=n)
    low, high = statistics.tango(wins, losses, n, CONFIDENCE)
    value, floor = np.array([told(int(k), n) for k in wins + losses]).T
    refused, open_ = low <= -drop, (low < 0) & (high > -drop)
    return refused, (floor > drop) & open_, refused & (value <= drop)


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
        "without a word of coarseness",
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
    refused, coarse, said = np.array(found).T
    facts = [
        str(n),
        percent(candidate != baseline),
        f"{100 * float((candidate - baseline).mean()):+.2f} points",
    ]
    shown = (refused, coarse & ~refused, refused | coarse, refused & ~said)
    return [*facts, f"{100 * drop:.2f} points", *(percent(x) for x in shown)]


def verdict(candidate: Any, baseline: Any, drop: float) -> tuple[bool, bool, bool]:
    """Whether the interval refused, whether the set was called coarse, whether its sentence says so."""
    engines = {"candidate": Measured("executed", candidate), "baseline": Measured("executed", baseline)}
    rules = judge(Measurements("accuracy", engines), Gate(max_drop=drop)).rules
    return not rules[1].passed, not rules[2].passed, "coarse" in rules[2].sentence


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


def rounds() -> None:
    """Simulated latency: noise of rounds, with hiccups that hit one of the two."""
    table("Simulated rounds: passed at a limit of 1.05 (last: told from noise)", simulated_rounds())


def simulated_rounds() -> Table:
    """The interval moves with the truth, so one set of trials serves every slowdown."""
    yield ["rounds", "noise of a round", *(f"true {1 + s:.2f}" for s in SLOWER), "told: 1.03", "1.05", "1.10"]
    for count in (6, 10, 20, 40):
        for noise in (0.02, 0.05):
            generator, ends = np.random.default_rng(count), []
            for seed in range(TRIALS // 2):
                pair = [round_times(generator, count, noise) for _ in range(2)]
                ends.append(statistics.bootstrap_rounds(pair[0], pair[1], CONFIDENCE, seed)[1])
            low, high = np.array(ends).T
            passed = [percent(high * (1 + slower) <= 1.05) for slower in SLOWER]
            told = [percent(low * (1 + slower) > 1) for slower in SLOWER[1:]]
            yield [str(count), f"{100 * noise:g} %", *passed, *told]


def round_times(generator: Any, count: int, noise: float) -> Any:
    """Relative p50 of each round: log-normal, and one in ten hit by something else (30 % on average)."""
    hit = (generator.random(count) < 0.1) * generator.exponential(0.3, count)
    return np.exp(noise * generator.standard_normal(count) + hit)


def engines() -> None:
    """The same ONNX Runtime engine against itself, and against itself slowed by a known amount."""
    load = os.getloadavg()[0]
    title = (
        f"Real engines, {ENGINE_TRIALS} trials of {ROUNDS} rounds of {CALLS} calls (load {load:.1f} before)"
    )
    table(title, real_engines())


def real_engines() -> Table:
    """Five contestants take turns in every round, and the order turns, too; the first is the reference."""
    trials = list(timed_trials())
    yield [
        "slower by",
        "median ratio",
        "interval wholly off 1",
        "passed at 1.05",
        "interval's half width",
    ]
    for place, slower in enumerate(SLOWER, start=1):
        found = [statistics.bootstrap_rounds(t[place], t[0], CONFIDENCE, i) for i, t in enumerate(trials)]
        ratios, ends = np.array([f[0] for f in found]), np.array([f[1] for f in found])
        off = (ends[:, 0] > 1) | (ends[:, 1] < 1)
        half = float(np.median(ends[:, 1] - ends[:, 0]) / 2)
        row = [f"{100 * slower:g} %", f"{np.median(ratios):.4f}", percent(off), percent(ends[:, 1] <= 1.05)]
        yield [*row, f"{half:.4f}"]


def timed_trials() -> Iterator[Any]:
    """Per trial the p50 of every contestant's rounds, of shape (contestants, rounds)."""
    from contextlib import ExitStack

    from tasks.engines import onnxruntime

    feed = {"x": np.random.default_rng(0).standard_normal((16, 256)).astype(np.float32)}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        layers(folder / "model.onnx", 12)
        onnxruntime.build(folder, folder / "built", samples=[feed], threads=1)
        plan, weights = folder / "built" / "plan", folder / "built" / "weights"
        opened = [
            stack.enter_context(onnxruntime.open(plan, weights if weights.exists() else None, threads=1))
            for _ in range(1 + len(SLOWER))
        ]
        pairs = list(zip(opened, (0.0, *SLOWER), strict=True))
        for session in opened * 50:
            session.run(feed)
        for _ in range(ENGINE_TRIALS):
            yield np.array([turn(pairs, feed, number) for number in range(ROUNDS)]).T


def turn(pairs: list[tuple[Any, float]], feed: Any, number: int) -> list[float]:
    """One round: the p50 of each contestant, who starts changes."""
    found = {}
    for place in np.roll(np.arange(len(pairs)), number):
        session, slower = pairs[place]
        found[int(place)] = float(np.median([seconds(session, slower, feed) for _ in range(CALLS)]))
    return [found[place] for place in sorted(found)]


def seconds(session: Any, slower: float, feed: Any) -> float:
    """One call; a slowed one then waits, spinning, for the given share of its own time."""
    start = time.perf_counter()
    session.run(feed)
    end = start + (time.perf_counter() - start) * (1 + slower)
    while slower and time.perf_counter() < end:
        pass
    return time.perf_counter() - start


def layers(path: Path, depth: int) -> None:
    """A chain of matrix products and ReLUs, about half a millisecond."""
    import onnx
    from onnx import helper, numpy_helper

    generator = np.random.default_rng(0)
    weights = [generator.standard_normal((256, 256)).astype(np.float32) / 16 for _ in range(depth)]
    nodes, last = [], "x"
    for i in range(depth):
        nodes.append(helper.make_node("MatMul", [last, f"w{i}"], [f"m{i}"]))
        nodes.append(helper.make_node("Relu", [f"m{i}"], [f"r{i}"]))
        last = f"r{i}"
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["batch", 256]) for n in ("x", last)]
    stored = [numpy_helper.from_array(weight, f"w{i}") for i, weight in enumerate(weights)]
    graph = helper.make_graph(nodes, "layers", ends[:1], ends[1:], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


def percent(values: Any) -> str:
    """A share of trials."""
    return f"{100 * float(np.mean(values)):.1f} %"


def table(title: str, rows: Table) -> None:
    """One Markdown table."""
    began = time.perf_counter()
    head, *body = list(rows)
    print(f"\n### {title}\n")
    for row in (head, ["--:"] * len(head), *body):
        print(f"| {' | '.join(row)} |")
    print(f"\n{time.perf_counter() - began:.0f} s", flush=True)


PARTS: dict[str, Callable[[], None]] = {
    part.__name__: part for part in (accuracy, metrics, seeds, rounds, engines)
}

if __name__ == "__main__":
    for wanted in sys.argv[1:] or PARTS:
        PARTS[wanted]()
