"""What the evidence scripts share: a report kept after every step, saved arrays, latencies."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from tasks.engines import tensorrt
from tasks.engines.tensorrt_run import TensorRTSession


class Report:
    """A JSON file that is written again after every step, so that a run cut short leaves what it had."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Any] = {"device": tensorrt.device(), "tensorrt": tensorrt.version("tensorrt")}

    def add(self, name: str, row: Any) -> None:
        """Keep, write and print one row."""
        self.rows[name] = row
        self.path.write_text(json.dumps(self.rows, indent=1))
        print(name, json.dumps(row)[:1500], flush=True)


def arrays(path: Path) -> dict[str, np.ndarray]:
    """What numpy saved."""
    with np.load(path) as found:
        return {name: found[name] for name in found}


def latency(session: TensorRTSession, feed: Any, count: int = 200) -> dict[str, float]:
    """p50 and p99 in milliseconds."""
    times = session.latencies(feed, count)
    return {"p50": statistics.median(times), "p99": float(np.percentile(times, 99))}
