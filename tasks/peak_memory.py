"""Bytes that opening and running an engine adds to a fresh process, resident at the peak.

python -m tasks.peak_memory RUNTIME PLAN WEIGHTS|- FEED.npz THREADS|-
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from tasks import store
from tasks.artifacts import Engine
from tasks.engines import open_engine

ROOT = Path(__file__).resolve().parent.parent


def measure(engine: Engine, feed: dict[str, np.ndarray], threads: int | None, timeout: float = 600) -> int:
    """Run this file on the engine in a process of its own."""
    weights = str(store.path(engine.weights)) if engine.weights else "-"
    plan = str(store.path(engine.plan.blob))
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        np.savez(file, **feed)  # type: ignore[arg-type]
        file.flush()
        arguments = [engine.plan.runtime, plan, weights, file.name, str(threads or "-")]
        done = subprocess.run(
            [sys.executable, "-m", "tasks.peak_memory", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {plan} failed: {done.stderr.strip()[-500:]}")
    return int(done.stdout.split()[-1])


def main(arguments: list[str]) -> None:
    """Open, run once, print the growth in bytes."""
    runtime, plan, weights, feed, threads = arguments
    if runtime == "onnxruntime":
        import onnxruntime  # noqa: F401  the library itself is not the engine's memory
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    with np.load(feed) as arrays:
        inputs = dict(arrays)
    options = {} if threads == "-" or runtime != "onnxruntime" else {"threads": int(threads)}
    with open_engine(runtime, Path(plan), None if weights == "-" else Path(weights), **options) as session:
        session.run(inputs)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sys.stdout.write(f"{max(0, peak - resident)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
