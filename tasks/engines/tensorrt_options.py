"""What a recipe says of a TensorRT build, what is checked before it, and trtexec's words for it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx

from tasks.engines import microscale
from tasks.engines.common import Samples
from tasks.engines.tensorrt_api import Flavor, Gpu, numbers, weakly_typed
from tasks.errors import InputError

Shape = Sequence[int]
Profile = Mapping[str, Mapping[str, Shape]]  # input -> {"min", "opt", "max"}

FP8 = {onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.FLOAT8E5M2}
FP4 = getattr(onnx.TensorProto, "FLOAT4E2M1", 23)  # ONNX has it since 1.18, TensorRT 8.6 goes with 1.17
NEW_TYPES = {*FP8, FP4, onnx.TensorProto.BFLOAT16, onnx.TensorProto.INT4}
QUANTIZED = {onnx.TensorProto.INT8, onnx.TensorProto.INT4, FP4, *FP8}
OPSET_8_6 = 17
CAPABILITY = {"fp8": (8, 9), "nvfp4": (10, 0), "mxfp8": (10, 0)}
NAMES = {(8, 9): "Ada, Hopper or newer", (10, 0): "Blackwell or newer"}
VERSION = {"fp8": (10,), "nvfp4": (10, 8), "mxfp8": (10, 8)}
"""The first compute capability and TensorRT of a format; TensorRT for RTX reads them all."""
RTX_CAPABILITY = {"mxfp8": (8, 9)}  # where its plans build earlier


@dataclass(frozen=True)
class Options:
    """How to build; every field has trtexec's meaning unless said otherwise.

    profiles: one or more of {input: {min, opt, max}}; without any, one is derived from the samples.
    refit: `auto` keeps a refittable plan only when its latency tax is at most `max_tax` and a trial
    refit was right. individual: names of the only weights that change. identical: REFIT_IDENTICAL.
    half: FP16 kernels for an FP32 graph (8.6 only; later versions take precision from the graph).
    builds: keep the fastest of so many. workspace: bytes. timing_cache: a folder. timeout: seconds.
    """

    profiles: Sequence[Profile] = ()
    refit: Literal["auto", "always", "never"] = "auto"
    max_tax: float = 0.05
    individual: tuple[str, ...] = ()
    identical: bool = False
    half: bool = False
    sparse: bool = False
    tf32: bool = True
    level: int | None = None
    workspace: int | None = None
    version_compatible: bool = False
    hardware: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    builds: int = 1
    timing_cache: str | None = None
    timeout: float = 3600.0


def data_types(model: onnx.ModelProto) -> set[int]:
    """Element types of every initializer, constant, and cast or quantize target."""
    return set(_data_types(model.graph))


def _data_types(graph: onnx.GraphProto) -> Iterator[int]:
    yield from (tensor.data_type for tensor in graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t.data_type
            elif attribute.type == onnx.AttributeProto.GRAPH:
                yield from _data_types(attribute.g)
            elif attribute.name in ("to", "output_dtype"):
                yield attribute.i


def is_quantized(model: onnx.ModelProto) -> bool:
    """True when the graph holds DequantizeLinear nodes."""
    return any(node.op_type == "DequantizeLinear" for node in model.graph.node)


def format_of(model: onnx.ModelProto) -> str:
    """The format in `CAPABILITY` that the graph is in; "" for any other."""
    operators = {node.op_type for node in model.graph.node}
    for format, operator in (("nvfp4", microscale.FP4_QUANTIZE), ("mxfp8", microscale.MXFP8_QUANTIZE)):
        if operator in operators:
            return format
    return "fp8" if data_types(model) & FP8 else ""


def too_old(format: str, flavor: Flavor, version: str, gpu: Gpu | None) -> str:
    """Why this TensorRT on this GPU cannot build a format; "" when it can."""
    least = VERSION.get(format, ())
    if flavor == "tensorrt" and numbers(version) < least:
        return f"{format} needs TensorRT {'.'.join(map(str, least))} or newer; here is {version}: use int8"
    capability = CAPABILITY.get(format)
    if flavor == "tensorrt_rtx":
        capability = RTX_CAPABILITY.get(format, capability)
    if capability and gpu is not None and gpu.capability < capability:
        needs = f"{format} needs compute capability {'.'.join(map(str, capability))} ({NAMES[capability]})"
        return f"{needs}; here is {gpu}: use {'int8' if format == 'fp8' else 'fp8 or int8'}"
    return ""


def half_scales(model: onnx.ModelProto) -> bool:
    """True when a quantizer's scale is stored as FP16."""
    stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return any(
        stored.get(node.input[1]) == onnx.TensorProto.FLOAT16
        for node in model.graph.node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear")
    )


def opset(model: onnx.ModelProto) -> int:
    """The version of the default operator set."""
    return next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)


def check(
    model: onnx.ModelProto, path: Path, flavor: Flavor, version: str, gpu: Gpu | None, options: Options
) -> None:
    """Raise InputError for what this version or this GPU cannot build, before anything is spent."""
    types = data_types(model)
    if weakly_typed(flavor, version):
        if opset(model) > OPSET_8_6:
            raise InputError(
                f"{path} is opset {opset(model)}; TensorRT {version} reads up to {OPSET_8_6}: "
                f"export with opset {OPSET_8_6}, or use TensorRT 10 or newer"
            )
        if found := types & NEW_TYPES:
            names = ", ".join(sorted(onnx.TensorProto.DataType.Name(t) for t in found))
            raise InputError(f"{path} holds {names}, which need TensorRT 10 or newer; here is {version}")
        if half_scales(model):
            raise InputError(
                f"{path} has quantizers with FP16 scales, which TensorRT {version} reads as FP32 and calls "
                "not positive: export it in FP32, and let the builder choose FP16 (half)"
            )
        if options.hardware == "same_compute_capability":
            raise InputError(f"hardware: same_compute_capability needs TensorRT 10; here is {version}")
        if options.individual or options.identical:
            raise InputError(f"individual and identical refits need TensorRT 10; here is {version}")
    elif options.half:
        raise InputError(f"half: {flavor} {version} takes precision from the graph; export it as FP16")
    if doubt := too_old(format_of(model), flavor, version, gpu):
        raise InputError(f"{path}: {doubt}")
    if options.builds < 1 or (options.builds > 1 and gpu is None):
        raise InputError(f"builds: {options.builds} needs a GPU to find the fastest on; use 1")


def profiles_for(model: onnx.ModelProto, options: Options, samples: Samples) -> list[Profile]:
    """The asked-for profiles, checked and completed; else one that spans 1 to the largest sample."""
    fixed = {tensor.name for tensor in model.graph.initializer}
    inputs = {value.name: value for value in model.graph.input if value.name not in fixed}
    if not options.profiles:
        return [{name: _derived(value, samples) for name, value in inputs.items()}]
    for profile in options.profiles:
        if unknown := set(profile) - set(inputs):
            raise InputError(f"profiles name {sorted(unknown)}; the model's inputs are {sorted(inputs)}")
        for name, shapes in profile.items():
            _check_shapes(name, inputs[name], shapes)
    return [
        {name: dict(p[name]) if name in p else _derived(value, samples) for name, value in inputs.items()}
        for p in options.profiles
    ]


def _dims(value: onnx.ValueInfoProto) -> list[int | None]:
    return [d.dim_value if d.HasField("dim_value") else None for d in value.type.tensor_type.shape.dim]


def _derived(value: onnx.ValueInfoProto, samples: Samples) -> dict[str, Shape]:
    shapes = [sample[value.name].shape for sample in samples if value.name in sample]
    dims = _dims(value)
    if None in dims and not shapes:
        raise InputError(f"input {value.name} is dynamic: give it profiles (min, opt, max) or a sample")
    high = [fixed if fixed is not None else max(s[i] for s in shapes) for i, fixed in enumerate(dims)]
    return {"min": [1 if fixed is None else fixed for fixed in dims], "opt": high, "max": high}


def _check_shapes(name: str, value: onnx.ValueInfoProto, shapes: Mapping[str, Shape]) -> None:
    if set(shapes) != {"min", "opt", "max"}:
        raise InputError(f"profile of {name}: needs min, opt and max; has {sorted(shapes)}")
    dims = _dims(value)
    rows = [shapes[key] for key in ("min", "opt", "max")]
    if any(len(row) != len(dims) for row in rows):
        raise InputError(f"profile of {name}: {rows} do not have the input's {len(dims)} dimensions")
    for low, middle, high, fixed in zip(*rows, dims, strict=True):
        if not 0 < low <= middle <= high or (fixed is not None and {low, middle, high} != {fixed}):
            raise InputError(f"profile of {name}: {dict(shapes)} is not min <= opt <= max within {dims}")


UNFOLD = "python -m tasks.engines.tensorrt_unfold model.onnx floats.onnx"
"""Before trtexec where INT8 weights go to the builder as floats."""


def trtexec(
    flavor: Flavor,
    options: Options,
    profiles: Sequence[Profile],
    *,
    weak_types: Sequence[str] | None,
    refit: bool,
) -> str:
    """The command that builds the same; `weak_types` (fp16, int8) where precision is a flag, else None."""
    floats = weak_types is not None and "int8" in weak_types
    words = ["tensorrt_rtx" if flavor == "tensorrt_rtx" else "trtexec"]
    words += ["--onnx=floats.onnx" if floats else "--onnx=model.onnx", "--saveEngine=engine.plan"]
    words += ["--profilingVerbosity=detailed"]
    for index, profile in enumerate(profiles):
        words += [f"--profile={index}"] if len(profiles) > 1 else []
        for key in ("min", "opt", "max"):
            shapes = ",".join(f"{n}:{'x'.join(map(str, s[key]))}" for n, s in profile.items())
            words.append(f"--{key}Shapes={shapes}")
    words += ["--stronglyTyped"] if weak_types is None else [f"--{kind}" for kind in weak_types]
    if refit:
        words += [] if options.identical else ["--refit"]
        words += ["--stripWeights"] if weak_types is None else []
    words += [] if options.tf32 else ["--noTF32"]
    words += ["--sparsity=enable"] if options.sparse else []
    words += [f"--builderOptimizationLevel={options.level}"] if options.level is not None else []
    words += [f"--memPoolSize=workspace:{options.workspace}B"] if options.workspace else []
    words += ["--versionCompatible", "--excludeLeanRuntime"] if options.version_compatible else []
    if options.hardware != "none":
        level = {"ampere_plus": "ampere+", "same_compute_capability": "sameComputeCapability"}[
            options.hardware
        ]
        words.append(f"--hardwareCompatibilityLevel={level}")
    words += [f"--timingCacheFile={options.timing_cache}"] if options.timing_cache else []
    return f"{UNFOLD} && {shlex.join(words)}" if floats else shlex.join(words)
