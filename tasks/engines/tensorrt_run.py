"""Opening a plan, with bytes, version, device and platform checked; a session on the GPU; latencies."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from tasks.engines import tensorrt_api as api
from tasks.engines.common import Arrays
from tasks.errors import InputError

REBUILD = "build it again here"
DTYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}  # inputs and outputs; the bindings' own nptype() fails with NumPy 1.24 and newer in 8.6


def manifest_of(plan: Path) -> dict[str, Any]:
    """`plan.json`, with the plan's bytes checked against the digest in it."""
    path, file = plan / "plan.json", plan / "engine.plan"
    if not path.exists() or not file.exists():
        raise InputError(
            f"{plan} holds no engine.plan with its plan.json: give the folder that a build wrote"
        )
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): {REBUILD}") from error
    data = file.read_bytes()
    if len(data) != manifest["bytes"]:
        raise InputError(f"{file} has {len(data)} bytes, not the {manifest['bytes']} built: fetch it again")
    if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
        raise InputError(f"{file} is not the bytes that were built (sha256 differs): fetch it again")
    return manifest


def check_host(manifest: dict[str, Any], version: str | None, gpu: api.Gpu | None, platform: str) -> None:
    """Raise InputError, saying which and what to do, for a plan of another version, device or platform."""
    runtime = manifest["runtime"]
    if gpu is None:
        raise InputError(f"a {runtime} plan needs an NVIDIA GPU and driver to open; this machine has none")
    if platform != manifest["platform"]:
        raise InputError(f"the plan is of {manifest['platform']}, this is {platform}: {REBUILD}")
    built = manifest["version"]
    if version is None:
        raise InputError(
            f"the plan needs {runtime} {built}, which is not installed: install it, or {REBUILD}"
        )
    ours, theirs = api.numbers(version), api.numbers(built)
    if manifest["version_compatible"]:
        if ours[0] != theirs[0] or ours < theirs:
            raise InputError(
                f"the plan opens with {runtime} {theirs[0]}.x from {built} on; here is {version}"
            )
    elif ours != theirs:
        raise InputError(
            f"the plan is of {runtime} {built}, here is {version}: {REBUILD}, or install {built}"
        )
    if runtime == "tensorrt_rtx":
        if gpu.capability not in api.RTX_CAPABILITIES:
            raise InputError(f"TensorRT for RTX does not run on {gpu}: build for this GPU with TensorRT")
        return
    _check_gpu(manifest, gpu)


def _check_gpu(manifest: dict[str, Any], gpu: api.Gpu) -> None:
    built = tuple(manifest["capability"])
    allowed = {
        "none": str(gpu) == manifest["device"],
        "same_compute_capability": gpu.capability == built,
        "ampere_plus": gpu.capability >= (8, 0),
    }
    if not allowed[manifest["hardware"]]:
        raise InputError(
            f"the plan is of {manifest['device']} (hardware: {manifest['hardware']}); here is {gpu}: "
            f"{REBUILD}"
        )


class Recorded:
    """An engine, its runtime and the error lines they logged, kept together because one needs the other."""

    def __init__(self, trt: Any, data: bytes, *, host_code: bool) -> None:
        self.trt = trt
        self.logger = _logger(trt)
        self.runtime = trt.Runtime(self.logger)
        if host_code:
            self.runtime.engine_host_code_allowed = True
        self.engine = self.runtime.deserialize_cuda_engine(data)
        if self.engine is None:
            raise InputError(f"the plan cannot be opened: {self.said() or 'no reason given'}; {REBUILD}")

    def said(self) -> str:
        """The last error lines."""
        return " | ".join(self.logger.lines[-4:])


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.lines.append(msg.strip())

    return Logger()


def load(plan: Path, *, lean: bool = False) -> tuple[Recorded, dict[str, Any]]:
    """Check and deserialize a plan; `lean`: with the small runtime that opens version compatible plans.

    That one is taken without asking, too, where it is installed and the whole TensorRT is not.
    """
    manifest = manifest_of(plan)
    flavor: api.Flavor = manifest["runtime"]
    if manifest["version_compatible"] and api.version_of(flavor) is None:
        lean = lean or api.version_of(f"{flavor}_lean") is not None
    if lean and not manifest["version_compatible"]:
        raise InputError(
            f"{plan}: the lean runtime opens version compatible plans only; build with that option"
        )
    version = api.version_of(f"{flavor}_lean" if lean else flavor)
    check_host(manifest, version, api.gpu(), api.platform_name())
    trt = importlib.import_module(f"{flavor}_lean") if lean else api.use(flavor)
    return Recorded(
        trt, (plan / "engine.plan").read_bytes(), host_code=manifest["version_compatible"]
    ), manifest


def used_bytes() -> int:
    """Bytes in use on the GPU by every process, this one's context included."""
    from polygraphy import cuda

    library = cuda.wrapper().handle
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    library.cudaFree(ctypes.c_void_p())  # makes the context
    if status := library.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)):
        raise InputError(f"the GPU does not say how much memory is free: CUDA error {status}")
    return total.value - free.value


class TensorRTSession:
    """One engine with its buffers on the GPU; closes by leaving the `with` block."""

    def __init__(self, held: Recorded) -> None:
        from polygraphy import cuda

        self._held, self._cuda = held, cuda
        self.refit_seconds: float | None = None  # reading and giving the weights, where they are apart
        engine, trt = held.engine, held.trt
        self._context: Any = engine.create_execution_context()
        if self._context is None:
            raise InputError(f"no execution context: {held.said()}; is the GPU's memory full?")
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self._types = {name: np.dtype(DTYPES[engine.get_tensor_dtype(name).name]) for name in names}
        ins = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self.outputs = [name for name in names if name not in ins]
        self.inputs = {
            name: (
                self._types[name].name,
                tuple(d if d >= 0 else None for d in engine.get_tensor_shape(name)),
            )
            for name in ins
        }
        profiles = range(engine.num_optimization_profiles)
        largest = [tuple(engine.get_tensor_profile_shape(ins[0], i)[2]) for i in profiles]
        self.max_batch = max(shape[0] for shape in largest)
        self._stream = cuda.Stream()
        self._buffers: dict[str, Any] = {}
        self._profile = 0

    def run(self, feed: Arrays) -> dict[str, np.ndarray]:
        """All outputs by name."""
        self._bind(feed)
        self._execute()
        return {name: self._fetch(name) for name in self.outputs}

    def latencies(self, feed: Arrays, count: int = 100, warmup: int = 20) -> list[float]:
        """Milliseconds of `count` executions by CUDA events, inputs and outputs staying on the GPU."""
        self._bind(feed)
        library, stream = self._cuda.wrapper().handle, ctypes.c_void_p(self._stream.ptr)
        start, stop, gone = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_float()
        for event in (start, stop):
            library.cudaEventCreate(ctypes.byref(event))
        times = []
        for index in range(warmup + count):
            library.cudaEventRecord(start, stream)
            self._execute()
            library.cudaEventRecord(stop, stream)
            library.cudaEventSynchronize(stop)
            library.cudaEventElapsedTime(ctypes.byref(gone), start, stop)
            times += [gone.value] if index >= warmup else []
        for event in (start, stop):
            library.cudaEventDestroy(event)
        return times

    def _bind(self, feed: Arrays) -> None:
        if set(feed) != set(self.inputs):
            raise InputError(f"the engine's inputs are {sorted(self.inputs)}; given {sorted(feed)}")
        self._choose_profile({name: array.shape for name, array in feed.items()})
        for name, array in feed.items():
            if not self._context.set_input_shape(name, tuple(array.shape)):
                raise InputError(f"input {name} cannot be {array.shape}: {self._held.said()}")
            self._array(name, array.shape).copy_from(
                np.ascontiguousarray(array, self._types[name]), self._stream
            )
        for name in self.outputs:
            self._array(name, tuple(self._context.get_tensor_shape(name)))

    def _choose_profile(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """The first optimization profile that holds all shapes."""
        engine = self._held.engine
        order = [self._profile, *(i for i in range(engine.num_optimization_profiles) if i != self._profile)]
        for index in order:
            if all(_within(engine.get_tensor_profile_shape(n, index), shape) for n, shape in shapes.items()):
                break
        else:
            raise InputError(f"{shapes} is outside every profile of the engine: widen `profiles` and rebuild")
        if index != self._profile:
            self._context.set_optimization_profile_async(index, self._stream.ptr)
            self._stream.synchronize()
            self._profile = index

    def _array(self, name: str, shape: tuple[int, ...]) -> Any:
        if name not in self._buffers:
            self._buffers[name] = self._cuda.DeviceArray(shape=tuple(shape), dtype=self._types[name])
        buffer = self._buffers[name]
        buffer.resize(tuple(shape))
        self._context.set_tensor_address(name, buffer.ptr)
        return buffer

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._stream.ptr):
            raise RuntimeError(f"the engine failed to run: {self._held.said()}")

    def _fetch(self, name: str) -> np.ndarray:
        host = np.empty(self._buffers[name].shape, self._types[name])
        self._buffers[name].copy_to(host, self._stream)
        self._stream.synchronize()
        return host

    def __enter__(self) -> TensorRTSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for buffer in self._buffers.values():
            buffer.free()
        self._buffers, self._context, self._held = {}, None, None  # type: ignore[assignment]
        self._stream.free()


def _within(bounds: Any, shape: tuple[int, ...]) -> bool:
    low, _, high = (tuple(b) for b in bounds)
    return len(low) == len(shape) and all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True))
