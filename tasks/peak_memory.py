"""Bytes that opening and running an engine adds to a fresh process: resident at the peak, and on the GPU.

python -m tasks.peak_memory RUNTIME PLAN WEIGHTS|- FEED.npz THREADS|-
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tasks import store
from tasks.artifacts import Engine
from tasks.engines import open_engine, tensorrt

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Memory:
    """Bytes: resident at the process's peak; on the GPU while the engine is open, None without one."""

    resident: int
    device: int | None

    @property
    def engine(self) -> int:
        """What the engine is judged by: the GPU's memory where it runs on one."""
        return self.resident if self.device is None else self.device


def measure(engine: Engine, feed: dict[str, np.ndarray], threads: int | None, timeout: float = 600) -> Memory:
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
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def main(arguments: list[str]) -> None:
    """Open, run once, print the growth as JSON."""
    runtime, plan, weights, feed, threads = arguments
    on_gpu = runtime != "onnxruntime"
    if not on_gpu:
        import onnxruntime  # noqa: F401  the library itself is not the engine's memory
    device = tensorrt.device_bytes(runtime) if on_gpu else 0
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    with np.load(feed) as arrays:
        inputs = dict(arrays)
    options = {} if threads == "-" or on_gpu else {"threads": int(threads)}
    with open_engine(runtime, Path(plan), None if weights == "-" else Path(weights), **options) as session:
        session.run(inputs)
        added = tensorrt.device_bytes(runtime) - device if on_gpu else None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sys.stdout.write(json.dumps(asdict(Memory(max(0, peak - resident), added))) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
