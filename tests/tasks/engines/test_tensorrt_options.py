"""What is refused before anything is spent, the profiles, and trtexec's words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from benchmarks.tensorrt import mlp, qdq
from tasks.engines.tensorrt_api import Flavor, Gpu
from tasks.engines.tensorrt_options import Options, check, profiles_for, trtexec
from tasks.errors import InputError

HOPPER, AMPERE = Gpu("NVIDIA H100 80GB HBM3", (9, 0)), Gpu("NVIDIA A100", (8, 0))
PATH = Path("model.onnx")


def model(kind: int = TensorProto.FLOAT, opset: int = 17) -> onnx.ModelProto:
    """Two inputs, the first dynamic in batch and length."""
    weights = helper.make_tensor("w", kind, [4], bytes(4 if kind != TensorProto.FLOAT else 16), raw=True)
    graph = helper.make_graph(
        [helper.make_node("Identity", ["ids"], ["y"])],
        "g",
        [
            helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"]),
            helper.make_tensor_value_info("fixed", TensorProto.FLOAT, ["batch", 3]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.INT64, None)],
        [weights],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


@pytest.mark.parametrize(
    ("made", "flavor", "version", "gpu", "options", "says"),
    [
        (model(opset=20), "tensorrt", "8.6.0", HOPPER, {}, "opset 20; TensorRT 8.6.0 reads up to 17"),
        (
            model(TensorProto.FLOAT8E4M3FN),
            "tensorrt",
            "8.6.0",
            HOPPER,
            {},
            "FLOAT8E4M3FN, which need TensorRT 10",
        ),
        (model(TensorProto.FLOAT8E4M3FN), "tensorrt", "11.4.0", AMPERE, {}, "needs compute capability 8.9"),
        (model(), "tensorrt", "8.6.0", HOPPER, {"identical": True}, "need TensorRT 10"),
        (model(), "tensorrt", "8.6.0", HOPPER, {"individual": ("w",)}, "need TensorRT 10"),
        (model(), "tensorrt", "8.6.0", HOPPER, {"hardware": "same_compute_capability"}, "needs TensorRT 10"),
        (model(), "tensorrt", "10.14.1", HOPPER, {"half": True}, "takes precision from the graph"),
        (model(), "tensorrt_rtx", "1.7.1", None, {"builds": 3}, "needs a GPU"),
    ],
)
def test_refused(
    made: onnx.ModelProto, flavor: Flavor, version: str, gpu: Gpu | None, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        check(made, PATH, flavor, version, gpu, Options(**options))


def test_scales_that_8_6_misreads() -> None:
    """Its parser reads FP16 scales as FP32: seen on an H100 with CLIP, all of whose scales are positive."""
    half, wide = mlp.mlp(32, 4, kind="fp16"), mlp.mlp(32, 4, kind="fp32")
    amax = {f"matmul{i}": 4.5 for i in range(3)}
    half, wide = (qdq.insert(made, amax, "int8", fold=True) for made in (half, wide))
    with pytest.raises(InputError, match="FP16 scales, which TensorRT 8.6.0 reads as FP32"):
        check(half, PATH, "tensorrt", "8.6.0", HOPPER, Options())
    check(wide, PATH, "tensorrt", "8.6.0", HOPPER, Options(half=True))
    check(half, PATH, "tensorrt", "10.14.1", HOPPER, Options())


def test_accepted() -> None:
    check(model(TensorProto.FLOAT8E4M3FN, 20), PATH, "tensorrt", "11.4.0", HOPPER, Options(identical=True))
    check(model(TensorProto.FLOAT8E4M3FN, 20), PATH, "tensorrt_rtx", "1.7.1", None, Options())
    check(model(TensorProto.INT8), PATH, "tensorrt", "8.6.0", AMPERE, Options(half=True, builds=3))


SAMPLES = [
    {"ids": np.zeros((2, 9), np.int64), "fixed": np.zeros((2, 3), np.float32)},
    {"ids": np.zeros((1, 30), np.int64), "fixed": np.zeros((1, 3), np.float32)},
]


def test_profile_from_samples() -> None:
    (profile,) = profiles_for(model(), Options(), SAMPLES)
    assert profile["ids"] == {"min": [1, 1], "opt": [2, 30], "max": [2, 30]}
    assert profile["fixed"] == {"min": [1, 3], "opt": [2, 3], "max": [2, 3]}


def test_given_profiles_are_completed_and_checked() -> None:
    wanted = {"ids": {"min": [1, 8], "opt": [4, 16], "max": [8, 64]}}
    found = profiles_for(model(), Options(profiles=[wanted, wanted]), SAMPLES)
    assert [set(p) for p in found] == [{"ids", "fixed"}] * 2
    for shapes, says in (
        ({"idz": wanted["ids"]}, "profiles name"),
        ({"ids": {"min": [1, 8], "max": [8, 64]}}, "needs min, opt and max"),
        ({"ids": {"min": [1, 8], "opt": [9, 16], "max": [8, 64]}}, "min <= opt <= max"),
        ({"ids": {"min": [1], "opt": [4], "max": [8]}}, "2 dimensions"),
        ({"fixed": {"min": [1, 4], "opt": [1, 4], "max": [1, 4]}}, "is not min <= opt"),
    ):
        with pytest.raises(InputError, match=says):
            profiles_for(model(), Options(profiles=[shapes]), SAMPLES)
    with pytest.raises(InputError, match="give it profiles"):
        profiles_for(model(), Options(), [])


def test_trtexec_says_the_same() -> None:
    options = Options(sparse=True, level=5, workspace=1 << 20, hardware="ampere_plus", tf32=False)
    profiles = profiles_for(model(), options, SAMPLES)
    command = trtexec("tensorrt", options, profiles, weak_types=("fp16", "int8"), refit=True)
    assert "--minShapes=ids:1x1,fixed:1x3" in command
    unfold = "python -m tasks.engines.tensorrt_unfold model.onnx floats.onnx"
    assert command.startswith(f"{unfold} && trtexec --onnx=floats.onnx ")
    for word in ("--fp16 --int8 --refit", "--sparsity=enable", "--noTF32", "workspace:1048576B", "ampere+"):
        assert word in command
    strong = trtexec("tensorrt", Options(), [*profiles, *profiles], weak_types=None, refit=True)
    assert "--stronglyTyped --refit --stripWeights" in strong
    assert "--profile=1" in strong
    identical = trtexec("tensorrt", Options(identical=True), profiles, weak_types=None, refit=True)
    assert "--refit" not in identical
    assert "--stripWeights" in identical
