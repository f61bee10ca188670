"""Why an INT8 refit on TensorRT 8.6 succeeds and is wrong: every way of giving weights, compared.

Run on a GPU with TensorRT 8.6: `python -m benchmarks.tensorrt.puzzle OUT.json`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from benchmarks.tensorrt import mlp, qdq
from tasks.engines import tensorrt_api as api
from tasks.engines import tensorrt_build, tensorrt_parity
from tasks.engines.tensorrt_options import Options
from tasks.engines.tensorrt_run import Recorded, TensorRTSession
from tasks.engines.tensorrt_weights import tensors

WIDTH, ROWS = 256, 64
Arrays = Mapping[str, np.ndarray]


def graphs(seed: int, same_scales: bool) -> dict[str, onnx.ModelProto]:
    """The forms of one INT8 network; `same_scales`: the weights of another seed under the first's scales."""
    found = {}
    for layers in (1, 2):
        plain = mlp.mlp(WIDTH, ROWS, kind="fp32", layers=layers, seed=seed)
        amax = {f"matmul{i}": 4.5 for i in range(layers)}
        for name, fold in (("unfolded", False), ("folded", True)):
            model = qdq.insert(plain, amax, "int8", fold=fold)
            if same_scales:
                _take_scales(
                    model,
                    qdq.insert(mlp.mlp(WIDTH, ROWS, kind="fp32", layers=layers), amax, "int8", fold=fold),
                )
            found[f"{name}, {layers} layers"] = model
    return found


def _take_scales(model: onnx.ModelProto, other: onnx.ModelProto) -> None:
    scales = {t.name: t for t in other.graph.initializer if t.name.startswith("s")}
    for tensor in model.graph.initializer:
        if tensor.name in scales:
            tensor.CopyFrom(scales[tensor.name])


def ways() -> dict[str, Callable[[Any, Any, Arrays], dict[str, Any]]]:
    """How the weights are given."""
    return {
        "everything, zero points as float32": lambda t, r, a: _named(r, {n: _float(v) for n, v in a.items()}),
        "everything, zero points as int8": lambda t, r, a: _named(r, dict(a)),
        "everything but zero points": lambda t, r, a: _named(r, _without(a, "z")),
        "weights and biases only": lambda t, r, a: _named(r, _without(_without(a, "z"), "s")),
        "scales last": lambda t, r, a: _named(
            r, dict(sorted(_without(a, "z").items(), key=lambda i: i[0][0] == "s"))
        ),
        "by layer and role": _by_role,
    }


def _float(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32)


def _without(arrays: Arrays, letter: str) -> dict[str, np.ndarray]:
    return {name: array for name, array in arrays.items() if not name.startswith(letter)}


def _named(refitter: Any, arrays: Arrays) -> dict[str, Any]:
    known = set(refitter.get_all_weights())
    answers = {
        n: bool(refitter.set_named_weights(n, np.ascontiguousarray(v)))
        for n, v in arrays.items()
        if n in known
    }
    return {"refused": [n for n, ok in answers.items() if not ok], "keep": arrays}


def _by_role(trt: Any, refitter: Any, arrays: Arrays) -> dict[str, Any]:
    """Constants by their layer's name, which is the initializer's."""
    layers, roles = refitter.get_all()
    kept, refused, unknown = [], [], []
    for layer, role in zip(layers, roles, strict=True):
        name = next((n for n in arrays if n in (layer, layer.split(" ")[0])), None)
        if name is None:
            unknown.append(f"{layer} {role}")
            continue
        array = np.ascontiguousarray(_float(arrays[name]))
        kept.append(array)
        if not refitter.set_weights(layer, role, array):
            refused.append(layer)
    return {"refused": refused, "unknown": unknown, "keep": kept}


def attempt(
    trt: Any, plan: bytes, model: onnx.ModelProto, way: Any, feed: Arrays, right: Arrays
) -> dict[str, Any]:
    """One refit of a fresh engine and what came of it."""
    held = Recorded(trt, plan, host_code=False)
    refitter = trt.Refitter(held.engine, held.logger)
    arrays = {name: numpy_helper.to_array(tensor) for name, tensor in tensors(model).items()}
    answer: dict[str, Any] = way(trt, refitter, arrays)
    kept = answer.pop("keep")
    answer["missing"] = list(refitter.get_missing_weights())
    answer["refit"] = bool(refitter.refit_cuda_engine())
    del kept
    with TensorRTSession(held) as session:
        outputs = session.run(feed)
    y, z = outputs["y"].ravel().astype(np.float64), right["y"].ravel().astype(np.float64)
    answer |= {
        "error": tensorrt_parity.error(outputs, right),
        "cosine": tensorrt_parity.cosine(outputs, right),
    }
    answer |= {
        "fit": float(y @ z) / max(float(z @ z), 1e-30),
        "mean": float(y.mean()),
        "nan": bool(np.isnan(y).any()),
    }
    answer["said"] = held.said()
    return answer


def about(trt: Any, plan: bytes) -> dict[str, Any]:
    """What the refitter lists."""
    held = Recorded(trt, plan, host_code=False)
    refitter = trt.Refitter(held.engine, held.logger)
    layers, roles = refitter.get_all()
    return {
        "weights": list(refitter.get_all_weights()),
        "layers": [f"{layer} {role.name}" for layer, role in zip(layers, roles, strict=True)],
        "ranges": list(refitter.get_tensors_with_dynamic_range()),
    }


def main(out: Path) -> None:
    """Every graph, every way, with its own weights, new ones, and new ones under the same scales."""
    trt, feed, report = api.use("tensorrt"), mlp.feed(WIDTH, ROWS), {}
    trainings = {"own": graphs(0, False), "new, same scales": graphs(1, True), "new": graphs(1, False)}
    for name in trainings["own"]:
        for half in (False, True):
            key = f"{name}{', fp16 too' if half else ''}"
            try:
                report[key] = _one(trt, name, half, trainings, feed)
            except Exception as error:  # whatever the builder says belongs in the report
                report[key] = {"build failed": f"{error}"[:600]}
            print(key, json.dumps(report[key])[:3000], flush=True)
            out.write_text(json.dumps(report, indent=1))


def _one(trt: Any, name: str, half: bool, trainings: Any, feed: Arrays) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path, plan = Path(folder) / "model.onnx", Path(folder) / "engine.plan"
        onnx.save(trainings["own"][name], path)
        kinds = ("int8", "fp16") if half else ("int8",)
        job = tensorrt_build.Job(str(path), str(plan), "tensorrt", Options(level=2), [{}], kinds, True, None)
        tensorrt_build.build_here(job)
        data = plan.read_bytes()
        found: dict[str, Any] = {"about": about(trt, data)}
        for training, models in trainings.items():
            onnx.save(models[name], path)
            right = tensorrt_parity.reference(path, [feed])[0]
            for way, give in ways().items():
                found[f"{training}: {way}"] = attempt(trt, data, models[name], give, feed, right)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
