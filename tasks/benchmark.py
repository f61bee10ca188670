"""Measure latency and memory of engines side by side: interleaved rounds, real inputs, nothing dropped.

python -m flows optimize RECIPE     (stage `benchmark`)
"""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from recipes.schema import Benchmark
from tasks import batches, peak_memory, statistics, store, timing, types
from tasks.artifacts import Dataset, Engine, Metrics
from tasks.measurements import BASELINE, CANDIDATE, CHAMPION, Rounds, latency_summary
from tasks.running import opened
from tasks.stage import stage

COARSE = 5
"""How many times as wide the interval beside the baseline may be: its limit is usually far from 1."""


@stage(uses=("onnxruntime", "tensorrt", "numpy"), name="benchmark", gpu=True, timeout_seconds=3600)
def benchmark(
    engines: dict[str, Engine], dataset: Dataset, section: Benchmark, threads: int | None, host: str
) -> Metrics:
    """Seconds per call: engine -> batch size -> rounds -> calls, in `latency.json`; peak memory in bytes
    (on the device where the engine runs on one, else resident; `facts` has both).

    One benchmark at a time on a host: a file lock keeps a second one waiting.
    """
    inputs = {
        name: {size: _batch(dataset, engine, size) for size in section.batch_sizes}
        for name, engine in engines.items()
    }
    with FileLock(store.home() / "benchmark.lock"):
        before = os.getloadavg()[0]
        rounds = _rounds(engines, inputs, section, threads)
        largest = max(section.batch_sizes)
        memory = {
            name: peak_memory.measure(engine, inputs[name][largest], threads)
            for name, engine in engines.items()
        }
    with store.staging() as folder:
        (folder / "latency.json").write_text(json.dumps(rounds))
        blob = store.commit(folder)
    values: dict[str, float] = {f"{name}_peak_memory": float(used.engine) for name, used in memory.items()}
    for name, by_size in rounds.items():
        for size, calls in by_size.items():
            summary = latency_summary(calls, size)
            values |= {f"{name}_{key}_b{size}": summary[key] for key in ("p50", "p99", "throughput")}
    facts = {
        "host": host,
        "threads": threads or os.cpu_count(),
        "load_before": before,
        "load_after": os.getloadavg()[0],
        "clocks_mhz": _clocks(),
        "memory": {name: asdict(used) for name, used in memory.items()},
        "rounds": len(next(iter(rounds[CANDIDATE].values()))),
        "round_ms": section.round_ms,
        "warmup": section.warmup,
        "shapes": {
            str(size): {k: list(v.shape) for k, v in feed.items()}
            for size, feed in inputs["candidate"].items()
        },
    }
    return Metrics(values, blob, facts)


def precise(section: Benchmark, found: timing.Seconds) -> bool:
    """Enough rounds, and (asked each tenth) what candidate is to the others is known well enough.

    To a champion within `precision`, as its limit is close to 1; to the baseline within five times that. How
    wide the interval is decides, never where it lies, or rounds would go on until they look right.
    """
    done = len(next(iter(found[CANDIDATE].values())))
    if done < section.rounds or (done - section.rounds) % 10:
        return False
    wanted = {CHAMPION: section.precision, BASELINE: COARSE * section.precision}
    return all(
        half_width(rounds, found[name][size]) <= wanted[name]
        for name in wanted
        if name in found
        for size, rounds in found[CANDIDATE].items()
    )


def half_width(rounds: Rounds, others: Rounds) -> float:
    """Half the 95 % interval of the ratio of two engines' paired rounds, as a share of the ratio."""
    ours, theirs = (np.array([np.median(calls) for calls in each]) for each in (rounds, others))
    ratio, (low, high) = statistics.bootstrap_rounds(ours, theirs, 0.95, seed=len(ours))
    return (high - low) / 2 / ratio


def _rounds(
    engines: dict[str, Engine], inputs: timing.Feeds, section: Benchmark, threads: int | None
) -> timing.Seconds:
    """Seconds of each call, every engine open at once; all are closed before memory is measured."""
    with ExitStack() as stack:
        return timing.interleaved(
            {name: stack.enter_context(opened(engine, threads)) for name, engine in engines.items()},
            inputs,
            rounds=tqdm(range(section.max_rounds or 4 * section.rounds), desc="benchmark", unit="round"),
            round_ms=section.round_ms,
            warmup=section.warmup,
            enough=partial(precise, section),
        )


def _batch(dataset: Dataset, engine: Engine, size: int) -> types.Example:
    encoded, _ = batches.examples(dataset, "test", store.path(engine.preprocessor))
    chosen = np.random.default_rng(0).integers(len(encoded), size=size)
    return types.load(dataset.type).collate([encoded[k] for k in chosen])


def _clocks() -> list[float]:
    try:
        with open("/proc/cpuinfo") as lines:
            return [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    except OSError:
        return []


def loaded(measured: Metrics) -> dict[str, dict[int, Any]]:
    """What `latency.json` holds, batch sizes as numbers again."""
    assert measured.blob is not None
    content = json.loads((store.path(measured.blob) / "latency.json").read_text())
    return {name: {int(size): rounds for size, rounds in by.items()} for name, by in content.items()}
