"""The evidence of docs/tensorrt.md, on a GPU with TensorRT 8.6, through the engine module itself.

`python -m benchmarks.tensorrt.clip CLIP 64 24` first, where PyTorch is; then, where TensorRT is,
`python -m benchmarks.tensorrt.h100 refit|int8refit|precision|sparsity|features CLIP OUT.json`.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.tensorrt import mlp, qdq
from tasks.engines import tensorrt, tensorrt_build, tensorrt_parity
from tasks.engines.common import RefitError
from tasks.engines.tensorrt_options import Options
from tasks.engines.tensorrt_run import Recorded, TensorRTSession, load
from tasks.errors import InputError

LEVEL = 2  # optimization level of the CLIP builds: 3 takes about twice as long


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
    from tasks.engines import tensorrt_api as api
    from tasks.engines import tensorrt_choose as choose

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


def features(clip: Path, report: Report) -> None:
    """Everything else the contract promises, on a small model: each row says what happened."""
    only = ",".join(sys.argv[4:])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        onnx.save(mlp.mlp(512, 64, kind="fp16"), folder / "model.onnx")
        feed = mlp.feed(512, 64)
        for title, step in STEPS.items():
            if only and title not in only.split(","):
                continue
            try:
                report.add(title, step(folder, feed))
            except (InputError, RefitError, RuntimeError) as error:
                report.add(title, f"{type(error).__name__}: {error}")


def _facts(folder: Path, out: str, feed: Any, **options: Any) -> dict[str, Any]:
    built = tensorrt.build(folder / "model.onnx", folder / out, samples=[feed], **{"level": 1, **options})
    return {"proved": built.proved, **built.facts}


def _lean(folder: Path, feed: Any) -> dict[str, Any]:
    facts = _facts(folder, "lean", feed, refit="never", version_compatible=True)
    with tensorrt.open(folder / "lean/plan", None) as session:
        plain = session.run(feed)
    with tensorrt.open(folder / "lean/plan", None, lean=True) as session:
        found = session.run(feed)
    return {"bytes": facts["bytes"], "lean against full": tensorrt_parity.error(found, plain)}


def _bytes(folder: Path, feed: Any) -> dict[str, str]:
    """TensorRT's own words for bytes that our digest would have caught."""
    told, good = {}, (folder / "never/plan/engine.plan").read_bytes()
    flip, wrong = bytearray(good), bytearray(good)
    flip[len(good) // 2] ^= 0xFF
    wrong[8:64] = bytes(56)
    trt = load(folder / "never/plan")[0].trt
    for kind, data in {
        "truncated": good[: len(good) // 2],
        "header": bytes(wrong),
        "flipped": bytes(flip),
    }.items():
        try:
            Recorded(trt, data, host_code=False)
            told[kind] = "opened"
        except InputError as error:
            told[kind] = str(error)
    return told


def _other_graph(folder: Path, feed: Any) -> str:
    (folder / "w").mkdir()
    onnx.save(mlp.mlp(256, 64, kind="fp16"), folder / "w/model.onnx")
    tensorrt.open(folder / "always/plan", folder / "w")
    return "opened"


def _new_weights(folder: Path, feed: Any) -> dict[str, Any]:
    (folder / "n").mkdir()
    onnx.save(mlp.mlp(512, 64, kind="fp16", seed=1), folder / "n/model.onnx")
    facts = tensorrt.refit(folder / "always/plan", folder / "n", folder / "new", samples=[feed]).facts
    tensorrt.whole_plan(folder / "always/plan", folder / "new/weights", folder / "whole.plan")
    return {**facts, "whole plan": (folder / "whole.plan").stat().st_size}


def _int8(folder: Path, feed: Any) -> dict[str, Any]:
    (folder / "i").mkdir()
    onnx.save(mlp.mlp(512, 64, kind="int8"), folder / "i/model.onnx")
    built = tensorrt.build(folder / "i", folder / "int8", samples=[feed], refit="auto", level=1)
    return built.facts


def _profiles(folder: Path, feed: Any) -> dict[str, Any]:
    model = mlp.mlp(512, 64, kind="fp16")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "rows"
    (folder / "d").mkdir()
    onnx.save(model, folder / "d/model.onnx")
    wanted = [
        {"x": {"min": [low, 512], "opt": [middle, 512], "max": [high, 512]}}
        for low, middle, high in ((1, 8, 16), (17, 64, 128))
    ]
    built = tensorrt.build(
        folder / "d", folder / "dyn", samples=[feed], refit="never", profiles=wanted, level=1
    )
    told: dict[str, Any] = {"command": built.facts["command"], "parity": built.facts["parity"]}
    with tensorrt.open(folder / "dyn/plan", None) as session:
        for rows in (1, 16, 100, 128, 3):
            part = {"x": mlp.feed(512, rows)["x"]}
            right = tensorrt_parity.reference(folder / "d/model.onnx", [part])[0]
            told[f"{rows} rows"] = tensorrt_parity.error(session.run(part), right)
        try:
            session.run({"x": mlp.feed(512, 129)["x"]})
        except InputError as error:
            told["129 rows"] = str(error)
    return told


STEPS: dict[str, Callable[[Path, Any], Any]] = {
    "plain": lambda folder, feed: _facts(folder, "never", feed, refit="never"),
    "refit always": lambda folder, feed: _facts(folder, "always", feed, refit="always"),
    "refit auto": lambda folder, feed: _facts(folder, "auto", feed, refit="auto"),
    "refit with new weights": _new_weights,
    "weights of another graph": _other_graph,
    "int8 refit": _int8,
    "two profiles": _profiles,
    "fastest of three": lambda folder, feed: _facts(folder, "three", feed, refit="never", builds=3),
    "timing cache new": lambda folder, feed: _facts(
        folder, "t1", feed, refit="never", timing_cache=str(folder / "cache"), level=5
    ),
    "timing cache again": lambda folder, feed: _facts(
        folder, "t2", feed, refit="never", timing_cache=str(folder / "cache"), level=5
    ),
    "ampere_plus": lambda folder, feed: _facts(folder, "amp", feed, refit="never", hardware="ampere_plus"),
    "workspace of 1 MiB": lambda folder, feed: _facts(folder, "ws", feed, refit="never", workspace=1 << 20),
    "lean runtime": _lean,
    "timeout": lambda folder, feed: _facts(folder, "late", feed, refit="never", timeout=0.5),
    "bad bytes": _bytes,
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
