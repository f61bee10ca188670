"""New weights for an opened engine, with the coverage checked; doubt is a RefitError."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from tasks.engines import tensorrt_api as api
from tasks.engines import tensorrt_constants as constants_of
from tasks.engines import tensorrt_weights as weights
from tasks.engines.common import RefitError, graph_digest, model_file
from tasks.engines.tensorrt_run import Recorded, TensorRTSession, load
from tasks.engines.tensorrt_unfold import unfolded
from tasks.errors import InputError


def check_weights(manifest: Mapping[str, Any], model: onnx.ModelProto, path: Path) -> None:
    """Everything that forbids this refit and can be known from the files alone.

    InputError for weights of another graph, RefitError for weights that this plan must not take.
    """
    if graph_digest(model) != manifest["graph"]:
        raise InputError(
            f"{path} is of another graph than the plan: give the weights its build wrote, or rebuild"
        )
    refit = manifest["refit"]
    if not refit["safe"]:
        raise RefitError(f"the plan is not safe to refit: {refit['reason']}")
    if refit["identical"] and weights.all_digest(model) != refit["identical"]:
        raise RefitError("the plan was built with REFIT_IDENTICAL, which is undefined for changed weights")
    if lost := set(refit["two_four"]) - set(weights.two_four(model) if refit["two_four"] else ()):
        raise RefitError(f"the plan has sparse kernels; these weights are no longer 2:4: {sorted(lost)[:5]}")
    changed = {k for k, v in weights.digests(model, set(refit["fixed"])).items() if v != refit["fixed"][k]}
    if changed:
        raise RefitError(f"the plan holds these tensors for good, and they changed: {sorted(changed)[:5]}")


def opened(plan: Path, weights_at: Path | None, *, lean: bool = False) -> TensorRTSession:
    """A session on the plan, refitted with the weights where they are apart."""
    held, manifest = load(plan, lean=lean)
    if weights_at is None and manifest["refit"]["kind"] == "stripped":
        raise InputError(f"{plan} is stripped of its weights: give the folder with them too")
    start = time.perf_counter()
    if weights_at is not None:
        source = model_file(weights_at)
        model = onnx.load(source)
        check_weights(manifest, model, source)
        refit_engine(held, manifest, source, model)
    seconds = time.perf_counter() - start
    session = TensorRTSession(held)
    session.refit_seconds = seconds if weights_at is not None else None
    return session


def lacking(held: Recorded, manifest: Mapping[str, Any], model: onnx.ModelProto) -> list[str]:
    """What a refit by name (TensorRT 8.6) must give and the model has no tensor for."""
    if not api.weakly_typed(manifest["runtime"], manifest["version"]):
        return []
    trt = held.trt
    refitter = trt.Refitter(held.engine, held.logger)
    return sorted(set(refitter.get_all_weights()) - set(weights.tensors(model)))


def refit_engine(
    held: Recorded, manifest: Mapping[str, Any], path: Path, model: onnx.ModelProto
) -> list[str]:
    """Give the engine the weights of the model at `path`; returns the names. RefitError on any doubt."""
    trt = held.trt
    refitter = trt.Refitter(held.engine, held.logger)
    names = list(refitter.get_all_weights())
    if not names:
        raise RefitError("the engine has no refittable weights")
    if api.weakly_typed(manifest["runtime"], manifest["version"]):
        tensors = weights.tensors(unfolded(model))
        found = {name: numpy_helper.to_array(tensor) for name, tensor in tensors.items()}
        made = constants_of.arrays(manifest["refit"].get("constants", {}))
        kept = _give_named(refitter, names, {**made, **found}, held)
        names = list(kept)
    else:
        kept = _give_onnx(trt, refitter, path, held)
    if missing := list(refitter.get_missing_weights()):
        raise RefitError(f"weights are missing: {missing[:5]} of {len(missing)}")
    if not refitter.refit_cuda_engine():
        raise RefitError(f"the refit failed: {held.said()}")
    del kept  # the arrays must outlive refit_cuda_engine
    return names


def _give_named(
    refitter: Any, names: list[str], found: Mapping[str, np.ndarray], held: Recorded
) -> dict[str, np.ndarray]:
    """TensorRT 8.6: every refittable weight by name, but for booleans, which it lists and then refuses."""
    if lacking := sorted(set(names) - set(found)):
        raise RefitError(f"the model has no tensor for {lacking[:5]} ({len(lacking)} in all)")
    given = {name: as_8_6(found[name]) for name in names if found[name].dtype != bool}
    for name, array in given.items():
        if not refitter.set_named_weights(name, array):
            raise RefitError(f"weights {name} were refused: {held.said()}")
    return given


def as_8_6(array: np.ndarray) -> np.ndarray:
    """The type that 8.6's parser keeps a constant in: int64 as int32, double and int8 as float32.

    int8 holds for zero points and for folded weights: given as int8 they are taken, refit_cuda_engine
    then fails, and the engine is left half refitted.
    """
    kinds = {
        np.dtype(np.int64): np.int32,
        np.dtype(np.float64): np.float32,
        np.dtype(np.int8): np.float32,
    }
    return np.ascontiguousarray(array, kinds.get(array.dtype, array.dtype))


def _give_onnx(trt: Any, refitter: Any, path: Path, held: Recorded) -> Any:
    """TensorRT 10 and newer: the ONNX file through the parser's own refitter."""
    parser = trt.OnnxParserRefitter(refitter, held.logger)
    if not parser.refit_from_file(str(path)):
        said = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise RefitError(f"the parser's refitter refused {path.name}: {' | '.join(said) or held.said()}")
    return parser


def serialized(held: Recorded, flavor: api.Flavor, version: str) -> bytes:
    """The whole refitted engine, one file with its weights, refittable again where this version can."""
    if api.weakly_typed(flavor, version):
        return bytes(held.engine.serialize())
    return _serialized_10(held, includes_refit=api.includes_refit(flavor, version))


def _serialized_10(held: Recorded, *, includes_refit: bool) -> bytes:
    trt, config = held.trt, held.engine.create_serialization_config()
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    if includes_refit:
        config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
    return bytes(held.engine.serialize_with_config(config))
