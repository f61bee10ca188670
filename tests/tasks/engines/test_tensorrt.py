"""Real builds with TensorRT for RTX, which needs no GPU; what a GPU shows is in docs/tensorrt.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest

from benchmarks.tensorrt import mlp, qdq
from tasks.engines import tensorrt, tensorrt_build, tensorrt_run
from tasks.engines import tensorrt_api as api
from tasks.engines.common import graph_digest
from tasks.engines.tensorrt_options import Options
from tasks.errors import InputError

RTX = "tensorrt_rtx"
ROOT = Path(__file__).resolve().parents[3]
needs_rtx = pytest.mark.skipif(tensorrt.version(RTX) is None, reason="tensorrt-rtx is not installed")
no_gpu = pytest.mark.skipif(tensorrt.device() != "none", reason="this machine has a GPU")
WIDTH, ROWS = 64, 8
FEED = mlp.feed(WIDTH, ROWS)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A perceptron in FP16 with a dynamic batch, opset 20."""
    return write(mlp.mlp(WIDTH, ROWS, kind="fp16"), tmp_path / "model.onnx")


def write(made: onnx.ModelProto, path: Path) -> Path:
    made.opset_import[0].version = 20
    for value in (*made.graph.input, *made.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.save(made, path)
    return path


def build(model: Path, folder: Path, **options: Any) -> Any:
    return tensorrt.build(model, folder, samples=[FEED], flavor=RTX, **options)


@needs_rtx
@no_gpu
def test_builds_without_a_gpu(model: Path, tmp_path: Path) -> None:
    built = build(model, tmp_path / "out")
    assert (built.proved, built.runtime, built.device) == ("built", RTX, "none")
    assert built.graph == graph_digest(onnx.load(model))
    assert "--maxShapes=x:8x64" in built.facts["command"]
    assert built.facts["refit"]["safe"] is False
    plan = tmp_path / "out" / "plan"
    assert sorted(path.name for path in plan.iterdir()) == ["engine.plan", "plan.json"]
    assert json.loads((plan / "plan.json").read_text())["bytes"] == (plan / "engine.plan").stat().st_size
    assert not (tmp_path / "out" / "weights").exists()


@needs_rtx
@no_gpu
def test_the_same_bytes_again(model: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        build(model, tmp_path / name)
    for name in ("engine.plan", "plan.json"):
        assert (tmp_path / "a/plan" / name).read_bytes() == (tmp_path / "b/plan" / name).read_bytes()


@needs_rtx
@no_gpu
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_folded_quantized_weights_make_a_smaller_plan(tmp_path: Path, kind: str) -> None:
    plain = mlp.mlp(1024, ROWS, kind="fp16")
    amax = {f"matmul{i}": 4.5 for i in range(3)}
    (tmp_path / "q").mkdir()
    half = write(plain, tmp_path / "model.onnx")
    quantized = write(qdq.insert(plain, amax, kind, fold=True), tmp_path / "q" / "model.onnx")
    sample = [mlp.feed(1024, ROWS)]
    sizes = [
        tensorrt.build(path, path.parent / "out", samples=sample, flavor=RTX).facts["bytes"]
        for path in (half, quantized)
    ]
    assert sizes[1] < sizes[0] - 3 * 1024 * 1024 * 0.8


@needs_rtx
def test_what_the_parser_refuses_is_named(model: Path, tmp_path: Path) -> None:
    broken = onnx.load(model)
    broken.graph.node[1].op_type = "NoSuchOperator"
    onnx.save(broken, model)
    with pytest.raises(InputError, match=r"cannot build .*model.onnx: .*NoSuchOperator"):
        build(model, tmp_path / "out")


@needs_rtx
@no_gpu
def test_refit_always_needs_a_gpu(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="refit: always needs a GPU"):
        build(model, tmp_path / "out", refit="always")


@needs_rtx
@no_gpu
def test_a_process_that_uses_the_other_tensorrt_only_builds(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU that runs both, and has opened an engine of TensorRT."""
    monkeypatch.setattr(api, "gpu", lambda: api.Gpu("NVIDIA A100", (8, 0)))
    monkeypatch.setitem(sys.modules, "polygraphy", ModuleType("polygraphy"))
    monkeypatch.setenv("POLYGRAPHY_USE_TENSORRT_RTX", "0")
    built = build(model, tmp_path / "out")
    assert (built.proved, built.runtime, built.facts["refit"]["safe"]) == ("built", RTX, False)
    assert "the other TensorRT is in use" in built.facts["refit"]["reason"]
    assert tensorrt_run.manifest_of(tmp_path / "out" / "plan")["runtime"] == RTX
    with pytest.raises(InputError, match="already uses the other TensorRT"):
        tensorrt.open(tmp_path / "out" / "plan", None)


@needs_rtx
def test_a_long_build_is_ended(model: Path, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(InputError, match=r"took more than 0.2 s: raise `timeout`"):
        build(model, tmp_path / "out", timeout=0.2)
    assert time.monotonic() - start < 10
    assert not running(str(tmp_path))


def running(words: str) -> bool:
    """Whether a process of ours has the words on its command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "tensorrt_build" in line and words in line and path.parent.name != str(os.getpid()):
            return True
    return False


BUILDS = """
import sys
from pathlib import Path
from tasks.engines import tensorrt_build
from tasks.engines.tensorrt_options import Options
folder = Path(sys.argv[1])
sys.executable = str(folder / "python")
plan = str(folder / "engine.plan")
tensorrt_build.run(tensorrt_build.Job("", plan, "tensorrt_rtx", Options(), [], None, False, None))
"""


def test_a_build_ends_with_the_run_that_was_killed(tmp_path: Path) -> None:
    builder = tmp_path / "python"
    builder.write_text("#!/bin/sh\necho $$\nexec sleep 60\n")
    builder.chmod(0o755)
    run = subprocess.Popen([sys.executable, "-c", BUILDS, str(tmp_path)], cwd=ROOT)
    log = tmp_path / "engine.log"
    wait(lambda: log.is_file() and log.read_text().endswith("\n"))
    run.kill()
    run.wait()
    wait(lambda: not alive(int(log.read_text())))


def wait(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(process: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_missing_runtime_says_how_to_get_it(model: Path, tmp_path: Path) -> None:
    if tensorrt.version("tensorrt") is not None:
        pytest.skip("TensorRT is installed")
    with pytest.raises(InputError, match="pip install"):
        tensorrt.build(model, tmp_path / "out", samples=[FEED], flavor="tensorrt")


@needs_rtx
def test_options_reach_the_builder(model: Path, tmp_path: Path) -> None:
    """Two profiles, flags, a workspace limit and a timing cache, as the builder took them."""
    job = tensorrt_build.Job(
        str(model),
        str(tmp_path / "p" / "engine.plan"),
        RTX,
        Options(sparse=True, level=3, workspace=1 << 24, tf32=False),
        [{"x": {"min": (1, WIDTH), "opt": (4, WIDTH), "max": (8, WIDTH)}}] * 2,
        None,
        False,
        str(tmp_path / "timing.cache"),
    )
    facts = tensorrt_build.run(job)
    assert facts["bytes"] == (tmp_path / "p" / "engine.plan").stat().st_size
    assert (tmp_path / "timing.cache").exists()


def test_reference_is_the_graph(tmp_path: Path) -> None:
    """The reference runs without any TensorRT, for opsets the evaluator knows only in a newer form."""
    from tasks.engines import tensorrt_parity

    onnx.save(mlp.mlp(WIDTH, ROWS, kind="int8"), tmp_path / "model.onnx")
    found = tensorrt_parity.reference(tmp_path / "model.onnx", [FEED])[0]["y"]
    assert found.shape == (ROWS, WIDTH)
    exact = tensorrt_parity.evaluate(mlp.mlp(WIDTH, ROWS, kind="fp32"), [FEED])[0]
    assert 0 < tensorrt_parity.error({"y": found}, exact) < 0.05


def test_external_data_travels_with_the_weights(tmp_path: Path) -> None:
    from tasks.engines.tensorrt_weights import copy_model

    made = mlp.mlp(WIDTH, ROWS, kind="fp32")
    values = made.graph.initializer[0].raw_data
    onnx.save(
        made, tmp_path / "big.onnx", save_as_external_data=True, location="big.onnx.data", size_threshold=0
    )
    copied = copy_model(tmp_path / "big.onnx", tmp_path / "weights")
    assert copied.name == "model.onnx"
    again = onnx.load(copied)
    assert again.graph.initializer[0].raw_data == values
