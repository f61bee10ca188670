"""Each feature of the engine module once, on a small model: each row says what happened."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from benchmarks.tensorrt import mlp
from benchmarks.tensorrt.report import Report
from tasks.engines import tensorrt, tensorrt_parity
from tasks.engines.tensorrt_run import Recorded, load
from tasks.errors import InputError


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
            except Exception as error:  # whatever happened belongs in the report
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
    told, good = {}, (folder / "always/plan/engine.plan").read_bytes()
    flip, wrong = bytearray(good), bytearray(good)
    flip[len(good) // 2] ^= 0xFF
    wrong[8:64] = bytes(56)
    trt = load(folder / "always/plan")[0].trt
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
