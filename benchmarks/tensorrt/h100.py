"""The evidence of docs/tensorrt.md, on a GPU with TensorRT 8.6, through the engine module itself.

`python -m benchmarks.tensorrt.clip CLIP 64 24` first, where PyTorch is; then, where TensorRT is,
`python -m benchmarks.tensorrt.h100 STEP CLIP OUT.json [ONLY,…]`; the steps are at the end of this file,
and `h100.sh` runs them in order of worth.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx

from benchmarks.tensorrt import qdq
from benchmarks.tensorrt.features import features
from benchmarks.tensorrt.lean import lean
from benchmarks.tensorrt.report import Report, arrays, latency
from benchmarks.tensorrt.rounds import rounds
from benchmarks.tensorrt.sparsity import sparseclip, sparsity
from tasks.engines import tensorrt, tensorrt_build, tensorrt_parity
from tasks.engines import tensorrt_api as api
from tasks.engines.tensorrt_options import Options
from tasks.engines.tensorrt_refit import refit_engine
from tasks.engines.tensorrt_run import Recorded, TensorRTSession

LEVEL = 2  # optimization level of the CLIP builds: 3 takes about twice as long


def refit(clip: Path, report: Report) -> None:
    """FP16 refit with another training's weights: seconds, parity, tax; then the rebuild that it saves.

    That is the second training built from nothing, without a timing cache and then with that build's own.
    A fixed batch of 8: a plan of one shape builds in half the time, and the trial's evaluator is NumPy.
    """
    feed, first, second = _few(clip)
    still = _fixed(feed[0])
    folder = _kept(report)
    how: dict[str, Any] = {"samples": feed, "profiles": still, "level": LEVEL}
    built = tensorrt.build(clip / "first", folder / "a", reference=first, refit="always", **how)
    report.add("build", asdict(built))
    rows = []
    for _ in range(3):
        done = tensorrt.refit(
            folder / "a/plan", clip / "second", folder / "b", samples=feed, reference=second
        )
        rows.append(done.facts)
        report.add("refits", rows)
    how |= {"reference": second, "refit": "never", "timing_cache": str(folder / "cache")}
    for title, out in (("rebuild", "c"), ("rebuild with the timing cache of that one", "d")):
        report.add(title, asdict(tensorrt.build(clip / "second", folder / out, **how)))


def rebuild(clip: Path, report: Report) -> None:
    """The second training built from nothing, batch 1 to 64: what `refit` on all layers is compared with."""
    feed, right = [arrays(clip / "inputs.npz")], [arrays(clip / "second.npz")]
    with tempfile.TemporaryDirectory() as name:
        low, high = (1, *feed[0]["pixels"].shape[1:]), feed[0]["pixels"].shape
        profile = [{"pixels": {"min": low, "opt": high, "max": high}}]
        built = tensorrt.build(
            clip / "second",
            Path(name),
            samples=feed,
            reference=right,
            refit="never",
            level=LEVEL,
            profiles=profile,
        )
        report.add("rebuild", asdict(built))
        with tensorrt.open(Path(name) / "plan", None) as session:
            report.add("rebuilt latency", latency(session, feed[0]))


def _few(clip: Path, count: int = 8) -> tuple[list[Any], list[Any], list[Any]]:
    """Inputs and both references, the first `count` rows."""
    files = ("inputs", "first", "second")
    found = [[{k: v[:count] for k, v in arrays(clip / f"{name}.npz").items()}] for name in files]
    return found[0], found[1], found[2]


def _fixed(feed: Any) -> list[Any]:
    """One profile of one shape."""
    return [{name: dict.fromkeys(("min", "opt", "max"), array.shape) for name, array in feed.items()}]


def _kept(report: Report) -> Path:
    """A folder beside the report for plans that a later step opens."""
    folder = report.path.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


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
    as_made = {"runtime": "tensorrt", "version": trt.__version__, "refit": {}}
    for title, name in (("own weights", "first"), ("new weights", "second"), ("own weights again", "first")):
        path = clip / f"int8-{name}" / "model.onnx"
        taken = refit_engine(held, as_made, path, onnx.load(path))
        report.add(title, {"weights given": len(taken), **_against(held, feed, right)})


def int8trial(clip: Path, report: Report) -> None:
    """What the module itself makes of that engine: its trial refit must refuse it."""
    feed, first, _ = _few(clip)
    _int8_model(clip, "first")
    with tempfile.TemporaryDirectory() as name:
        built = tensorrt.build(
            clip / "int8-first",
            Path(name),
            samples=feed,
            reference=first,
            refit="always",
            half=True,
            level=0,
            profiles=_fixed(feed[0]),
        )
    report.add("int8 plan", asdict(built))


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


STEPS: dict[str, Callable[[Path, Report], None]] = {
    "refit": refit,
    "rebuild": rebuild,
    "int8refit": int8refit,
    "int8trial": int8trial,
    "precision": precision,
    "sparsity": sparsity,
    "sparseclip": sparseclip,
    "features": features,
    "lean": lean,
    "rounds": rounds,
}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(124))  # so that a build under way is ended too
    STEPS[sys.argv[1]](Path(sys.argv[2]), Report(Path(sys.argv[3])))
