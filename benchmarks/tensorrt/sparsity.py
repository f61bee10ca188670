"""2:4 and random zeros, with and without SPARSE_WEIGHTS, on perceptrons: what ran and how fast.

A wide plan takes six minutes at level 5, nearly all of it on one core with an idle GPU, so the variants of a
row are built side by side, a process each; what is timed afterwards is alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.tensorrt import mlp
from benchmarks.tensorrt.report import Report, arrays
from tasks.engines import tensorrt, tensorrt_build, tensorrt_parity
from tasks.engines import tensorrt_api as api
from tasks.engines import tensorrt_choose as choose
from tasks.engines.tensorrt_options import Options
from tasks.engines.tensorrt_run import TensorRTSession, load

LEVEL = int(os.environ.get("LEVEL", "5"))  # of the builder; 5 takes minutes for one plan 4096 wide
ORDER = ((8192, 4096), (128, 4096), (8192, 1024), (128, 1024), (8192, 8192), (128, 8192))  # rows, width


def sparsity(clip: Path, report: Report) -> None:
    """Dense, 2:4, 2:4 with SPARSE_WEIGHTS, random zeros as control: what ran and how fast, interleaved.

    The argument ONLY takes names of rows: "fp16 4096 wide 8192 rows,…".
    """
    only = ",".join(sys.argv[4:]).split(",") if sys.argv[4:] else None
    for rows, width in ORDER:
        for kind in ("fp16", "int8"):
            title = f"{kind} {width} wide {rows} rows"
            if only is None or title in only:
                report.add(title, _sparse(width, rows, kind, report, title))


def sparseclip(clip: Path, report: Report) -> None:
    """CLIP in FP16, batch 64: dense, and its 2:4 form with SPARSE_WEIGHTS off and on, interleaved."""
    feed, sessions = arrays(clip / "inputs.npz"), {}
    row: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        for variant, (pruned, flag) in VARIANTS.items():
            folder = Path(name) / variant.replace(" ", "_").replace(":", "")
            folder.mkdir()
            model = onnx.load(clip / "first" / "model.onnx")
            count = mlp.prune(model) if pruned else 0
            onnx.save(model, folder / "model.onnx")
            shapes = [{"pixels": dict.fromkeys(("min", "opt", "max"), feed["pixels"].shape)}]
            row[variant] = _built(folder, "fp16", Options(level=2, sparse=flag), shapes)
            sessions[variant] = TensorRTSession(load(folder / "plan")[0])
            milliseconds = statistics.median(sessions[variant].latencies(feed, 50))
            row[variant] |= {"pruned": count, "ms": milliseconds}
            report.add(variant, row[variant])
        _timed(row, sessions, feed)
    for variant, found in row.items():
        report.add(variant, found)


VARIANTS = {"dense": (False, False), "2:4": (True, False), "2:4, SPARSE_WEIGHTS": (True, True)}


def _sparse(width: int, rows: int, kind: str, report: Report, title: str) -> dict[str, Any]:
    variants = {
        "dense": ("dense", False),
        "2:4": ("2:4", False),
        "2:4, SPARSE_WEIGHTS": ("2:4", True),
        "random zeros, SPARSE_WEIGHTS": ("random", True),
    }
    feed, sessions = mlp.feed(width, rows), {}
    row: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        models = {
            variant: mlp.mlp(width, rows, kind=kind, zeros=variants[variant][0]) for variant in variants
        }
        folders = {variant: Path(name) / str(k) for k, variant in enumerate(variants)}
        for variant, folder in folders.items():
            folder.mkdir()
            onnx.save(models[variant], folder / "model.onnx")
        _side_by_side([[str(folders[v]), kind, str(int(flag))] for v, (_, flag) in variants.items()])
        for variant, folder in folders.items():
            row[variant] = json.loads((folder / "row.json").read_text())
            sessions[variant] = TensorRTSession(load(folder / "plan")[0])
            outputs = sessions[variant].run(feed)["y"][:32]
            right = _right(models[variant], feed["x"][:32])
            row[variant]["error"] = tensorrt_parity.error({"y": outputs}, {"y": right})
            row[variant]["ms"] = statistics.median(sessions[variant].latencies(feed, 50))
            report.add(f"{title}, not interleaved", row)
        _timed(row, sessions, feed)
    return row


def _side_by_side(calls: list[list[str]]) -> None:
    """This module's own command line, a process for each call; RuntimeError where one fails."""
    command = [sys.executable, "-m", "benchmarks.tensorrt.sparsity"]
    running = [subprocess.Popen([*command, *call]) for call in calls]
    try:
        if any([process.wait() for process in running]):  # noqa: C419  every one is waited for
            raise RuntimeError(f"a build failed: {[process.returncode for process in running]}")
    finally:
        for process in running:
            process.kill()


def _built(folder: Path, kind: str, options: Options, profiles: list[Any]) -> dict[str, Any]:
    """A plan built here, and its row."""
    built = _build_here(folder, kind, options, profiles)
    proof = tensorrt.proof(folder / "plan")
    row = {"build_seconds": built["seconds"], "bytes": built["bytes"], "tried": built["tried"]}
    return row | {k: proof[k] for k in ("sparse_share", "quantized_share", "tactics", "types")}


def _timed(row: dict[str, dict[str, Any]], sessions: dict[str, TensorRTSession], feed: Any) -> None:
    """Ten interleaved rounds: each variant's median, and the dense one's over it; sessions are closed."""
    times: dict[str, list[float]] = {variant: [] for variant in sessions}
    for _ in range(10):
        for variant, session in sessions.items():
            times[variant].append(statistics.median(session.latencies(feed, 20, warmup=3)))
    for session in sessions.values():
        session.__exit__(None, None, None)
    for variant, found in row.items():
        found["ms"] = statistics.median(times[variant])
        found["spread"] = max(times[variant]) / min(times[variant]) - 1
        found["ratio"] = statistics.median(times["dense"]) / found["ms"]


def _right(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """The perceptron in float32 on a few rows (INT8 is then off by its quantization too)."""
    values = {t.name: onnx.numpy_helper.to_array(t).astype(np.float32) for t in model.graph.initializer}
    for i in range(3):
        x = np.maximum(x @ values[f"w{i}"] + values[f"b{i}"], 0)
    return x


def _build_here(folder: Path, kind: str, options: Options, profiles: list[Any]) -> dict[str, Any]:
    """A sealed plan, built in this process to spare its start-up."""
    path = folder / "plan" / "engine.plan"
    path.parent.mkdir()
    kinds = ("fp16",) if kind == "fp16" else ("fp16", "int8")
    job = tensorrt_build.Job(
        str(folder / "model.onnx"),
        str(path),
        "tensorrt",
        options,
        profiles,
        kinds,
        False,
        None,
    )
    made = _overheard(job)
    gpu = api.gpu()
    assert gpu is not None
    manifest = {
        "graph": "",
        "runtime": "tensorrt",
        "version": tensorrt.version("tensorrt"),
        "device": str(gpu),
        "capability": list(gpu.capability),
        "platform": api.platform_name(),
        "hardware": "none",
        "version_compatible": False,
    }
    choose.seal(manifest, job, {**choose.NO_REFIT, "reason": ""})
    return made


def _overheard(job: tensorrt_build.Job) -> dict[str, Any]:
    """The build, and what the builder says of sparsity and of the kernels that it timed."""
    api.use("tensorrt")
    from polygraphy.logger import G_LOGGER

    told = io.StringIO()
    with contextlib.redirect_stdout(told), G_LOGGER.verbosity(G_LOGGER.EXTRA_VERBOSE):
        made = tensorrt_build.build_here(job)
    return made | {"tried": kernels(told.getvalue())}


def kernels(log: str) -> dict[str, Any]:
    """Sparse and dense kernels in a builder's verbose log: how many were timed, the fastest of each."""
    timed: dict[str, list[tuple[float, str]]] = {"sparse": [], "dense": []}
    for name, milliseconds in re.findall(r"Tactic Name: (\S+) Tactic: \S+ Time: ([\d.]+)", log):
        if "gemm" in name or "conv" in name or "fprop" in name:
            timed["sparse" if "sparse" in name else "dense"].append((float(milliseconds), name))
    said = list(dict.fromkeys(line.strip()[:300] for line in log.splitlines() if "Sparsity" in line))
    found = {kind: {"timed": len(rows), "fastest": min(rows, default=None)} for kind, rows in timed.items()}
    return {**found, "said": said[:10], "lines": log.count("\n")}


if __name__ == "__main__":
    place, wanted, sparse = Path(sys.argv[1]), sys.argv[2], bool(int(sys.argv[3]))
    found = _built(place, wanted, Options(level=LEVEL, sparse=sparse), [{}])
    (place / "row.json").write_text(json.dumps(found))
