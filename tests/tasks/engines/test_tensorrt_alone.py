"""The module with what TensorRT 8.6 goes with: ONNX 1.17, NumPy 1.26, Polygraphy and CPython 3.10, alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
WHEELS = ("onnx==1.17.0", "numpy==1.26.4", "protobuf<6", "polygraphy==0.53.6")  # as infra/gpu/pack.sh
CODE = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import numpy as np, onnx
from onnx import TensorProto, helper, numpy_helper
import tasks.engines.tensorrt as engine
from tasks.engines import tensorrt_parity
import tasks.engines.lowering.tensors

assert onnx.__version__ == "1.17.0", onnx.__version__
weight = np.eye(4, dtype=np.float32)
graph = helper.make_graph(
    [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
     helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
     helper.make_node("MatMul", ["d", "weight"], ["y"])],
    "g",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4])],
    [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(np.float32(0.5), "scale"),
     numpy_helper.from_array(np.int8(0), "zero")],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
folder = Path(sys.argv[3])
onnx.save(model, folder / "model.onnx")
x = np.array([[1.2, 0, -3, 100]] * 2, np.float32)
got = tensorrt_parity.reference(folder / "model.onnx", [{"x": x}])[0]["y"]
assert got.tolist() == [[1.0, 0, -3, 63.5]] * 2, got
assert engine.version("tensorrt") is None
try:
    engine.build(folder / "model.onnx", folder / "out", samples=[{"x": x}], flavor="tensorrt")
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.10", "3.11"])
def test_it_works_with_what_tensorrt_8_6_goes_with(version: str, tmp_path: Path) -> None:
    python = (
        sys.executable if version == f"{sys.version_info[0]}.{sys.version_info[1]}" else f"python{version}"
    )
    told = f"import sys; assert sys.version_info[:2] == {tuple(map(int, version.split('.')))}"
    try:
        subprocess.run([python, "-c", told], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"no CPython {version} here")
    site = tmp_path / "site"
    fetch = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--target",
        site,
    ]
    fetch += ["--python-version", version, "--only-binary=:all:", "--no-deps", *WHEELS]
    subprocess.run(fetch, check=True)
    alone = [python, "-I", "-S", "-c", CODE, str(ROOT), str(site), str(tmp_path)]
    ended = subprocess.run(alone, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("InputError"), ended.stdout
    assert "pip install" in ended.stdout
