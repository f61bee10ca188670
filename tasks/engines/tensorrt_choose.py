"""Building where a GPU can execute: the fastest of several builds, and whether a refittable plan is kept."""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx

from tasks.artifacts import Facts
from tasks.engines import tensorrt_build, tensorrt_parity, tensorrt_refit
from tasks.engines import tensorrt_constants as constants_of
from tasks.engines import tensorrt_weights as weights_of
from tasks.engines.common import Arrays, RefitError, Samples
from tasks.engines.tensorrt_options import trtexec
from tasks.engines.tensorrt_run import TensorRTSession, load

NO_REFIT: Facts = {
    "safe": False,
    "kind": "none",  # whole: the plan holds its first weights; stripped: they are apart
    "identical": None,
    "two_four": [],
    "fixed": {},  # trained tensors that the plan keeps whatever a refit gives, with their digests
    "constants": {},  # what TensorRT made from shapes and asks back of a refit, with its values
    "fresh_error": None,
    "tax": None,
}
ROUNDS = 50


def command(job: tensorrt_build.Job) -> str:
    """The `trtexec` command that builds the same."""
    options = replace(job.options, timing_cache=job.cache)
    return trtexec(job.flavor, options, job.profiles, weak_types=job.weak_types, refit=job.refit)


def seal(manifest: Facts, job: tensorrt_build.Job, refit: Facts) -> Facts:
    """Write `plan.json` beside the plan; returns what the engine's facts repeat of it."""
    plan = Path(job.plan)
    data = plan.read_bytes()
    facts: Facts = {
        "command": command(job),
        "bytes": len(data),
    }
    kept = {key: refit[key] for key in (*NO_REFIT, "reason")}
    sealed = {**manifest, **facts, "refit": kept, "sha256": hashlib.sha256(data).hexdigest()}
    (plan.parent / "plan.json").write_text(json.dumps(sealed, indent=1, sort_keys=True))
    return facts


def build(manifest: Facts, job: tensorrt_build.Job, samples: Samples, expected: Sequence[Arrays]) -> Facts:
    """Build plain and, if wanted, refittable; keep the one that the policy says, sealed."""
    plan = Path(job.plan)
    facts = _fastest(manifest, job, samples, expected)
    refit: Facts = {**NO_REFIT, "reason": "the recipe says never"}
    if job.options.refit != "never":
        other = replace(job, plan=str(plan.parent.parent / "refittable" / plan.name), refit=True)
        plain = {**facts, "bytes": plan.stat().st_size}
        refit = _try_refittable(manifest, other, samples, expected, plain)
        if refit["safe"]:
            shutil.rmtree(plan.parent)
            Path(other.plan).parent.rename(plan.parent)
            job = replace(other, plan=str(plan))
            facts |= {key: refit[key] for key in ("build_seconds", "latency_ms")}
        shutil.rmtree(Path(other.plan).parent, ignore_errors=True)
    if refit["kind"] == "stripped":
        weights_of.copy_model(Path(job.model), plan.parent.parent / "weights")
    return {**facts, "refit": refit, **seal(manifest, job, refit)}


def _fastest(manifest: Facts, job: tensorrt_build.Job, samples: Samples, expected: Sequence[Arrays]) -> Facts:
    """Build as often as the recipe says; the fastest stays."""
    plan, trials = Path(job.plan), []
    for index in range(job.options.builds):
        path = plan.parent.parent / f"build{index}" / plan.name
        made = tensorrt_build.run(replace(job, plan=str(path)))
        seal(manifest, replace(job, plan=str(path)), {**NO_REFIT, "reason": "not yet tried"})
        trials.append({"build_seconds": made["seconds"], **_measured(path.parent, None, samples, expected)})
    best = min(range(len(trials)), key=lambda i: trials[i]["latency_ms"])
    shutil.rmtree(plan.parent, ignore_errors=True)
    (plan.parent.parent / f"build{best}").rename(plan.parent)
    for index in range(len(trials)):
        shutil.rmtree(plan.parent.parent / f"build{index}", ignore_errors=True)
    times = [trial["latency_ms"] for trial in trials]
    spread = {"builds_ms": times, "spread": max(times) / min(times) - 1} if len(times) > 1 else {}
    return {**trials[best], **spread}


def _measured(plan: Path, weights: Path | None, samples: Samples, expected: Sequence[Arrays]) -> Facts:
    with tensorrt_refit.opened(plan, weights) as session:
        parity = tensorrt_parity.measure(session, samples, expected)
        return {"parity": parity, "latency_ms": statistics.median(session.latencies(samples[0], ROUNDS))}


def _try_refittable(
    manifest: Facts, job: tensorrt_build.Job, samples: Samples, expected: Sequence[Arrays], plain: Facts
) -> Facts:
    """Build the refittable plan, refit it there and back, measure its tax; `safe` only when it is kept."""
    plan, model, options = Path(job.plan).parent, onnx.load(job.model), job.options
    made = tensorrt_build.run(job)
    kind = "whole" if job.weak_types is not None else "stripped"
    refit = {**NO_REFIT, "safe": True, "kind": kind, "fresh_error": plain["parity"]["error"], "reason": ""}
    refit["identical"] = weights_of.all_digest(model) if options.identical else None
    refit["two_four"] = weights_of.two_four(model) if options.sparse else []
    seal(manifest, job, refit)
    tried: Facts = {"build_seconds": made["seconds"], "plain": dict(plain)}
    try:
        tried |= trial(plan, job, samples, expected, made.get("constants", {}))
        refit |= {key: tried.pop(key) for key in ("fixed", "constants")}
        weights = Path(job.model) if kind == "stripped" else None
        tried["latency_ms"] = _measured(plan, weights, samples, expected)["latency_ms"]
        refit["tax"] = tried["latency_ms"] / plain["latency_ms"] - 1
        trusted, doubt = True, ""
    except RefitError as error:
        trusted, doubt = False, str(error)
    keep, why = tensorrt_parity.decide(options.refit, safe=trusted, tax=refit["tax"], max_tax=options.max_tax)
    if not keep:
        return {**NO_REFIT, **tried, "tax": refit["tax"], "reason": f"{why}: {doubt}" if doubt else why}
    return {**refit, **tried, "reason": why}


def trial(
    plan: Path, job: tensorrt_build.Job, samples: Samples, expected: Sequence[Arrays], made: Facts
) -> Facts:
    """Refit with quite other weights, then back; RefitError unless both times the outputs are right.

    Back alone proves nothing: an engine that ignores what it is given is right again too. `made` are the
    constants that the parser added. Returns the seconds of the second refit, how many weights it gave, the
    trained tensors that no refit reaches, and the constants that every refit must give.
    """
    held, manifest = load(plan)
    refit, source = manifest["refit"], Path(job.model)
    model, sample = onnx.load(source), [smallest(samples[0], job)]
    lacking = tensorrt_refit.lacking(held, manifest, model)
    given = {**made, **constants_of.of_graph(model, lacking, sample[0])}
    refit["constants"] = {name: given[name] for name in lacking if name in given}
    tried: Facts = {}
    if not refit["identical"]:
        other = weights_of.rolled(model, job.options.individual)
        right = tensorrt_parity.evaluate(other, sample)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            onnx.save(other, path)
            tensorrt_refit.refit_engine(held, manifest, path, other)
        with TensorRTSession(held) as session:
            # Half precision's own error is another with other weights; a refit that lies is off by about 1.
            tried["other"] = tensorrt_parity.verify(session, sample, right, 2 * refit["fresh_error"])
    start = time.perf_counter()
    names = tensorrt_refit.refit_engine(held, manifest, source, model)
    seconds = time.perf_counter() - start
    with TensorRTSession(held) as session:
        tried["back"] = tensorrt_parity.verify(session, samples, expected, refit["fresh_error"])
    fixed = {name: value for name, value in weights_of.digests(model).items() if name not in names}
    found = {"weights": len(names), "refit_seconds": seconds, "trial": tried}
    return {**found, "fixed": fixed, "constants": refit["constants"]}


def smallest(sample: Arrays, job: tensorrt_build.Job) -> Arrays:
    """As much of a sample's batch as the first profile allows at least: the evaluator is slow."""
    return {name: array[: job.profiles[0][name]["min"][0]] for name, array in sample.items()}
