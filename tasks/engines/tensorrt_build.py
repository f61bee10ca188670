"""One native build in a process that can be ended: `python -m tasks.engines.tensorrt_build JOB`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from tasks import children
from tasks.engines import tensorrt_constants
from tasks.engines.tensorrt_api import Flavor, use
from tasks.engines.tensorrt_options import Options, Profile
from tasks.engines.tensorrt_unfold import unfolded
from tasks.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


@dataclass(frozen=True)
class Job:
    """One plan to build: files, flags and profiles, as JSON between the two processes."""

    model: str
    plan: str
    flavor: Flavor
    options: Options
    profiles: Sequence[Profile]
    weak_types: tuple[str, ...] | None  # builder flags fp16, int8; None for a strongly typed network
    refit: bool
    cache: str | None  # timing cache file


def run(job: Job) -> dict[str, Any]:
    """Build in a subprocess; its seconds and bytes. InputError says what the parser or builder said."""
    plan = Path(job.plan)
    plan.parent.mkdir(parents=True, exist_ok=True)
    order, answer, log = (plan.with_suffix(suffix) for suffix in (".job", ".answer", ".log"))
    order.write_text(json.dumps(asdict(job)))
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tasks.engines.tensorrt_build", str(order)],
            env={**os.environ, "PYTHONPATH": path},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=children.end_with_the_parent,
        )
        try:
            status = process.wait(timeout=job.options.timeout)
        except subprocess.TimeoutExpired as error:
            message = f"building {job.model} took more than {job.options.timeout:g} s: raise `timeout`"
            raise InputError(message) from error
        finally:
            _end(process)
    text = log.read_text(errors="replace")
    facts = json.loads(answer.read_text()) if answer.exists() else {}
    for file in (order, answer, log):
        file.unlink(missing_ok=True)
    if status != 0 or "seconds" not in facts:
        raise InputError(
            f"{job.flavor} cannot build {job.model}: {_reason(facts.get('error', ''), text, status)}"
        )
    return dict(facts)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the whole process group, if it still runs."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _reason(error: str, log: str, status: int) -> str:
    """The lines that say why: the log's errors, then the exception; the exit status if neither exists."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in log.splitlines()]
    wrong = [line for line in lines if re.match(r"\[E\] .*(In node|Error)|\[F\]|Internal Error", line)]
    told = list(dict.fromkeys([*wrong[:6], *error.splitlines()[:3]]))
    return " | ".join(told) or f"the builder ended with status {status}; its last words: {lines[-1:]}"


def build_here(job: Job) -> dict[str, Any]:
    """Parse, configure and build in this process; writes the plan file.

    Returns seconds, bytes and, for a plan that is refitted by name, the constants that the parser made.
    """
    trt = use(job.flavor)
    from polygraphy.backend.trt import engine_bytes_from_network, network_from_onnx_path

    start = time.perf_counter()
    kinds = {} if job.weak_types is not None else {"strongly_typed": True}
    builder, network, parser = network_from_onnx_path(_as_parsed(job), **kinds)
    if job.refit:
        for name in job.options.individual:
            _mark(network, name)
    named = job.refit and job.weak_types is not None
    facts = {"constants": tensorrt_constants.of_network(trt, network)} if named else {}
    config = _config(trt, job)(builder, network)
    parsed = time.perf_counter()
    plan = engine_bytes_from_network((builder, network, parser), config=config, save_timing_cache=job.cache)
    Path(job.plan).write_bytes(memoryview(plan))
    Path(job.plan).with_suffix(".onnx").unlink(missing_ok=True)
    seconds = {"seconds": time.perf_counter() - start, "parse_seconds": parsed - start}
    return {**seconds, "bytes": plan.nbytes, **facts}


def _as_parsed(job: Job) -> str:
    """The model file, or for TensorRT 8.6 one beside the plan whose INT8 weights are floats."""
    if job.weak_types is None or "int8" not in job.weak_types:
        return job.model
    path = Path(job.plan).with_suffix(".onnx")
    onnx.save(unfolded(onnx.load(job.model)), path)
    return str(path)


def _mark(network: Any, name: str) -> None:
    if not network.mark_weights_refittable(name):
        raise InputError(f"individual: the network has no weights named {name}")


def _config(trt: Any, job: Job) -> Any:
    """Polygraphy's configuration loader, with the flags it has no word for set afterwards."""
    from polygraphy.backend.trt import CreateConfig, PostprocessConfig, Profile

    options = job.options
    profiles = []
    for shapes in job.profiles:
        profile = Profile()
        for name, row in shapes.items():
            profile.add(name, min=tuple(row["min"]), opt=tuple(row["opt"]), max=tuple(row["max"]))
        profiles.append(profile)
    config = CreateConfig(
        profiles=profiles,
        tf32=options.tf32,
        sparse_weights=options.sparse,
        refittable=job.refit and not options.individual and not options.identical,
        strip_plan=job.refit and job.weak_types is None,
        builder_optimization_level=options.level,
        version_compatible=options.version_compatible,
        exclude_lean_runtime=options.version_compatible,  # it is opened with the one that is installed
        hardware_compatibility_level=_hardware(trt, options.hardware),
        memory_pool_limits={trt.MemoryPoolType.WORKSPACE: options.workspace} if options.workspace else None,
        profiling_verbosity=trt.ProfilingVerbosity.DETAILED,
        load_timing_cache=job.cache if options.builds == 1 else None,
        **dict.fromkeys(job.weak_types or (), True),
    )
    if job.refit and (options.individual or options.identical):
        return PostprocessConfig(config, lambda builder, network, made: _special_refit(trt, made, options))
    return config


def _hardware(trt: Any, level: str) -> Any:
    if level == "none":
        return None
    if level == "ampere_plus":
        return trt.HardwareCompatibilityLevel.AMPERE_PLUS
    return _same_capability(trt)


def _same_capability(trt: Any) -> Any:
    return trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY


def _special_refit(trt: Any, config: Any, options: Options) -> None:
    config.set_flag(
        trt.BuilderFlag.REFIT_IDENTICAL if options.identical else trt.BuilderFlag.REFIT_INDIVIDUAL
    )


def main() -> int:
    """Do the job in the file named on the command line and write the answer beside it."""
    order = Path(sys.argv[1])
    fields = json.loads(order.read_text())
    fields["options"] = Options(**fields["options"])
    answer = order.with_suffix(".answer")
    try:
        answer.write_text(json.dumps(build_here(Job(**fields))))
    except Exception as error:  # Polygraphy and the bindings share no public base class
        answer.write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
