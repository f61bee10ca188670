"""What the recipe says of TensorRT reaches its builder, and the same in trtexec's words is told."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from recipes.build import Build, TensorRT
from tasks import batches, build, store, types
from tasks.artifacts import Engine, OnnxModel
from tasks.engines import tensorrt
from tasks.engines import tensorrt_api as api
from tasks.errors import InputError

if TYPE_CHECKING:
    from conftest import Case

needs_rtx = pytest.mark.skipif(tensorrt.version("tensorrt_rtx") is None, reason="no tensorrt-rtx here")
no_gpu = pytest.mark.skipif(tensorrt.device() != "none", reason="this machine has a GPU")


def options(case: Case, **section: Any) -> dict[str, Any]:
    found = Build(runtime="tensorrt-rtx", **section)
    preprocessor = batches.preprocessor(case.checkpoint)
    sample = batches.samples(case.dataset, preprocessor)[0]
    axes = types.load(case.dataset.type).INPUTS
    return build._options("tensorrt-rtx", found, axes, preprocessor, sample)


def test_without_a_section_one_profile_spans_everything(text: Case, image: Case) -> None:
    (profile,) = options(text, max_batch=32)["profiles"]
    assert {name: (s["min"], s["max"]) for name, s in profile.items()} == dict.fromkeys(
        types.load(text.dataset.type).INPUTS, ((1, 1), (32, 16))
    )
    ((pixels,),) = [p.values() for p in options(image)["profiles"]]
    assert [pixels[key][0] for key in ("min", "opt", "max")] == [1, 8, 64]
    assert pixels["min"][1:] == pixels["max"][1:]


def test_several_profiles_and_every_flag(text: Case) -> None:
    said = TensorRT.model_validate(
        {
            "profiles": [
                {"batch": [1, 1, 8], "length": [1, 4, 16]},
                {"batch": [9, 64, 64]},
            ],
            "refit": "never",
            "sparse": True,
            "level": 4,
            "workspace_mb": 2,
            "timing_cache": False,
            "hardware": "ampere_plus",
        }
    )
    found = options(text, tensorrt=said)
    name = next(iter(types.load(text.dataset.type).INPUTS))
    assert [p[name]["max"] for p in found["profiles"]] == [(8, 16), (64, 16)]
    assert found["profiles"][0][name]["opt"] == (1, 4)
    assert found["workspace"] == 2 << 20
    assert (found["refit"], found["sparse"], found["level"]) == ("never", True, 4)
    assert (found["hardware"], found["timing_cache"]) == ("ampere_plus", None)


def test_a_version_compatible_plan_is_not_made_refittable(image: Case) -> None:
    assert options(image, tensorrt=TensorRT(version_compatible=True))["refit"] == "never"
    assert options(image)["refit"] == "auto"


@pytest.fixture
def weakly_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT 8.6 on an H100."""
    monkeypatch.setattr(api, "version_of", lambda flavor: "8.6.0")
    monkeypatch.setattr(api, "gpu", lambda: api.Gpu("NVIDIA H100 80GB HBM3", (9, 0)))


def test_the_builder_chooses_fp16_where_it_is_weakly_typed(image: Case, weakly_typed: None) -> None:
    """A graph converted to FP16 has opset 19 at least, and TensorRT 8.6 reads up to 17."""
    assert build.precision("tensorrt") == "fp32"
    section, preprocessor = Build(runtime="tensorrt"), batches.preprocessor(image.checkpoint)
    sample = batches.samples(image.dataset, preprocessor)[0]
    axes = types.load(image.dataset.type).INPUTS
    assert build._options("tensorrt", section, axes, preprocessor, sample)["half"] is True


@needs_rtx
def test_a_strongly_typed_network_takes_precision_from_the_graph(image: Case) -> None:
    assert build.precision("tensorrt-rtx") == "fp16"
    assert options(image)["half"] is False


@pytest.mark.parametrize(
    ("format", "opset", "says"),
    [("fp8", 17, "fp8 needs TensorRT 10"), ("int8", 20, "reads up to 17, not 20")],
)
def test_what_an_old_tensorrt_cannot_is_said_first(
    weakly_typed: None, format: str, opset: int, says: str
) -> None:
    section = Build(runtime="tensorrt", tensorrt=TensorRT(refit="always"))
    with pytest.raises(InputError, match=says):
        build.check_build(section, format, opset)
    build.check_build(section, "int8", 17)


def test_fp8_on_an_old_gpu_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "version_of", lambda flavor: "10.14.1")
    monkeypatch.setattr(api, "gpu", lambda: api.Gpu("NVIDIA A100", (8, 0)))
    section = Build(runtime="onnxruntime", also=("tensorrt",))
    with pytest.raises(InputError, match="fp8 needs compute capability 8.9 .*; here is NVIDIA A100"):
        build.check_build(section, "fp8", 20)
    build.check_build(section, "int8", 20)


def test_refits_of_two_tensorrts_in_one_run_are_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "version_of", lambda flavor: "11.4")
    monkeypatch.setattr(api, "gpu", lambda: api.Gpu("NVIDIA A100", (8, 0)))
    both = {"runtime": "tensorrt", "also": ("tensorrt-rtx",)}
    with pytest.raises(InputError, match=r"not with tensorrt and tensorrt-rtx; .*refit: auto"):
        build.check_build(Build.model_validate({**both, "tensorrt": {"refit": "always"}}), "int8", 20)
    build.check_build(Build.model_validate(both), "int8", 20)


@pytest.mark.parametrize(
    ("version", "gpu", "format", "says"),
    [
        ("10.7.0", (10, 0), "nvfp4", "nvfp4 needs TensorRT 10.8 or newer; here is 10.7.0"),
        ("10.14.1", (9, 0), "nvfp4", "nvfp4 needs compute capability 10.0 .Blackwell.*use fp8 or int8"),
        ("10.14.1", (8, 9), "mxfp8", "mxfp8 needs compute capability 10.0"),
    ],
)
def test_small_blocks_on_an_old_tensorrt_or_gpu_are_said_first(
    version: str, gpu: tuple[int, int], format: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "version_of", lambda flavor: version)
    monkeypatch.setattr(api, "gpu", lambda: api.Gpu("NVIDIA", gpu))
    with pytest.raises(InputError, match=says):
        build.check_build(Build(runtime="tensorrt"), format, 23)
    monkeypatch.setattr(api, "version_of", lambda flavor: "10.8")
    monkeypatch.setattr(api, "gpu", lambda: api.Gpu("NVIDIA B200", (10, 0)))
    build.check_build(Build(runtime="tensorrt"), format, 23)


def test_tensorrt_for_rtx_takes_mxfp8_one_generation_earlier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "version_of", lambda flavor: "1.7.1.116")
    monkeypatch.setattr(api, "gpu", lambda: api.Gpu("NVIDIA GeForce RTX 4090", (8, 9)))
    build.check_build(Build(runtime="tensorrt-rtx"), "mxfp8", 23)
    with pytest.raises(InputError, match="nvfp4 needs compute capability 10.0"):
        build.check_build(Build(runtime="tensorrt-rtx"), "nvfp4", 23)


@needs_rtx
@no_gpu
def test_a_refit_that_nothing_here_can_try_is_said_first() -> None:
    section = Build(runtime="onnxruntime", also=("tensorrt-rtx",), tensorrt=TensorRT(refit="always"))
    with pytest.raises(InputError, match="refit: always needs a GPU that runs tensorrt_rtx"):
        build.check_build(section, "int8", 20)
    build.check_build(Build(runtime="onnxruntime"), "fp8", 20)
    build.check_build(Build(runtime="tensorrt-rtx"), "fp8", 20)


def test_timings_are_kept_beside_the_store(image: Case) -> None:
    assert options(image)["timing_cache"] == str(store.home() / "timing-cache")


@needs_rtx
@no_gpu
@pytest.mark.parametrize("pruned", [False, True])
def test_a_build_tells_its_command_and_asks_for_sparse_kernels_where_weights_are(
    image: Case, capsys: pytest.CaptureFixture[str], pruned: bool
) -> None:
    section = Build(runtime="tensorrt-rtx", tensorrt=TensorRT(level=1))
    engine: Engine = build.build.fn(
        linear(image, pruned), image.checkpoint, image.dataset, section, "tensorrt-rtx", ""
    )
    command = engine.facts["command"]
    assert command in capsys.readouterr().err
    assert "--builderOptimizationLevel=1" in command
    assert ("--sparsity=enable" in command) is pruned
    assert engine.proved == "built"
    assert (store.path(engine.plan.blob) / "plan.json").read_text().count("--builderOptimizationLevel=1") == 1


def linear(case: Case, pruned: bool) -> OnnxModel:
    """A linear classifier in FP16, dense or 2:4."""
    sample = batches.samples(case.dataset, batches.preprocessor(case.checkpoint))[0]
    ((name, array),) = sample.items()
    width, count = int(np.prod(array.shape[1:])), len(case.dataset.labels)
    weights = np.random.default_rng(0).standard_normal((width, count)).astype(np.float16)
    weights[[row for row in range(width) if row % 4 > 1] if pruned else []] = 0
    nodes = [
        helper.make_node("Flatten", [name], ["flat"]),
        helper.make_node("Cast", ["flat"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["half", "w"], ["product"]),
        helper.make_node("Cast", ["product"], ["logits"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *array.shape[1:]])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", count])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    with store.staging() as folder:
        (folder / "onnx").mkdir()
        onnx.save(model, folder / "onnx" / "model.onnx")
        return OnnxModel(store.commit(folder / "onnx"), "fp16", {})


def test_the_section_is_part_of_what_a_kept_build_depends_on(tmp_path: Path) -> None:
    plain, other = Build(runtime="tensorrt"), Build(runtime="tensorrt", tensorrt=TensorRT(level=5))
    assert plain.model_dump(mode="json") != other.model_dump(mode="json")
