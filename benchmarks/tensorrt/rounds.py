"""The pipeline's own latency rounds and memory on real TensorRT engines; one of them twice, as a control."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.tensorrt import mlp
from benchmarks.tensorrt.report import Report, arrays
from tasks import timing
from tasks.engines import tensorrt

WIDTH, ROWS = 4096, 512
ROUNDS, ROUND_MS, WARMUP = 30, 20.0, 3  # a recipe's defaults


def rounds(clip: Path, report: Report) -> None:
    """On a perceptron built here, then on the CLIP plans that the step `refit` left."""
    folder = report.path.with_suffix("")
    plans = {}
    for kind in ("fp16", "int8"):
        plans[kind] = folder / kind / "plan"
        report.add(f"build {kind}", _build(folder / kind, kind))
    feed = mlp.feed(WIDTH, ROWS)
    _compare(
        report, "perceptron", {"fp16": plans["fp16"], "again": plans["fp16"], "int8": plans["int8"]}, feed
    )
    left = {
        "plain": report.path.parent / "refit/c/plan",
        "refittable": report.path.parent / "refit/a/plan",
    }
    if all((plan / "plan.json").exists() for plan in left.values()):
        pixels = {"pixels": arrays(clip / "inputs.npz")["pixels"][:8]}
        _compare(report, "clip", {**left, "again": left["plain"]}, pixels)


def _build(folder: Path, kind: str) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(mlp.mlp(WIDTH, ROWS, kind=kind), folder / "model.onnx")
    feed = mlp.feed(WIDTH, ROWS)
    options: dict[str, Any] = {"level": 1, "refit": "never"}
    return tensorrt.build(folder / "model.onnx", folder, samples=[feed], half=True, **options).facts


def _compare(report: Report, name: str, plans: dict[str, Path], feed: Any) -> None:
    """Interleaved rounds of all, raw, and each one's memory."""
    report.add(f"{name} memory", {title: _memory(plan, feed, report.path) for title, plan in plans.items()})
    with ExitStack() as stack:
        sessions = {title: stack.enter_context(tensorrt.open(plan, None)) for title, plan in plans.items()}
        size = next(iter(feed.values())).shape[0]
        feeds = {title: {size: feed} for title in plans}
        found = timing.interleaved(sessions, feeds, rounds=range(ROUNDS), round_ms=ROUND_MS, warmup=WARMUP)
    report.add(
        f"{name} p50 ms",
        {title: float(np.median(np.concatenate(by_size[size])) * 1000) for title, by_size in found.items()},
    )
    report.path.with_name(f"{report.path.stem}-{name}-seconds.json").write_text(json.dumps(found))


def _memory(plan: Path, feed: Any, beside: Path) -> Any:
    """`tasks.peak_memory`, as the pipeline runs it."""
    file = beside.with_suffix(".npz")
    np.savez(file, **feed)
    command = [sys.executable, "-m", "tasks.peak_memory", "tensorrt", str(plan), "-", str(file), "-"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        return {"status": done.returncode, "said": done.stderr.strip()[-500:]}
    return {**json.loads(done.stdout.splitlines()[-1]), "plan": (plan / "engine.plan").stat().st_size}
