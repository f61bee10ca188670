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
from tasks.engines import tensorrt, tensorrt_build, tensorrt_parity
from tasks.engines import tensorrt_api as api
from tasks.engines.tensorrt_options import Options
from tasks.engines.tensorrt_refit import refit_engine
from tasks.engines.tensorrt_run import Recorded, TensorRTSession

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
    """An INT8 engine refitted with its own weights, another training's, its own: what does it run?"""
    feed, options = arrays(clip / "inputs.npz"), Options(level=0)
    shape = feed["pixels"].shape
    profile = {"pixels": {"min": shape, "opt": shape, "max": shape}}
    right = {name: arrays(clip / f"{name}.npz") for name in ("first", "second")}
    trt = api.use("tensorrt")
    for name in right:
        _int8_model(clip, name)
    with tempfile.TemporaryDirectory() as folder:
        model, plan = str(clip / "int8-first" / "model.onnx"), Path(folder) / "engine.plan"
        job = tensorrt_build.Job(
            model, str(plan), "tensorrt", options, [profile], ("fp16", "int8"), True, None
        )
        tensorrt_build.build_here(job)
        held = Recorded(trt, plan.read_bytes(), host_code=False)
    report.add("fresh", _against(held, feed, right))
    for title, name in (("own weights", "first"), ("new weights", "second"), ("own weights again", "first")):
        path = clip / f"int8-{name}" / "model.onnx"
        taken = refit_engine(held, "tensorrt", trt.__version__, path, onnx.load(path))
        report.add(title, {"weights given": len(taken), **_against(held, feed, right)})


def _against(held: Recorded, feed: Any, right: dict[str, Any]) -> dict[str, Any]:
    """Error and cosine to each training's reference."""
    with TensorRTSession(held) as session:
        found = session.run(feed)
    return {
        f"against the {name} training": {
            "error": tensorrt_parity.error(found, expected),
            "cosine": tensorrt_parity.cosine(found, expected),
        }
        for name, expected in right.items()
    }


if __name__ == "__main__":
    work = {
        "refit": refit,
        "int8refit": int8refit,
        "precision": precision,
        "sparsity": sparsity,
        "features": features,
    }
    work[sys.argv[1]](Path(sys.argv[2]), Report(Path(sys.argv[3])))
