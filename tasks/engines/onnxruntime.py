"""The ONNX Runtime engine: a lowered plan without values, its weights apart, and a proof of what runs.

`build` lowers the graph to the runtime's fast INT8 kernels, splits it, and keeps the fastest
optimization level whose outputs agree with the unlowered, unoptimized graph on real inputs.
`refit` replays the same steps on a new training's ONNX and takes it only when the plan comes out
the same, byte for byte.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from tasks.artifacts import Facts
from tasks.engines.common import Arrays, Built, RefitError, Samples, graph_digest, model_file
from tasks.engines.lowering import Steps, lower, requantize, tensors
from tasks.engines.lowering.split import PLAN, PLAN_INDEX, WEIGHTS, WEIGHTS_INDEX, load, sha256, split, table
from tasks.engines.onnxruntime_parity import CEILINGS, agrees, limits, parity, reference
from tasks.engines.onnxruntime_proof import proof
from tasks.engines.onnxruntime_providers import NAMES, available
from tasks.engines.onnxruntime_session import (
    LEVELS,
    OrtSession,
    check_plan,
    device,
    open,
    open_file,
    table_problem,
    version,
)
from tasks.errors import InputError

__all__ = [
    "OrtSession",
    "agrees",
    "build",
    "device",
    "open",
    "open_file",
    "parity",
    "proof",
    "refit",
    "version",
]

RUNTIME = "onnxruntime"


@dataclass(frozen=True)
class Goal:
    """Outputs to meet on real inputs, and how nearly."""

    samples: Samples
    expected: Sequence[Arrays]
    limits: dict[str, float]
    threads: int | None


def build(
    model: Path, folder: Path, *, samples: Samples, threads: int | None = None, provider: str = "cpu"
) -> Built:
    """Write `folder/plan` and `folder/weights`; `samples` are real inputs, `threads` None means all cores.

    For any provider but the CPU the Q/DQ graph stays as it is, and where the provider is not in the
    ONNX Runtime at hand the result is only `checked`.
    """
    assert samples, "parity needs at least one sample"
    source = load(model_file(model))
    with tensors.scratch(folder, source):
        if provider != "cpu":
            return _for_provider(source, graph_digest(source), folder, provider, samples)
        return _for_cpu(source, model, folder, samples, threads)


def _for_cpu(
    source: onnx.ModelProto, model: Path, folder: Path, samples: Samples, threads: int | None
) -> Built:
    """Plan and weights as lowered as the outputs allow; `model` is for the error."""
    began = time.perf_counter()
    digest = graph_digest(source)
    wanted, changes, goal, facts = _requantized(source, samples, threads)
    tried: list[Facts] = []
    for lowered, steps, done in ((*lower(wanted), True), (wanted, [], False)):
        index = {"graph": digest, "requantize": changes, "lowered": done, "steps": steps}
        tried += _write(lowered, folder, index, goal)
        if tried[-1]["agrees"]:
            break
    else:
        raise InputError(f"{model}: ONNX Runtime {version()} cannot run this graph: {tried[-1]}")
    facts |= {**tried[-1], "limits": goal.limits, "tried": tried, "requantize": changes, "steps": steps}
    facts |= _sizes(folder / "plan", folder / "weights")
    facts["proof"] = proof(folder / "plan", folder / "weights", samples[0], threads=threads)
    facts["build_seconds"] = time.perf_counter() - began
    return Built(digest, RUNTIME, version() or "", device(), "executed", facts)


def refit(plan: Path, model: Path, folder: Path, *, samples: Samples, threads: int | None = None) -> Built:
    """Write `folder/weights` for an existing plan; RefitError when that is not certain to be right."""
    assert samples, "parity needs at least one sample"
    source = load(model_file(model))
    with tensors.scratch(folder, source):
        return _refit(plan, source, model, folder, samples, threads)


def _refit(
    plan: Path, source: onnx.ModelProto, model: Path, folder: Path, samples: Samples, threads: int | None
) -> Built:
    began = time.perf_counter()
    index = check_plan(plan)
    digest = graph_digest(source)
    if digest != index["graph"]:
        raise RefitError(f"{model} has another graph ({digest}) than {plan} ({index['graph']})")
    wanted, changes = requantize(source) if index["requantize"] else (source, [])
    lowered, steps = lower(wanted) if index["lowered"] else (wanted, [])
    if (changes, steps) != (index["requantize"], index["steps"]):
        raise RefitError(
            f"{model} lowers by other steps than {plan}: {_first_difference(index, changes, steps)}"
        )
    _same_plan(lowered, plan, folder / "weights")
    expected = reference(wanted, samples, threads)
    allowed, noise = limits(wanted, expected, samples, threads)
    goal = Goal(samples, expected, allowed, threads)
    trial = _trial(plan, folder / "weights", index["level"], goal)
    if not trial["agrees"]:
        raise RefitError(f"{model} on {plan} gives other outputs than its own graph: {trial}")
    facts = {**trial, **noise, "limits": allowed, **_sizes(plan, folder / "weights")}
    facts["proof"] = proof(plan, folder / "weights", samples[0], threads=threads)
    facts["refit_seconds"] = time.perf_counter() - began
    return Built(digest, RUNTIME, index["version"], index["device"], "executed", facts)


def _for_provider(
    source: onnx.ModelProto, digest: str, folder: Path, provider: str, samples: Samples
) -> Built:
    """Plan and weights of the graph as exported, compiled by the provider when it opens them."""
    here = available(provider)
    split(source, folder / "plan", folder / "weights")
    index = {"graph": digest, "requantize": [], "lowered": False, "steps": [], "provider": provider}
    _index(folder / "plan", folder / "weights", {**index, "level": "all"})
    facts: Facts = {"provider": provider, **_sizes(folder / "plan", folder / "weights")}
    if not here:
        why = f"{NAMES[provider]} is not in ONNX Runtime {version()} here; options and graph were checked"
        return Built(digest, RUNTIME, version() or "", provider, "checked", {**facts, "why": why})
    expected = reference(source, samples, None)
    allowed, noise = limits(source, expected, samples, None)
    trial = _trial(folder / "plan", folder / "weights", "all", Goal(samples, expected, allowed, None))
    if not trial["agrees"]:
        raise InputError(f"{NAMES[provider]} gives other outputs than the graph: {trial}")
    return Built(digest, RUNTIME, version() or "", provider, "executed", {**facts, **noise, **trial})


def _requantized(
    source: onnx.ModelProto, samples: Samples, threads: int | None
) -> tuple[onnx.ModelProto, Steps, Goal, Facts]:
    """The graph with large embedding tables in INT8, unless its outputs then move too far, and its goal."""
    expected = reference(source, samples, threads)
    allowed, facts = limits(source, expected, samples, threads)
    changed, changes = requantize(source)
    if changes:
        outputs = reference(changed, samples, threads)
        facts["requantize_error"] = parity(expected, outputs)
        if agrees(facts["requantize_error"], CEILINGS):  # new numbers: the accuracy gate judges them
            return changed, changes, Goal(samples, outputs, allowed, threads), facts
    return source, [], Goal(samples, expected, allowed, threads), facts


def _write(model: onnx.ModelProto, folder: Path, index: Facts, goal: Goal) -> list[Facts]:
    """Write plan and weights at the first level that agrees; all levels tried, the kept one last."""
    plan, weights = folder / "plan", folder / "weights"
    split(model, plan, weights)
    trials: list[Facts] = []
    for level in LEVELS:
        _index(plan, weights, {**index, "level": level})
        trials.append(_trial(plan, weights, level, goal))
        if trials[-1]["agrees"]:
            break
    return trials


def _index(plan: Path, weights: Path, about: Facts) -> None:
    host = {"runtime": RUNTIME, "version": version(), "device": device()}
    _dump(plan / PLAN_INDEX, {**host, **about, "sha256": sha256(plan / PLAN)})
    _index_weights(model_table(plan), plan, weights)


def model_table(plan: Path) -> dict[str, list[object]]:
    """The tensors that a plan expects, with dtype and shape."""
    return table(onnx.load(plan / PLAN, load_external_data=False))


def _index_weights(held: dict[str, list[object]], plan: Path, weights: Path) -> None:
    sums = {"plan": sha256(plan / PLAN), "sha256": sha256(weights / WEIGHTS)}
    _dump(weights / WEIGHTS_INDEX, {**sums, "tensors": held})


def _trial(plan: Path, weights: Path, level: str, goal: Goal) -> Facts:
    began = time.perf_counter()
    try:
        with open(plan, weights, level=level, threads=goal.threads) as session:
            seconds = time.perf_counter() - began
            errors = parity(goal.expected, [session.run(sample) for sample in goal.samples])
    except InputError as error:
        return {"level": level, "agrees": False, "error": str(error)}
    return {"level": level, "agrees": agrees(errors, goal.limits), "open_seconds": seconds, **errors}


def _same_plan(model: onnx.ModelProto, plan: Path, weights: Path) -> None:
    """Write the weights, and raise unless the graph without them is the plan, byte for byte."""
    with tempfile.TemporaryDirectory() as name:
        split(model, Path(name), weights)
        found = model_table(Path(name))
        problem = table_problem(model_table(plan), found)
        if not problem and sha256(Path(name) / PLAN) != sha256(plan / PLAN):
            problem = "a value that the plan holds itself (an attribute or a shape) is another one"
    if problem:
        raise RefitError(f"{plan} cannot take these weights: {problem}")
    _index_weights(found, plan, weights)


def _first_difference(index: Facts, changes: Steps, steps: Steps) -> str:
    before, after = [*index["requantize"], *index["steps"]], [*changes, *steps]
    for old, new in zip(before, after, strict=False):
        if old != new:
            return f"{old} became {new}"
    return f"{len(before)} steps became {len(after)}"


def _sizes(plan: Path, weights: Path) -> Facts:
    return {
        name: sum(f.stat().st_size for f in path.iterdir())
        for name, path in (("plan_bytes", plan), ("weights_bytes", weights))
    }


def _dump(path: Path, value: Facts) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
