"""How often the gate is wrong about latency, in simulated rounds and on real engines.

python -m benchmarks.gate rounds engines     the engines want a quiet machine
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gate_tables import CONFIDENCE, TRIALS, Table, percent, table
from recipes.schema import Benchmark
from tasks import benchmark, statistics

ENGINE_TRIALS, ROUNDS, CALLS = 100, 30, 20
SLOWER = (0.0, 0.03, 0.05, 0.10)


def rounds() -> None:
    """Simulated latency: noise of rounds, with hiccups that hit one of the two."""
    table("Simulated rounds: passed at a limit of 1.05 (last: told from noise)", simulated_rounds())
    table(
        "Simulated rounds beside the baseline, 30 to 120 until half the interval is 10 %", beside_baseline()
    )


def simulated_rounds() -> Table:
    """The interval moves with the truth, so one set of trials serves every slowdown."""
    yield ["rounds", "noise of a round", *(f"true {1 + s:.2f}" for s in SLOWER), "told: 1.03", "1.05", "1.10"]
    for count in (6, 10, 20, 40):
        for noise in (0.02, 0.05):
            yield [str(count), f"{100 * noise:g} %", *simulated(noise, count, count)[0]]
    for noise in (0.02, 0.05, 0.1):
        row, taken = simulated(noise, 30, 120)
        yield [f"30 to 120, {taken:.0f} on average", f"{100 * noise:g} %", *row]


def beside_baseline() -> Table:
    """How many rounds the wider interval takes."""
    yield ["noise of a round", "rounds on average", "30 were enough"]
    width = benchmark.COARSE * Benchmark().precision
    for noise in (0.02, 0.05, 0.1, 0.2, 0.3):
        generator = np.random.default_rng(0)
        pairs = [[round_times(generator, 120, noise) for _ in range(2)] for _ in range(100)]
        taken = np.array([enough(pair, 30, 120, width) for pair in pairs])
        yield [f"{100 * noise:g} %", f"{taken.mean():.0f}", percent(taken == 30)]


def simulated(noise: float, least: int, most: int) -> tuple[list[str], float]:
    """Shares passed and told at each slowdown, and the rounds taken, as the stage `benchmark` takes them."""
    generator, ends, taken = np.random.default_rng(least), [], []
    for seed in range(TRIALS // 2):
        pair = [round_times(generator, most, noise) for _ in range(2)]
        count = enough(pair, least, most, Benchmark().precision)
        ends.append(statistics.bootstrap_rounds(pair[0][:count], pair[1][:count], CONFIDENCE, seed)[1])
        taken.append(count)
    low, high = np.array(ends).T
    passed = [percent(high * (1 + slower) <= 1.05) for slower in SLOWER]
    told = [percent(low * (1 + slower) > 1) for slower in SLOWER[1:]]
    return [*passed, *told], float(np.mean(taken))


def enough(pair: list[Any], least: int, most: int, width: float) -> int:
    """The rounds after which the stage would end: half the interval's width is asked each tenth."""
    found = [[[seconds] for seconds in times] for times in pair]
    widths = (
        (count, benchmark.half_width(found[0][:count], found[1][:count])) for count in range(least, most, 10)
    )
    return next((count for count, half in widths if half <= width), most)


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
