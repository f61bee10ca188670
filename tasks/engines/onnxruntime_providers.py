"""Execution providers other than the CPU: their options, and the EP-context models that they leave behind.

TensorRT and TensorRT-RTX take the Q/DQ graph as it is and compile it themselves. What they compile is kept in
an ONNX file with EPContext nodes: engines inside, or beside it, with or without their weights.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from tasks.artifacts import Facts
from tasks.errors import InputError

NAMES = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "nv_tensorrt_rtx": "NvTensorRTRTXExecutionProvider",
}
CONTEXT = "context.onnx"
Profile = dict[str, dict[str, tuple[int, ...]]]  # input: {"min" | "opt" | "max": shape}


def available(provider: str) -> bool:
    """Whether the installed ONNX Runtime has this provider; InputError for a name that is none."""
    import onnxruntime as ort

    if provider not in NAMES:
        raise InputError(f"provider {provider!r} is unknown; choose one of {', '.join(NAMES)}")
    return NAMES[provider] in ort.get_available_providers()


def require(provider: str) -> str:
    """The provider's name in ONNX Runtime; InputError when it is not in the one installed here."""
    import onnxruntime as ort

    if not available(provider):
        raise InputError(
            f"{NAMES[provider]} is not in ONNX Runtime {ort.__version__} here (it has "
            f"{', '.join(ort.get_available_providers())}); install onnxruntime-gpu on a machine with an "
            "NVIDIA GPU, or use provider: cpu"
        )
    return NAMES[provider]


def options(
    provider: str, cache: Path, weights: Path | None = None, profile: Profile | None = None
) -> dict[str, str]:
    """A provider's options: engines and timings go to `cache`, stripped when `weights` can refit them."""
    if provider == "tensorrt":
        return _tensorrt(cache, weights, profile or {})
    if provider == "nv_tensorrt_rtx":
        found = {"enable_cuda_graph": "0", "nv_runtime_cache_path": str(cache)}
        return found | {f"nv_profile_{end}_shapes": _shapes(profile, end) for end in _ENDS if profile}
    return {}


def session_entries(provider: str, cache: Path, embed: bool = False) -> dict[str, str]:
    """Session entries that make a compiling provider write an EP-context model; none for the others."""
    if provider not in ("tensorrt", "nv_tensorrt_rtx"):
        return {}
    return {
        "ep.context_enable": "1",
        "ep.context_file_path": str(cache / CONTEXT),
        "ep.context_embed_mode": "1" if embed else "0",
        "session.disable_cpu_ep_fallback": "1",
    }


def contexts(model: Path) -> list[Facts]:
    """The attributes of every EPContext node of a model; an engine inside counts as its number of bytes.

    Raises InputError when there is none, or when the file that a node points at is not there.
    """
    nodes = [n for n in onnx.load(model, load_external_data=False).graph.node if n.op_type == "EPContext"]
    if not nodes:
        raise InputError(
            f"{model} has no EPContext node: no provider compiled it; open it with provider options"
        )
    return [_context(node, model) for node in nodes]


_ENDS = ("min", "opt", "max")


def _tensorrt(cache: Path, weights: Path | None, profile: Profile) -> dict[str, str]:
    found = {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(cache),
    }
    if weights is not None:
        # A stripped engine is refitted at load from the ONNX that lies in this folder.
        found |= {"trt_weight_stripped_engine_enable": "1", "trt_onnx_model_folder_path": str(weights)}
    return found | {f"trt_profile_{end}_shapes": _shapes(profile, end) for end in _ENDS if profile}


def _shapes(profile: Profile | None, end: str) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, shapes[end]))}" for name, shapes in (profile or {}).items())


def _context(node: onnx.NodeProto, model: Path) -> Facts:
    found = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    found = {
        name: value.decode(errors="replace") if isinstance(value, bytes) else value
        for name, value in found.items()
    }
    content = str(found.pop("ep_cache_context", ""))
    if found.setdefault("embed_mode", 1):
        return {**found, "bytes": len(content)}
    engine = model.parent / content
    if Path(content).is_absolute() or ".." in Path(content).parts:
        raise InputError(f"{model} points at an engine outside its folder ({content}); compile it again")
    if not engine.exists():
        raise InputError(f"{model} points at {engine}, which is not there; keep both files together")
    return {**found, "engine": content, "bytes": engine.stat().st_size}
