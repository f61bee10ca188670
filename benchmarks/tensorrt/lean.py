"""Version compatible plans on TensorRT 8.6: with and without the lean runtime inside, and three ways to open.

Each opening is a process of its own: the two bindings need not get on in one, and one may crash.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.tensorrt import mlp
from benchmarks.tensorrt.report import Report
from tasks.engines import tensorrt_api as api
from tasks.engines import tensorrt_parity
from tasks.engines.tensorrt_run import Recorded, TensorRTSession
from tasks.errors import InputError

WIDTH, ROWS = 512, 64
WAYS = ("full runtime", "full runtime that loads the lean one", "lean runtime")


def lean(clip: Path, report: Report) -> None:
    """Build both kinds, then open each in every way."""
    folder = report.path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    model = mlp.mlp(WIDTH, ROWS, kind="fp16")
    onnx.save(model, folder / "model.onnx")
    np.savez(folder / "right.npz", y=tensorrt_parity.evaluate(model, [mlp.feed(WIDTH, ROWS)])[0]["y"])
    for inside in (False, True):
        title = f"lean runtime {'inside' if inside else 'left out'}"
        plan = folder / f"{int(inside)}.plan"
        try:
            report.add(title, {"bytes": _build(folder / "model.onnx", plan, inside)})
        except Exception as error:  # whatever the builder says belongs in the report
            report.add(title, f"{type(error).__name__}: {error}"[:600])
            continue
        for way in WAYS:
            report.add(f"{title}, {way}", _apart(plan, folder / "right.npz", way))


def _build(model: Path, plan: Path, inside: bool) -> int:
    """A version compatible plan; its bytes."""
    trt = api.use("tensorrt")
    from polygraphy.backend.trt import CreateConfig, engine_bytes_from_network, network_from_onnx_path

    config = CreateConfig(
        fp16=True,
        version_compatible=True,
        exclude_lean_runtime=not inside,
        builder_optimization_level=1,
        profiling_verbosity=trt.ProfilingVerbosity.DETAILED,
    )
    data = engine_bytes_from_network(network_from_onnx_path(str(model)), config=config)
    plan.write_bytes(memoryview(data))
    return plan.stat().st_size


def _apart(plan: Path, right: Path, way: str) -> Any:
    """What came of opening it in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.tensorrt.lean", str(plan), str(right), way]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        return {"status": done.returncode, "said": done.stderr.strip()[-500:]}
    return json.loads(done.stdout.splitlines()[-1])


def main(plan: Path, right: Path, way: str) -> None:
    """Open and run; print the error against the reference and the milliseconds."""
    trt = importlib.import_module("tensorrt_lean") if way == "lean runtime" else api.use("tensorrt")
    if way == WAYS[1]:
        held = _loaded(trt, plan.read_bytes())
    else:
        held = Recorded(trt, plan.read_bytes(), host_code=True)
    with TensorRTSession(held) as session, np.load(right) as expected:
        feed = mlp.feed(WIDTH, ROWS)
        error = tensorrt_parity.error(session.run(feed), dict(expected))
        print(json.dumps({"error": error, "ms": float(np.median(session.latencies(feed)))}))


def _loaded(trt: Any, data: bytes) -> Recorded:
    """The full runtime with the lean library loaded into it, as a later version would open the plan."""
    held = Recorded.__new__(Recorded)
    logger = trt.Logger(trt.Logger.ERROR)
    outer = trt.Runtime(logger)
    outer.engine_host_code_allowed = True
    import tensorrt_lean  # type: ignore[import-not-found]

    library = Path(tensorrt_lean.__file__).parent / "libnvinfer_lean.so.8"
    runtime = outer.load_runtime(str(library))
    if runtime is None:
        raise InputError(f"{library} does not load as a runtime")
    held.trt, held.logger, held.runtime = trt, logger, (outer, runtime)
    held.engine = runtime.deserialize_cuda_engine(data)
    if held.engine is None:
        raise InputError("the plan cannot be opened with the loaded runtime")
    return held


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
