"""Build an engine from ONNX for one runtime, prove what this machine can prove, and say how far that went.

python -m flows optimize RECIPE     (stage `build`)
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.build import Build, Precision, Profile, Runtime, TensorRT
from tasks import batches, cache, store, types
from tasks.artifacts import Checkpoint, Dataset, Engine, OnnxModel, Plan
from tasks.engines import module, together
from tasks.engines.common import Built
from tasks.errors import InputError
from tasks.stage import say, stage


def installed(runtime: Runtime) -> str | None:
    """The runtime's version on this machine, None without it."""
    if runtime == "onnxruntime":
        return str(module(runtime).version())
    found = module(runtime).version(runtime.replace("-", "_"))
    return None if found is None else str(found)


def host(runtime: Runtime) -> str:
    """What a plan depends on here: device and runtime version."""
    return f"{module(runtime).device()}, {runtime} {installed(runtime)}"


def machine(runtime: Runtime) -> str:
    """What measurements depend on here: the host by name, its cores for this process, device and runtime."""
    return f"{platform.node()}, {len(os.sched_getaffinity(0))} cores, {host(runtime)}"


def precision(runtime: Runtime, asked: Precision | None = None) -> Precision:
    """What stays unquantized: as asked, else FP16 for TensorRT, FP32 for ONNX Runtime's CPU kernels.

    So is the graph for TensorRT 8.6, where FP16 is the builder's flag: a half graph has opset 19 or newer.
    """
    if _weakly_typed(runtime):
        return "fp32"
    return asked or ("fp32" if runtime == "onnxruntime" else "fp16")


def _weakly_typed(runtime: Runtime) -> bool:
    return runtime != "onnxruntime" and bool(module(runtime).is_weakly_typed(runtime))


def check_build(section: Build, format: str | None, opset: int) -> None:
    """Raise InputError for what this machine can never build or refit, before anything costly."""
    asked = section.tensorrt or TensorRT()
    always = asked.refit == "always" and not asked.version_compatible
    here = [name for name in (section.runtime, *section.also) if name != "onnxruntime" and installed(name)]
    for runtime in here:
        if doubt := module(runtime).cannot(runtime, refit_always=always, format=format, opset=opset):
            raise InputError(doubt)
    if always and len(here) > 1:
        raise InputError(
            f"build.tensorrt: refit: always: one run tries refits with one TensorRT, not with {here[0]} and "
            f"{here[1]}; take one of them out of the recipe, or use refit: auto"
        )


@stage(
    uses=("onnx", "onnxruntime", "tensorrt", "tensorrt-rtx", "polygraphy"),
    name="build",
    gpu=True,
    timeout_seconds=4 * 3600,
)
def build(
    model: OnnxModel, checkpoint: Checkpoint, dataset: Dataset, section: Build, runtime: Runtime, host: str
) -> Engine:
    """Plan and weights for `runtime`; `host` (see the function) is part of the cache key.

    `proved` is `executed` when it ran here, `built` when a plan was made that cannot run here or not in a
    process that uses the other TensorRT, `checked` when the runtime is not installed: then the plan is the
    checked ONNX itself.
    """
    with store.staging() as folder:
        shutil.copytree(batches.preprocessor(checkpoint), folder / "preprocessor")
        if installed(runtime) is None:
            built = _only_checked(model, folder, runtime)
        else:
            samples = cache.samples(dataset, folder / "preprocessor", store.path(model.blob))
            built = together.merged(
                {
                    name: _part(model, name, part, folder, samples, runtime, section)
                    for name, part in types.parts(types.load(dataset.type)).items()
                }
            )
        return _engine(built, folder, model.format)


def _part(
    model: OnnxModel,
    name: str,
    part: types.Graph,
    folder: Path,
    samples: Sequence[types.Example],
    runtime: Runtime,
    section: Build,
) -> Built:
    """One graph's plan and weights, in the engine's folder."""
    source = store.path(model.blob) / name
    own = [{key: sample[key] for key in part.INPUTS} for sample in samples] if name else samples
    options = _options(runtime, section, part.INPUTS, folder / "preprocessor", own[0])
    if runtime != "onnxruntime" and options["sparse"] is None:
        options["sparse"] = module(runtime).is_sparse(source)
    (folder / name).mkdir(exist_ok=True)
    built: Built = module(runtime).build(source, folder / name, samples=own, **options)
    if "command" in built.facts:
        say(f"build, {runtime} {built.version}: {built.facts['command']}")
    together.settled(folder, name)
    return built


def _engine(built: Built, folder: Path, format: str) -> Engine:
    weights = folder / "weights"
    return Engine(
        plan=Plan(store.commit(folder / "plan"), built.graph, built.runtime, built.version, built.device),
        weights=store.commit(weights) if weights.is_dir() else None,
        preprocessor=store.commit(folder / "preprocessor"),
        format=format,
        proved=built.proved,
        facts=built.facts,
    )


def _only_checked(model: OnnxModel, folder: Path, runtime: str) -> Built:
    shutil.copytree(store.path(model.blob), folder / "plan")
    why = f"{runtime} is not installed here; the plan is the ONNX, to be built where it is"
    return Built(together.graph_of(folder / "plan"), runtime, "none", "none", "checked", {"why": why})


def _options(
    runtime: Runtime,
    section: Build,
    axes: dict[str, dict[int, str]],
    preprocessor: Path,
    sample: types.Example,
) -> dict[str, Any]:
    if runtime == "onnxruntime":
        return {"threads": section.threads}
    asked = section.tensorrt or TensorRT()
    longest = types.settings(preprocessor).get("max_length")
    most = section.max_batch
    profiles = asked.profiles or (Profile(batch=(1, min(8, most), most)),)
    flavor = runtime.replace("-", "_")
    return {
        "flavor": flavor,
        "profiles": [_shapes(profile, sample, axes, longest) for profile in profiles],
        "refit": "never" if asked.version_compatible else asked.refit,
        "max_tax": asked.max_tax,
        "individual": asked.individual,
        "half": _weakly_typed(runtime),
        "sparse": asked.sparse,
        "level": asked.level,
        "workspace": asked.workspace_mb and asked.workspace_mb << 20,
        "builds": asked.builds if module(runtime).device() != "none" else 1,
        "timing_cache": str(store.home() / "timing-cache") if asked.timing_cache else None,
        "version_compatible": asked.version_compatible,
        "hardware": asked.hardware,
        "timeout": section.timeout_minutes * 60,
    }


def _shapes(
    profile: Profile, sample: types.Example, axes: dict[str, dict[int, str]], longest: int | None
) -> dict[str, dict[str, tuple[int, ...]]]:
    """The profile as {input: {min, opt, max}}; axes that it does not name are as in the sample."""
    seen = [
        array.shape[k] for name, array in sample.items() for k, axis in axes[name].items() if axis == "length"
    ]
    lengths = profile.length or (1, min([*seen, longest or 1]), longest or 1)
    bounds = {"min": 0, "opt": 1, "max": 2}
    return {
        name: {
            key: _shape(array.shape, axes[name], {"batch": profile.batch[i], "length": lengths[i]})
            for key, i in bounds.items()
        }
        for name, array in sample.items()
    }


def _shape(shape: tuple[int, ...], axes: dict[int, str], sizes: dict[str, Any]) -> tuple[int, ...]:
    return tuple(sizes.get(axes.get(k, ""), size) for k, size in enumerate(shape))
