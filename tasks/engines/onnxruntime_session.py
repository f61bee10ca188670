"""Opening a plan with its weights in ONNX Runtime, after checking that they belong together."""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx

from tasks.artifacts import Facts
from tasks.engines import onnxruntime_providers as providers
from tasks.engines.common import PAST, Arrays
from tasks.engines.lowering.split import PLAN, PLAN_INDEX, WEIGHTS, WEIGHTS_INDEX, sha256, table
from tasks.errors import InputError

LEVELS = (
    "all",
    "extended",
    "basic",
    "disabled",
)  # fastest first; `disabled` computes just what the graph says
EXACT_U8S8 = {"amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp"}


def version() -> str | None:
    """The installed ONNX Runtime's version, None without one."""
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def device() -> str:
    """The host class, named after its best kernels for 8-bit integers."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    for flag in ("amx_int8", "avx512_vnni", "avx_vnni", "avx512bw", "avx2", "i8mm", "asimddp"):
        if flag in flags:
            return f"cpu:{flag}"
    return f"cpu:{platform.machine().lower()}"


class OrtSession:
    """One opened graph; `inputs` gives each input's dtype and shape, None where it is dynamic."""

    def __init__(self, session: Any) -> None:
        self.raw: Any = session
        self.inputs = {i.name: (_dtype(i.type), _shape(i.shape)) for i in session.get_inputs()}
        self.outputs = [o.name for o in session.get_outputs()]

    def run(self, feed: Arrays) -> dict[str, np.ndarray]:
        """All outputs by name; a key/value cache that is not fed is an empty one.

        Raises InputError when the inputs do not fit the graph.
        """
        try:
            whole = {**self._empty_past(feed), **feed}
            return dict(zip(self.outputs, self.raw.run(self.outputs, whole), strict=True))
        except Exception as error:  # onnxruntime's exception classes share no public base
            shapes = {name: array.shape for name, array in feed.items()}
            raise InputError(f"the engine takes {self.inputs} and cannot run on {shapes}: {error}") from error

    def _empty_past(self, feed: Arrays) -> dict[str, np.ndarray]:
        missing = [name for name in self.inputs if name.startswith(PAST) and name not in feed]
        rows = len(next(iter(feed.values()))) if missing else 0
        shapes = {name: [size or 0 for size in self.inputs[name][1][1:]] for name in missing}
        return {name: np.zeros((rows, *shape), self.inputs[name][0]) for name, shape in shapes.items()}

    def to_device(self, feed: Arrays, device: str = "cuda") -> dict[str, Any]:
        """The inputs copied to a device once, as OrtValues for `run_on_device`."""
        import onnxruntime as ort

        return {name: ort.OrtValue.ortvalue_from_numpy(array, device, 0) for name, array in feed.items()}

    def run_on_device(self, feed: Mapping[str, Any], device: str = "cuda") -> dict[str, Any]:
        """All outputs by name as OrtValues on the device: through IOBinding nothing crosses to the host."""
        binding = self.raw.io_binding()
        for name, value in feed.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name, device)
        self.raw.run_with_iobinding(binding)
        return dict(zip(self.outputs, binding.get_outputs(), strict=True))

    def __enter__(self) -> OrtSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.raw = None


def open(
    plan: Path,
    weights: Path | None,
    *,
    level: str | None = None,
    threads: int | None = None,
    profile: Path | None = None,
    cache: Path | None = None,
) -> OrtSession:
    """The plan with its weights, at the level its build found unless another is asked for.

    A plan for a compiling provider keeps its engines in `cache` (a temporary folder by default).

    A folder with a plain `model.onnx` opens too, when a level is named: it is the reference.
    """
    if level is not None and weights is None and (plan / PLAN).exists() and not (plan / PLAN_INDEX).exists():
        return start(plan / PLAN, None, level=level, threads=threads, profile=profile)
    index = check_plan(plan)
    check_weights(plan, weights)
    level = level or index["level"]
    return start(
        plan / PLAN,
        weights,
        level=level,
        threads=threads,
        profile=profile,
        provider=index.get("provider", "cpu"),
        cache=cache,
    )


def start(
    model: Path,
    weights: Path | None,
    *,
    level: str,
    threads: int | None = None,
    profile: Path | None = None,
    provider: str = "cpu",
    cache: Path | None = None,
) -> OrtSession:
    """A session on any ONNX file whose outside data, if any, lies in `weights`."""
    import onnxruntime as ort

    name = providers.require(provider)
    options = session_options(level, threads, device())
    cache = cache or Path(tempfile.gettempdir()) / f"enginehouse-{sha256(model)[:16]}"
    for key, value in providers.session_entries(provider, cache).items():
        options.add_session_config_entry(key, value)
    chosen = [(name, providers.options(provider, cache, weights))]
    if weights is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(weights.resolve())
        )
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    source: bytes | str = str(model) if weights is None else model.read_bytes()
    try:
        return OrtSession(ort.InferenceSession(source, options, providers=chosen))
    except Exception as error:  # onnxruntime's exception classes share no public base
        raise InputError(f"ONNX Runtime {version()} cannot open {model} at level {level}: {error}") from error


def open_file(model: Path, level: str) -> OrtSession:
    """A session on a file with its outside data beside it, with a level and no option of ours.

    That is how other servers open it: they know levels, but not the entries that `session_options` sets.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = _level(level)
    try:
        return OrtSession(ort.InferenceSession(str(model), options, providers=[providers.NAMES["cpu"]]))
    except Exception as error:  # onnxruntime's exception classes share no public base
        raise InputError(f"ONNX Runtime {version()} cannot open {model} at level {level}: {error}") from error


def _level(level: str) -> Any:
    import onnxruntime as ort

    name = "ORT_DISABLE_ALL" if level == "disabled" else f"ORT_ENABLE_{level.upper()}"
    return getattr(ort.GraphOptimizationLevel, name)


def session_options(level: str, threads: int | None, host: str) -> Any:
    """Session options for a host class.

    The runtime's own Q/DQ fusions are off: they are what makes optimized graphs wrong, lowering
    has done their work, and without them weights that stay float are dequantized once, at opening.

    Without VNNI, x86 kernels for unsigned times signed 8 bits saturate in between and give wrong
    sums: there the runtime is told to use its exact, slower unsigned kernels.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = _level(level)
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    if host.removeprefix("cpu:") not in EXACT_U8S8:
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def check_plan(plan: Path) -> Facts:
    """The plan's index, once the plan is whole and made for the ONNX Runtime at hand."""
    file = plan / PLAN_INDEX
    if not file.exists() or not (plan / PLAN).exists():
        raise InputError(f"{plan} holds no plan ({PLAN}, {PLAN_INDEX}); give the `plan` folder of a build")
    index: Facts = json.loads(file.read_text())
    if sha256(plan / PLAN) != index["sha256"]:
        raise InputError(
            f"{plan / PLAN} is damaged or cut short: its sha256 is not {index['sha256']}; build again"
        )
    if index["version"] != version():
        raise InputError(
            f"{plan} was made by ONNX Runtime {index['version']}, here is {version()}; "
            f"build again, or install onnxruntime=={index['version']}"
        )
    return index


def check_weights(plan: Path, weights: Path | None) -> None:
    """Raise unless `weights` holds every tensor of the plan, unharmed, and none besides."""
    stubs = table(onnx.load(plan / PLAN, load_external_data=False))
    if weights is None:
        if stubs:
            raise InputError(f"{plan} needs weights ({len(stubs)} tensors); give the `weights` folder too")
        return
    file = weights / WEIGHTS_INDEX
    if not file.exists() or not (weights / WEIGHTS).exists():
        raise InputError(
            f"{weights} holds no weights ({WEIGHTS}, {WEIGHTS_INDEX}); give a build's `weights` folder"
        )
    index: Facts = json.loads(file.read_text())
    problem = table_problem(stubs, index["tensors"])
    if problem:
        raise InputError(
            f"{weights} belongs to another graph than {plan}: {problem}; take the plan it was made for"
        )
    if sha256(weights / WEIGHTS) != index["sha256"]:
        raise InputError(
            f"{weights / WEIGHTS} was swapped or damaged: its sha256 is not {index['sha256']}; refit again"
        )
    if sha256(plan / PLAN) != index["plan"]:
        raise InputError(f"{weights} was made for plan {index['plan']}, not for {plan}; refit {plan}")


def table_problem(want: dict[str, Any], have: dict[str, Any]) -> str:
    """The first difference between two tables of tensors, "" without one."""
    for name in sorted({*want, *have}):
        if name not in have:
            return f"tensor {name} is missing"
        if name not in want:
            return f"tensor {name} is not used"
        if want[name] != have[name]:
            return f"tensor {name} is {have[name]}, not {want[name]}"
    return ""


def _dtype(kind: str) -> str:
    name = kind.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64", "string": "str"}.get(name, name)


def _shape(dims: Sequence[int | str | None]) -> tuple[int | None, ...]:
    return tuple(d if isinstance(d, int) else None for d in dims)
