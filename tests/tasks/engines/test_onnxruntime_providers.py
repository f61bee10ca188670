from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from tasks.engines import onnxruntime as engine
from tasks.engines import onnxruntime_providers as providers
from tasks.errors import InputError
from tests.tasks.engines.onnx_graphs import sentences, text

ABSENT = [name for name in ("cuda", "tensorrt", "nv_tensorrt_rtx") if not providers.available(name)]
PROFILE = {"input_ids": {"min": (1, 8), "opt": (8, 32), "max": (32, 64)}}


def context(folder: Path, **attributes: object) -> Path:
    """An EP-context model as a compiling provider writes it."""
    node = helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", main_context=1, **attributes)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("x", "y")]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    file = folder / providers.CONTEXT
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), file)
    return file


@pytest.mark.parametrize("provider", ABSENT)
def test_a_plan_for_an_absent_provider_is_only_checked_and_says_what_to_do(
    provider: str, tmp_path: Path
) -> None:
    (tmp_path / "onnx").mkdir()
    onnx.save(text(), tmp_path / "onnx" / "model.onnx")
    built = engine.build(tmp_path / "onnx", tmp_path, samples=sentences(), provider=provider)
    assert built.proved == "checked"
    assert providers.NAMES[provider] in built.facts["why"]
    index = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert (index["provider"], index["steps"]) == (provider, [])
    operators = [
        node.op_type
        for node in onnx.load(tmp_path / "plan" / "model.onnx", load_external_data=False).graph.node
    ]
    assert operators.count("QuantizeLinear") == 7
    with pytest.raises(
        InputError, match=rf"{providers.NAMES[provider]} is not in ONNX Runtime .*use provider: cpu"
    ):
        engine.open(tmp_path / "plan", tmp_path / "weights")


def test_an_unknown_provider_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'tensort' is unknown; choose one of cpu, cuda, tensorrt"):
        providers.available("tensort")


def test_tensorrt_strips_weights_only_when_it_can_find_them_again(tmp_path: Path) -> None:
    plain = providers.options("tensorrt", tmp_path)
    assert plain["trt_engine_cache_path"] == str(tmp_path)
    assert "trt_weight_stripped_engine_enable" not in plain
    stripped = providers.options("tensorrt", tmp_path, tmp_path / "weights", PROFILE)
    assert stripped["trt_onnx_model_folder_path"] == str(tmp_path / "weights")
    assert stripped["trt_profile_max_shapes"] == "input_ids:32x64"
    assert (
        providers.options("nv_tensorrt_rtx", tmp_path, None, PROFILE)["nv_profile_min_shapes"]
        == "input_ids:1x8"
    )


def test_a_compiling_provider_writes_a_context_model_that_the_session_accepts(tmp_path: Path) -> None:
    import onnxruntime as ort

    entries = providers.session_entries("tensorrt", tmp_path)
    options = ort.SessionOptions()
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
        assert options.get_session_config_entry(key) == value
    assert entries["ep.context_file_path"] == str(tmp_path / providers.CONTEXT)
    assert providers.session_entries("cpu", tmp_path) == {}


def test_a_context_model_beside_its_engine_is_read_back(tmp_path: Path) -> None:
    (tmp_path / "engine.trt").write_bytes(b"12345")
    notes = {"source": "TensorrtExecutionProvider", "hardware_architecture": "90", "ep_sdk_version": "10.9"}
    file = context(tmp_path, embed_mode=0, ep_cache_context="engine.trt", **notes)
    assert providers.contexts(file) == [
        {"main_context": 1, "embed_mode": 0, **notes, "engine": "engine.trt", "bytes": 5}
    ]


def test_a_context_model_holds_its_engine(tmp_path: Path) -> None:
    assert providers.contexts(context(tmp_path, embed_mode=1, ep_cache_context="123"))[0]["bytes"] == 3


@pytest.mark.parametrize(
    ("engine_file", "match"), [("gone.trt", "is not there"), ("../x.trt", "outside its folder")]
)
def test_a_context_model_without_its_engine_is_named(engine_file: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=match):
        providers.contexts(context(tmp_path, embed_mode=0, ep_cache_context=engine_file))


def test_a_model_that_no_provider_compiled_is_named(tmp_path: Path) -> None:
    onnx.save(text(), tmp_path / "model.onnx")
    with pytest.raises(InputError, match="has no EPContext node"):
        providers.contexts(tmp_path / "model.onnx")
