"""The evidence of docs/tensorrt.md, on a GPU with TensorRT 8.6, through the engine module itself.

`python -m benchmarks.tensorrt.clip CLIP 64 24` first, where PyTorch is; then, where TensorRT is,
`python -m benchmarks.tensorrt.h100 refit|int8refit|precision|sparsity|features CLIP OUT.json`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx

from benchmarks.tensorrt import qdq
from benchmarks.tensorrt.features import features
from benchmarks.tensorrt.report import Report, arrays, latency
from benchmarks.tensorrt.sparsity import sparsity
from tasks.engines import tensorrt
from tasks.engines.common import RefitError

LEVEL = 2  # optimization level of the CLIP builds: 3 takes about twice as long


def refit(clip: Path, report: Report) -> None:
    """FP16 refit with another training's weights against a rebuild: seconds, parity, tax."""
    feed = [arrays(clip / "inputs.npz")]
    first, second = [arrays(clip / "first.npz")], [arrays(clip / "second.npz")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        built = tensorrt.build(
            clip / "first", folder / "a", samples=feed, reference=first, refit="always", level=LEVEL
        )
        report.add("build", asdict(built))
        rows = []
        for _ in range(3):
            done = tensorrt.refit(
                folder / "a/plan", clip / "second", folder / "b", samples=feed, reference=second
            )
            rows.append(done.facts)
        report.add("refits", rows)
        with tensorrt.open(folder / "a/plan", folder / "b/weights") as session:
            report.add("refitted latency", latency(session, feed[0]))
        start = time.perf_counter()
        again = tensorrt.build(
            clip / "second", folder / "c", samples=feed, reference=second, refit="never", level=LEVEL
        )
        report.add("rebuild", {**asdict(again), "wall_seconds": time.perf_counter() - start})
        with tensorrt.open(folder / "c/plan", None) as session:
            report.add("rebuilt latency", latency(session, feed[0]))
        fastest = min(row["refit_seconds"] for row in rows)
        slowest = max(row["refit_seconds"] for row in rows)
        seconds = again.facts["build_seconds"]
        report.add("ratio", {"best": seconds / fastest, "worst": seconds / slowest})


def precision(clip: Path, report: Report) -> None:
    """FP16, INT8 and FP32 (no TF32) at a fixed batch: bytes, build seconds, latency, cosine."""
    feed, right = [arrays(clip / "inputs.npz")], [arrays(clip / "first.npz")]
    _int8_model(clip, "first")
    shape = feed[0]["pixels"].shape
    still = [{"pixels": {"min": shape, "opt": shape, "max": shape}}]
    rows: dict[str, tuple[str, dict[str, Any]]] = {
        "FP16": ("first", {}),
        "INT8": ("int8-first", {"half": True}),
        "FP32": ("fp32-first", {"tf32": False}),
    }
    for name, (folder, options) in rows.items():
        with tempfile.TemporaryDirectory() as out:
            built = tensorrt.build(
                clip / folder,
                Path(out),
                samples=feed,
                reference=right,
                refit="never",
                level=LEVEL,
                profiles=still,
                **options,
            )
            with tensorrt.open(Path(out) / "plan", None) as session:
                row = {**built.facts, **latency(session, feed[0])}
            row["onnx_bytes"] = (clip / folder / "model.onnx").stat().st_size
            report.add(name, row)


def _int8_model(clip: Path, name: str) -> None:
    """Q/DQ around every linear layer of `fp32-NAME`, as `int8-NAME`."""
    model = onnx.load(clip / f"fp32-{name}" / "model.onnx")
    amax = json.loads((clip / f"amax-{name}.json").read_text())
    plain = {n.replace(".", "/").rsplit("/", 1)[0]: n for n in qdq.weights_of(model)}
    named = {plain[found]: value for found, value in amax.items() if found in plain}
    (clip / f"int8-{name}").mkdir(exist_ok=True)
    onnx.save(qdq.insert(model, named, "int8", fold=False), clip / f"int8-{name}" / "model.onnx")


def int8refit(clip: Path, report: Report) -> None:
    """An INT8 plan refitted with another training's weights, scales and zero points."""
    feed = [arrays(clip / "inputs.npz")]
    _int8_model(clip, "first")
    _int8_model(clip, "second")
    right = {name: [arrays(clip / f"{name}.npz")] for name in ("first", "second")}
    options: dict[str, Any] = {"half": True, "level": 1}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        built = tensorrt.build(
            clip / "int8-first",
            folder / "a",
            samples=feed,
            reference=right["first"],
            refit="always",
            **options,
        )
        report.add("build", asdict(built))
        try:
            done = tensorrt.refit(
                folder / "a/plan", clip / "int8-second", folder / "b", samples=feed, reference=right["second"]
            )
            report.add("refit", done.facts)
        except RefitError as error:
            report.add("refit", f"RefitError: {error}")


if __name__ == "__main__":
    work = {
        "refit": refit,
        "int8refit": int8refit,
        "precision": precision,
        "sparsity": sparsity,
        "features": features,
    }
    work[sys.argv[1]](Path(sys.argv[2]), Report(Path(sys.argv[3])))
