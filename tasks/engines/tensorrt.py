"""The TensorRT engine, on Polygraphy: TensorRT 11 and 10 (strongly typed), for RTX, and 8.6 (weakly typed).

A plan is `plan/engine.plan` with `plan/plan.json` (what it is of, and whether it may be refitted); its
weights, where apart, are `weights/model.onnx`, and opening both refits the one with the other.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from tasks.artifacts import Facts, Proved
from tasks.engines import tensorrt_api as api
from tasks.engines import tensorrt_build, tensorrt_parity, tensorrt_proof, tensorrt_refit
from tasks.engines import tensorrt_choose as choose
from tasks.engines import tensorrt_weights as weights_of
from tasks.engines.common import Arrays, Built, RefitError, Samples, graph_digest, model_file
from tasks.engines.tensorrt_options import (
    OPSET_8_6,
    Options,
    check,
    data_types,
    is_quantized,
    profiles_for,
    too_old,
)
from tasks.engines.tensorrt_run import TensorRTSession, load, manifest_of, used_bytes
from tasks.errors import InputError

log = logging.getLogger(__name__)


def version(flavor: api.Flavor | None = None) -> str | None:
    """The installed TensorRT's version; None when there is none."""
    flavor = flavor or api.installed()
    return api.version_of(flavor) if flavor else None


def device() -> str:
    """The GPU as "NAME (MAJOR.MINOR)", "none" without one."""
    return str(api.gpu() or "none")


def is_weakly_typed(runtime: str) -> bool:
    """Whether precision is the builder's choice, not the graph's, with the TensorRT that is installed."""
    flavor = api.flavor(runtime)
    found = version(flavor)
    return found is not None and api.weakly_typed(flavor, found)


def cannot(runtime: str, *, refit_always: bool, format: str | None, opset: int) -> str:
    """Why this machine cannot do what a recipe asks, known without a model; "" when it can."""
    flavor, gpu = api.flavor(runtime), api.gpu()
    if refit_always and not api.can_execute(flavor):
        return no_refit(flavor)
    found = version(flavor)
    if found and format and (doubt := too_old(format, flavor, found, gpu)):
        return f"quantize.format: {doubt}"
    if is_weakly_typed(runtime) and opset > OPSET_8_6:
        return f"export.opset: TensorRT {found} reads up to {OPSET_8_6}, not {opset}"
    return ""


def no_refit(flavor: api.Flavor) -> str:
    """What is said of `refit: always` where no refit can be tried."""
    return (
        f"refit: always needs a GPU that runs {flavor}; this machine has {device()}: "
        "build there, or use refit: auto"
    )


def is_sparse(model: Path) -> bool:
    """Whether the model holds weights that are 2:4: only for these is SPARSE_WEIGHTS worth asking."""
    return bool(weights_of.two_four(onnx.load(model_file(model))))


def device_bytes(runtime: str) -> int:
    """Bytes in use on the GPU, whoever uses them; the library is loaded and the context made before."""
    api.use(api.flavor(runtime))
    return used_bytes()


def executes(flavor: api.Flavor) -> bool:
    """Whether this host's GPU runs the flavor's engines."""
    return api.can_execute(flavor)


def build(
    model: Path,
    folder: Path,
    *,
    samples: Samples,
    reference: Sequence[Arrays] | None = None,
    flavor: api.Flavor | None = None,
    **options: Any,
) -> Built:
    """Write `folder/plan` (and `folder/weights` when stripped); `options` are the fields of `Options`.

    `reference` are the right outputs for the samples; without it ONNX's own evaluator computes them.
    Where no GPU runs the flavor, or this process uses the other one, the plan is only `built`, and never
    refittable.
    """
    start = time.perf_counter()
    source = model_file(model).resolve()
    graph = onnx.load(source, load_external_data=False)
    job = _job(source, graph, folder / "plan" / "engine.plan", samples, flavor, Options(**options))
    shutil.rmtree(folder / "plan", ignore_errors=True)
    log.info("building %s with %s; %s", source, job.flavor, choose.command(job))
    manifest: Facts = {
        "graph": graph_digest(graph),
        "runtime": job.flavor,
        "version": version(job.flavor),
        "device": device(),
        "capability": list(found.capability) if (found := api.gpu()) else None,
        "platform": api.platform_name(),
        "hardware": job.options.hardware,
        "version_compatible": job.options.version_compatible,
    }
    if not api.can_execute(job.flavor):
        return _built(manifest, job, "built where no GPU could try a refit")
    if api.uses_other(job.flavor) and job.options.refit != "always":
        return _built(manifest, job, "built where the other TensorRT is in use, so that no refit was tried")
    if reference is None:
        reference = tensorrt_parity.reference(source, samples)
    facts = choose.build(manifest, job, samples, reference)
    facts |= {"proof": proof(folder / "plan"), "seconds": time.perf_counter() - start}
    return _result(manifest, "executed", facts)


def _job(
    source: Path,
    graph: onnx.ModelProto,
    plan: Path,
    samples: Samples,
    flavor: api.Flavor | None,
    options: Options,
) -> tensorrt_build.Job:
    """The plain (not refittable) build, everything checked that can be before it."""
    flavor = flavor or api.installed()
    found = version(flavor)
    if flavor is None or found is None:
        raise InputError("no TensorRT is installed: pip install tensorrt-rtx (or tensorrt, with a GPU)")
    check(graph, source, flavor, found, api.gpu(), options)
    weak = None
    if api.weakly_typed(flavor, found):
        half = options.half or onnx.TensorProto.FLOAT16 in data_types(graph)
        weak = tuple(kind for kind, wanted in (("fp16", half), ("int8", is_quantized(graph))) if wanted)
    cache = None
    if options.timing_cache and api.can_execute(flavor):
        name = f"{flavor}-{found}-{device()}.cache".replace(" ", "_")
        cache = str(Path(options.timing_cache) / name)
        Path(options.timing_cache).mkdir(parents=True, exist_ok=True)
    profiles = profiles_for(graph, options, samples)
    return tensorrt_build.Job(str(source), str(plan), flavor, options, profiles, weak, False, cache)


def _built(manifest: Facts, job: tensorrt_build.Job, why: str) -> Built:
    """Build where nothing can be executed, and say why."""
    if job.options.refit == "always":
        raise InputError(no_refit(job.flavor))
    made = tensorrt_build.run(job)
    refit = {**choose.NO_REFIT, "reason": why}
    facts = {"build_seconds": made["seconds"], "refit": refit, **choose.seal(manifest, job, refit)}
    return _result(manifest, "built", facts)


def _result(manifest: Facts, proved: Proved, facts: Facts) -> Built:
    return Built(
        manifest["graph"], manifest["runtime"], manifest["version"], manifest["device"], proved, facts
    )


def refit(
    plan: Path,
    model: Path,
    folder: Path,
    *,
    samples: Samples,
    reference: Sequence[Arrays] | None = None,
) -> Built:
    """The plan with a new training's weights, in `folder/weights`; RefitError(reason) on any doubt."""
    source, start = model_file(model), time.perf_counter()
    apart = folder / "weights"
    try:
        manifest = manifest_of(plan)
        tensorrt_refit.check_weights(manifest, onnx.load(source), source)
        if reference is None:
            reference = tensorrt_parity.reference(source, samples)
        weights_of.copy_model(source, apart)
        opening = time.perf_counter()
        with open(plan, apart) as session:
            opened, given = time.perf_counter() - opening, session.refit_seconds
            parity = tensorrt_parity.verify(session, samples, reference, manifest["refit"]["fresh_error"])
    except (RefitError, InputError) as doubt:
        shutil.rmtree(apart, ignore_errors=True)
        raise RefitError(str(doubt)) from doubt
    facts: Facts = {"parity": parity, "open_seconds": opened, "refit_seconds": given}
    facts |= {"command": manifest["command"], "bytes": manifest["bytes"]}
    facts["seconds"] = time.perf_counter() - start
    return _result(manifest, "executed", facts)


def open(plan: Path, weights: Path | None, *, lean: bool = False) -> TensorRTSession:
    """The plan as a session, refitted with the weights where they are apart.

    InputError for bytes of another version, device, platform or graph, or damaged ones; RefitError
    when the weights do not go in.
    """
    return tensorrt_refit.opened(plan, weights, lean=lean)


def proof(plan: Path) -> Facts:
    """What the engine runs, layer by layer, as the engine inspector says: quantized and sparse shares."""
    held, _ = load(plan)
    inspector = held.engine.create_engine_inspector()
    text = inspector.get_engine_information(held.trt.LayerInformationFormat.JSON)
    return tensorrt_proof.summary(tensorrt_proof.layers(text))


def whole_plan(plan: Path, weights: Path | None, file: Path) -> None:
    """Write one engine file with its weights inside, as a serving system loads it."""
    if weights is None:
        manifest_of(plan)
        shutil.copyfile(plan / "engine.plan", file)
        return
    held, manifest = load(plan)
    source = model_file(weights)
    model = onnx.load(source)
    tensorrt_refit.check_weights(manifest, model, source)
    tensorrt_refit.refit_engine(held, manifest, source, model)
    file.write_bytes(tensorrt_refit.serialized(held, manifest["runtime"], manifest["version"]))
