"""2:4 and random zeros, with and without SPARSE_WEIGHTS, on perceptrons: what ran and how fast."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.tensorrt import mlp
from benchmarks.tensorrt.report import Report
from tasks.engines import tensorrt, tensorrt_build, tensorrt_parity
from tasks.engines import tensorrt_api as api
from tasks.engines import tensorrt_choose as choose
from tasks.engines.tensorrt_options import Options
from tasks.engines.tensorrt_run import TensorRTSession, load


def sparsity(clip: Path, report: Report) -> None:
    """Dense, 2:4, 2:4 with SPARSE_WEIGHTS, random zeros as control: what ran and how fast, interleaved."""
    for rows in (8192, 128):
        for width in (4096, 1024, 8192):
            for kind in ("fp16", "int8"):
                report.add(f"{kind} {width} wide {rows} rows", _sparse(width, rows, kind))


def _sparse(width: int, rows: int, kind: str) -> dict[str, Any]:
    variants = {
        "dense": ("dense", False),
        "2:4": ("2:4", False),
        "2:4, SPARSE_WEIGHTS": ("2:4", True),
        "random zeros, SPARSE_WEIGHTS": ("random", True),
    }
    feed, sessions = mlp.feed(width, rows), {}
    row: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        for variant, (zeros, flag) in variants.items():
            folder = Path(name) / variant.replace(" ", "_").replace(":", "")
            model = mlp.mlp(width, rows, kind=kind, zeros=zeros)
            folder.mkdir()
            onnx.save(model, folder / "model.onnx")
            built = _build_here(folder, kind, Options(level=5, sparse=flag))
            row[variant] = {"build_seconds": built["seconds"], "bytes": built["bytes"], "ms": []}
            proof = tensorrt.proof(folder / "plan")
            row[variant] |= {k: proof[k] for k in ("sparse_share", "quantized_share", "tactics", "types")}
            held, _ = load(folder / "plan")
            sessions[variant] = TensorRTSession(held)
            outputs = sessions[variant].run(feed)["y"][:32]
            right = _right(model, feed["x"][:32])
            row[variant]["error"] = tensorrt_parity.error({"y": outputs}, {"y": right})
        for _ in range(10):
            for variant, session in sessions.items():
                row[variant]["ms"].append(statistics.median(session.latencies(feed, 20, warmup=3)))
        for session in sessions.values():
            session.__exit__(None, None, None)
    for found in row.values():
        found["ms"] = statistics.median(found["ms"])
        found["ratio"] = row["dense"]["ms"] / found["ms"]
    return row


def _right(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """The perceptron in float32 on a few rows (INT8 is then off by its quantization too)."""
    values = {t.name: onnx.numpy_helper.to_array(t).astype(np.float32) for t in model.graph.initializer}
    for i in range(3):
        x = np.maximum(x @ values[f"w{i}"] + values[f"b{i}"], 0)
    return x


def _build_here(folder: Path, kind: str, options: Options) -> dict[str, Any]:
    """A sealed plan, built in this process to spare its start-up."""
    path = folder / "plan" / "engine.plan"
    path.parent.mkdir()
    kinds = ("fp16",) if kind == "fp16" else ("fp16", "int8")
    job = tensorrt_build.Job(
        str(folder / "model.onnx"),
        str(path),
        "tensorrt",
        options,
        [{}],
        kinds,
        False,
        str(folder.parent / "cache"),
    )
    made = tensorrt_build.build_here(job)
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
