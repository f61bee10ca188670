"""Measure latency and memory of engines side by side: interleaved rounds, real inputs, nothing dropped.

python -m flows optimize RECIPE     (stage `benchmark`)
"""

from __future__ import annotations

import json
import math
import os
import time
from contextlib import ExitStack
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from recipes.schema import Benchmark
from tasks import batches, peak_memory, store, types
from tasks.artifacts import Dataset, Engine, Metrics
from tasks.engines.common import OnDevice, Session
from tasks.measurements import latency_summary
from tasks.running import opened
from tasks.stage import stage


@stage(uses=("onnxruntime", "tensorrt", "numpy"), name="benchmark", gpu=True, timeout_seconds=3600)
def benchmark(
    engines: dict[str, Engine], dataset: Dataset, section: Benchmark, threads: int | None, host: str
) -> Metrics:
    """Seconds per call: engine -> batch size -> rounds -> calls, in `latency.json`; peak memory in bytes.

    One benchmark at a time on a host: a file lock keeps a second one waiting.
    """
    inputs = {
        name: {size: _batch(dataset, engine, size) for size in section.batch_sizes}
        for name, engine in engines.items()
    }
    lock = FileLock(store.home() / "benchmark.lock")
    with lock, ExitStack() as stack:
        before = os.getloadavg()[0]
        sessions = {name: stack.enter_context(opened(engine, threads)) for name, engine in engines.items()}
        rounds = _rounds(sessions, inputs, section)
        largest = max(section.batch_sizes)
        memory = {
            name: peak_memory.measure(engine, inputs[name][largest], threads)
            for name, engine in engines.items()
        }
    with store.staging() as folder:
        (folder / "latency.json").write_text(json.dumps(rounds))
        blob = store.commit(folder)
    values: dict[str, float] = {f"{name}_peak_memory": float(size) for name, size in memory.items()}
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
        "rounds": section.rounds,
        "round_ms": section.round_ms,
        "warmup": section.warmup,
        "shapes": {
            str(size): {k: list(v.shape) for k, v in feed.items()}
            for size, feed in inputs["candidate"].items()
        },
    }
    return Metrics(values, blob, facts)


def _batch(dataset: Dataset, engine: Engine, size: int) -> types.Example:
    encoded, _ = batches.examples(dataset, "test", store.path(engine.preprocessor))
    chosen = np.random.default_rng(0).integers(len(encoded), size=size)
    return types.load(dataset.type).collate([encoded[k] for k in chosen])


Feeds = dict[str, dict[int, types.Example]]


def _rounds(
    sessions: dict[str, Session], inputs: Feeds, section: Benchmark
) -> dict[str, dict[int, list[list[float]]]]:
    calls = {size: _calls(sessions, inputs, size, section) for size in section.batch_sizes}
    found: dict[str, dict[int, list[list[float]]]] = {name: {size: [] for size in calls} for name in sessions}
    names = list(sessions)
    for number in tqdm(range(section.rounds), desc="benchmark", unit="round"):
        for size, count in calls.items():
            for name in names if number % 2 == 0 else reversed(names):
                found[name][size].append(_seconds(sessions[name], inputs[name][size], count))
    return found


def _calls(sessions: dict[str, Session], inputs: Feeds, size: int, section: Benchmark) -> int:
    """Warm up; how many calls of the fastest engine make a round long enough to time."""
    fastest = min(
        min(_seconds(session, inputs[name][size], section.warmup)) for name, session in sessions.items()
    )
    return max(1, math.ceil(section.round_ms / 1000 / fastest))


def _seconds(session: Session, feed: types.Example, count: int) -> list[float]:
    """Seconds of each call: by device events where the session has them, else by the clock."""
    if isinstance(session, OnDevice):
        return [milliseconds / 1000 for milliseconds in session.latencies(feed, count, 0)]
    calls = []
    for _ in range(count):
        started = time.perf_counter()
        session.run(feed)
        calls.append(time.perf_counter() - started)
    return calls


def _clocks() -> list[float]:
    try:
        with open("/proc/cpuinfo") as lines:
            return [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    except OSError:
        return []


def loaded(timing: Metrics) -> dict[str, dict[int, Any]]:
    """What `latency.json` holds, batch sizes as numbers again."""
    assert timing.blob is not None
    content = json.loads((store.path(timing.blob) / "latency.json").read_text())
    return {name: {int(size): rounds for size, rounds in by.items()} for name, by in content.items()}
