"""A served version in a Triton model repository: `config.pbtxt` and `N/model.onnx` or `N/model.plan`.

    tritonserver --model-repository ENGINEHOUSE_HOME/serving/triton

A version of several graphs becomes a model each, NAME~PART.

Triton's ONNX Runtime backend sets an optimization level and no other session option, so the level is chosen
here by opening the very files with the options that Triton will use, and comparing outputs.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recipes.schema import Triton
from tasks import store
from tasks.artifacts import Facts
from tasks.engines import module, together
from tasks.engines.common import Session
from tasks.errors import InputError
from tasks.predictor import Predictor

BACKENDS = {"onnxruntime": "onnxruntime", "tensorrt": "tensorrt"}
FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}
LEVELS = {"all": 0, "extended": 1, "basic": -1, "disabled": 2}  # Triton's numbers for ONNX Runtime's levels
TYPES = {
    "float32": "FP32", "float16": "FP16", "float64": "FP64", "bool": "BOOL", "str": "STRING",
    "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64", "uint8": "UINT8",
}  # fmt: skip


def repositories(served: Path, place: Path) -> dict[str, Path]:
    """Where a served version's models go, by part; `place` is that of a version of one graph."""
    parts = together.parts_of(served / "plan")
    return {part: place.with_name(f"{place.name}~{part}") for part in parts} if parts else {"": place}


def known(place: Path) -> list[Path]:
    """Every repository of a model that there is, of whatever version."""
    return [found for found in (place, *place.parent.glob(f"{place.name}~*")) if found.is_dir()]


def write(
    served: Path, version: str, repository: Path, section: Triton, threads: int | None, part: str = ""
) -> str:
    """Put the version's files into `repository` (a model's folder) and return the text of its config.pbtxt.

    The config is not written: replacing it is the switch. "" where Triton has no backend for the runtime;
    InputError when no way of opening the files gives the served engine's outputs.
    """
    predictor = Predictor(served)
    runtime = str(predictor.about["plan"]["runtime"])
    if runtime not in BACKENDS:
        return ""
    session = predictor.session.sessions[part] if part else predictor.session  # type: ignore[attr-defined]
    feeds = [{name: feed[name] for name in session.inputs} for feed in batches(predictor)]
    outputs = [session.run(feed) for feed in feeds]
    place = repository / version
    _files(served, runtime, place, part)
    _warmup(feeds[0], version, repository)
    facts = predictor.about["facts"]
    limits = facts.get("parts", {}).get(part, facts).get("limits")
    level = _level(place, feeds, outputs, limits) if runtime == "onnxruntime" else None
    fields = _fields(session, int(predictor.about["max_batch"]), version, runtime, feeds, outputs, section)
    if level is not None:
        fields["optimization"] = {"graph": {"level": LEVELS[level]}}
        if threads is not None:
            count = {"string_value": str(threads)}
            fields["parameters"] = [{"key": "intra_op_thread_count", "value": count}]
    return text({"name": repository.name, **fields})


def batches(predictor: Predictor) -> list[dict[str, np.ndarray]]:
    """The smoke values as the engine takes them: the first alone, then all together."""
    values = predictor.kind.smoke(predictor.preprocessor)
    encoded = predictor.kind.encode(predictor.preprocessor, values)
    return [predictor.kind.collate(encoded[:1]), predictor.kind.collate(encoded)]


def _files(served: Path, runtime: str, place: Path, part: str) -> None:
    """The version's folder, whole at once: other names for the served files, or one refitted plan."""
    shutil.rmtree(place, ignore_errors=True)
    fresh = place.with_name(f".{place.name}-{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    plan, weights = served / "plan" / part, served / "weights" / part
    if runtime == "tensorrt":
        module(runtime).whole_plan(plan, weights if weights.is_dir() else None, fresh / FILES[runtime])
    else:
        for source in (plan, weights):
            for file in sorted(source.glob("*")):
                if file.suffix != ".json":
                    _link(file, fresh / file.name)
    store.rename(fresh, place)


def _link(file: Path, place: Path) -> None:
    """A second name for the same bytes, a copy where the file system has none."""
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)


def _warmup(feed: dict[str, np.ndarray], version: str, repository: Path) -> None:
    folder = repository / "warmup"
    folder.mkdir(exist_ok=True)
    for name, array in feed.items():
        (folder / f"{version}-{name}").write_bytes(np.ascontiguousarray(array[0]).tobytes())


def _level(
    place: Path,
    feeds: Sequence[dict[str, np.ndarray]],
    expected: Sequence[dict[str, np.ndarray]],
    limits: dict[str, float] | None = None,
) -> str:
    """The fastest level that gives the engine's own outputs when opened as Triton opens it.

    Where none does, one within the `limits` by which the engine's build told rounding from another graph.
    """
    runtime = module("onnxruntime")
    seen: Facts = {}
    near: list[str] = []
    for level in LEVELS:
        try:
            with runtime.open_file(place / FILES["onnxruntime"], level) as session:
                found = [session.run(feed) for feed in feeds]
        except InputError as error:
            seen[level] = str(error)
            continue
        if all(same(ours, theirs) for ours, theirs in zip(expected, found, strict=True)):
            return level
        errors = runtime.parity(expected, found)
        near += [level] if limits and runtime.agrees(errors, limits) else []
        seen[level] = f"other outputs, off by {errors['max_error_share']:.3g} of the largest"
    if near:
        return near[0]
    raise InputError(f"{place}: opened as Triton does it, the engine gives other outputs: {seen}")


def same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> bool:
    """Whether two runs on the same inputs agree, up to the order of summation."""
    return ours.keys() == theirs.keys() and all(close(ours[name], theirs[name]) for name in ours)


def close(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Equal to a thousandth of the largest value; never where a value is not finite."""
    if ours.shape != theirs.shape or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return False
    return bool(np.abs(ours.astype(np.float64) - theirs).max() <= 1e-3 * max(1.0, float(np.abs(ours).max())))


def _fields(
    session: Session,
    largest: int,
    version: str,
    runtime: str,
    feeds: Sequence[dict[str, np.ndarray]],
    outputs: Sequence[dict[str, np.ndarray]],
    section: Triton,
) -> Facts:
    batched = all(shape[:1] == (None,) for _, shape in session.inputs.values())
    skip = 1 if batched else 0
    inputs = [
        {"name": name, "data_type": _type(kind), "dims": [-1 if d is None else d for d in shape[skip:]]}
        for name, (kind, shape) in session.inputs.items()
    ]
    found: Facts = {
        "backend": BACKENDS[runtime],
        "max_batch_size": largest if batched else 0,
        "input": inputs,
        "output": [
            {"name": name, "data_type": _type(str(array.dtype)), "dims": _dims(name, outputs, skip)}
            for name, array in outputs[0].items()
        ],
        "version_policy": {"specific": {"versions": [int(version)]}},
        "instance_group": [
            {"count": section.instances, "kind": Word("KIND_GPU" if runtime == "tensorrt" else "KIND_CPU")}
        ],
    }
    if batched:
        queue: Facts = {"max_queue_delay_microseconds": section.max_queue_delay_us}
        if section.preferred_batch_sizes:
            queue["preferred_batch_size"] = list(section.preferred_batch_sizes)
        found["dynamic_batching"] = queue
    warm = [
        {
            "key": name,
            "value": {
                "data_type": _type(str(array.dtype)),
                "dims": list(array.shape[skip:]),
                "input_data_file": f"{version}-{name}",
            },
        }
        for name, array in feeds[0].items()
    ]
    found["model_warmup"] = [{"name": "smoke", "batch_size": 1 if batched else 0, "inputs": warm}]
    return found


def _dims(name: str, outputs: Sequence[dict[str, np.ndarray]], skip: int) -> list[int]:
    """An output's shape; -1 where two runs differ."""
    shapes = [run[name].shape[skip:] for run in outputs]
    return [sizes[0] if len(set(sizes)) == 1 else -1 for sizes in zip(*shapes, strict=True)]


class Word(str):
    """A name of the format's own (an enum's member), written without quotes."""


def _type(kind: str) -> Word:
    return Word(f"TYPE_{TYPES[kind]}")


def text(fields: Facts, indent: str = "") -> str:
    """Protobuf's text format; a list is a repeated field, numbers in brackets, messages one by one."""
    return "".join(_field(name, value, indent) for name, value in fields.items())


def _field(name: str, value: Any, indent: str) -> str:
    if isinstance(value, dict):
        return f"{indent}{name} {{\n{text(value, indent + '  ')}{indent}}}\n"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "".join(_field(name, item, indent) for item in value)
    written = str(value) if isinstance(value, (Word, int, list)) else json.dumps(value)
    return f"{indent}{name}: {written}\n"
