"""Export to ONNX with Q/DQ: weights in the storage they are quantized to, checked.

python -m flows optimize RECIPE     (stage `export`)
"""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.build import Export, Precision
from tasks import batches, cache, checkpoints, export_scales, microscaled, outside, store, types, upstream
from tasks.artifacts import Checkpoint, Dataset, Facts, OnnxModel
from tasks.blockwise import Block, lift, place
from tasks.engines import microscale
from tasks.engines.lowering import tensors
from tasks.engines.lowering.split import load
from tasks.errors import InputError
from tasks.fold import TURNED, fold, layer_of, name_weights
from tasks.stage import stage

if TYPE_CHECKING:
    import onnx
    from torch import nn

DEQUANTIZE = ("DequantizeLinear", microscale.MXFP8_DEQUANTIZE)
EXTERNAL_DATA_PAST = 1 << 30  # bytes; protobuf ends at 2 GiB


@stage(uses=("torch", "nvidia-modelopt", "onnx", "transformers"), name="export", timeout_seconds=3600)
def export(checkpoint: Checkpoint, dataset: Dataset, section: Export, precision: Precision) -> OnnxModel:
    """A graph with inputs and output of the task type, with a free batch; of several, each in a subfolder.

    `precision` is of everything that is not quantized; inputs and outputs stay FP32. A language model has
    its cache among them where the recipe asks for it.
    Raises InputError when the graph loses a 2:4 weight or a quantizer of the checkpoint.
    """
    import onnx

    model, _ = checkpoints.restore(checkpoint)
    export_scales.fill_empty(model)
    sample = batches.samples(dataset, batches.preprocessor(checkpoint), count=1, size=2)[0]
    kind = types.load(dataset.type)
    if section.kv_cache:
        kind, sample = cache.with_cache(model, kind, sample)
    blocks, small = lift(model), microscaled.lift(model)
    if small and section.opset < microscaled.OPSET:  # a recipe cannot know what is in a modelopt: checkpoint
        raise InputError(
            f"export.opset: NVFP4 and MXFP8 need {microscaled.OPSET} or newer, not {section.opset}"
        )
    values = outside.large(model, EXTERNAL_DATA_PAST)
    counts: list[Facts] = []
    with store.staging() as folder:
        for name, part in types.parts(kind).items():
            (folder / name).mkdir(exist_ok=True)
            traced = _Traced(model, sample, part, blocks, small, dict(values), alone=not name)
            _write(traced, section.opset, precision, folder / name)
            counts.append(_counts(load(folder / name / "model.onnx")))
            onnx.checker.check_model(str(folder / name / "model.onnx"), full_check=True)
        facts = {"opset": section.opset, "precision": precision, **_summed(counts)}
        _hold(facts, checkpoint.facts)
        return OnnxModel(store.commit(folder), checkpoint.facts.get("format", precision), facts)


@dataclass(frozen=True)
class _Traced:
    """What one graph is made of; large weights are among `values` (`tasks.outside`)."""

    model: nn.Module
    sample: types.Example
    part: types.Graph
    blocks: dict[str, Block]
    small: dict[str, microscaled.Layer]
    values: outside.Values
    alone: bool


def _write(of: _Traced, opset: int, precision: Precision, folder: Path) -> None:
    """One graph, its weights in their storage and under their names."""
    import onnx

    inputs = {name: of.sample[name] for name in of.part.INPUTS}
    graph = _trace(of.model, inputs, of.part, opset, of.values)
    fold(graph)
    outside.fold(graph, of.values)
    name_weights(graph, of.model, tensors.LARGE if of.values else None)
    place(graph, {layer: block for layer, block in of.blocks.items() if of.alone or _uses(graph, layer)})
    values = outside.left(graph, of.values)
    if precision != "fp32":
        graph = _half(graph, precision)
        outside.cast(graph, values)
    named = {name for name in of.small if of.alone or microscaled.in_graph(graph, name)}
    microscaled.place(graph, {name: layer for name, layer in of.small.items() if name in named})
    values = outside.left(graph, values)
    if values:
        outside.write(graph, values, folder)
    else:
        onnx.save_model(graph, str(folder / "model.onnx"))


def _uses(graph: onnx.ModelProto, layer: str) -> bool:
    names = {f"model.{layer}.weight", f"model.{layer}.weight{TURNED}"}
    return any(names & set(node.input) for node in graph.graph.node)


def _trace(
    model: nn.Module,
    sample: types.Example,
    kind: types.Graph,
    opset: int,
    values: outside.Values | None = None,
) -> onnx.ModelProto:
    """ModelOpt's exporter; the one route that works on every quantized network tried.

    The weights among `values` are inputs of the graph.
    """
    import onnx
    from modelopt.torch._deploy.utils import OnnxBytes, get_onnx_bytes_and_metadata

    axes = {name.replace(".", "_"): free for name, free in kind.INPUTS.items()}
    values = values or {}
    wrapped = _positional(model, kind, values)
    inputs = tuple(batches.tensors(sample)[name] for name in kind.INPUTS)
    with checkpoints.quiet():  # the tracer's warnings, too: parity is checked on the engine
        content, _ = get_onnx_bytes_and_metadata(
            wrapped, inputs, dynamic_axes=axes, weights_dtype="fp32", onnx_opset=opset, dynamo_export=False
        )
    graph = onnx.load_from_string(OnnxBytes.from_bytes(content).get_onnx_model_file_bytes())
    upstream.q_dq_in_tensorrts_domain(graph)
    upstream.q_dq_after_softmax(graph)
    upstream.padding_left_to_compute(graph)
    upstream.float_types_of_fp8_values(graph)
    outside.as_inputs(graph, values)
    _rename(graph, dict(zip(axes, kind.INPUTS, strict=True)))
    _name_outputs(graph, kind.OUTPUTS)
    return graph


def _positional(model: nn.Module, kind: types.Graph, values: outside.Values) -> nn.Module:
    import torch

    class Positional(torch.nn.Module):
        """Positional inputs in, the graph's output out, and the cache where it has one."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *arrays: torch.Tensor) -> Any:
            with outside.marked(self.model, values, arrays[0]):
                return kind.forward(self.model, dict(zip(kind.INPUTS, arrays, strict=True)))

    # The exporter takes the graph's input names from here; a dot cannot be in one.
    names = ("self", *(name.replace(".", "_") for name in kind.INPUTS))
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    Positional.forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return Positional().eval()


def _name_outputs(graph: onnx.ModelProto, outputs: dict[str, dict[int, str]]) -> None:
    """Call the outputs what the task type calls them, with their free axes."""
    found = list(graph.graph.output)
    _rename(graph, dict(zip((output.name for output in found), outputs, strict=True)))
    for output, axes in zip(found, outputs.values(), strict=True):
        for axis, symbol in axes.items():
            output.type.tensor_type.shape.dim[axis].dim_param = symbol


def _rename(graph: onnx.ModelProto, names: dict[str, str]) -> None:
    """Other names for values, wherever they stand."""
    for value in (*graph.graph.input, *graph.graph.output):
        value.name = names.get(value.name, value.name)
    for node in graph.graph.node:
        node.output[:] = [names.get(name, name) for name in node.output]
        node.input[:] = [names.get(name, name) for name in node.input]


def _half(model: onnx.ModelProto, precision: Precision) -> onnx.ModelProto:
    """AutoCast: FP16 or BF16 for everything that is not quantized, but for inputs and outputs."""
    from modelopt.onnx.autocast.convert import convert_to_f16

    with checkpoints.quiet():
        half: onnx.ModelProto = convert_to_f16(model, low_precision_type=precision, keep_io_types=True)
        return half


def _counts(model: onnx.ModelProto) -> Facts:
    """Nodes by kind, stored types, and how many weights are exactly 2:4 along K."""
    from onnx import TensorProto

    operators = Counter(node.op_type for node in model.graph.node)
    types_ = Counter(TensorProto.DataType.Name(tensor.data_type) for tensor in model.graph.initializer)
    weights = _gemm_weights(model)
    sparse = [name for name, (tensor, turned) in weights.items() if _is_2_4(tensor, turned)]
    return {
        "nodes": sum(operators.values()),
        "quantize_nodes": sum(operators[kind] for kind in ("QuantizeLinear", *microscale.QUANTIZE)),
        "dequantize_nodes": sum(operators[kind] for kind in DEQUANTIZE),
        "tensors": dict(sorted(types_.items())),
        "gemm_weights": len(weights),
        "sparse_weights": len(sparse),
        "sparse_names": sorted(sparse),
    }


def _summed(counts: list[Facts]) -> Facts:
    """The counts of all graphs together."""
    total: Facts = dict(counts[0])
    for more in counts[1:]:
        stored: Counter[str] = Counter(total["tensors"]) + Counter(more["tensors"])
        names = sorted([*total["sparse_names"], *more["sparse_names"]])
        total = {key: value + more[key] for key, value in total.items() if isinstance(value, int)}
        total |= {"tensors": dict(sorted(stored.items())), "sparse_names": names}
    return total


def _gemm_weights(model: onnx.ModelProto) -> dict[str, tuple[onnx.TensorProto, bool]]:
    """Stored weights of MatMul, Gemm and Conv by layer, behind DQ, Cast and Transpose; is K on axis 0."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    producer = {name: node for node in model.graph.node for name in node.output}
    found: dict[str, tuple[onnx.TensorProto, bool]] = {}
    for node in model.graph.node:
        if node.op_type not in ("MatMul", "Gemm", "Conv"):
            continue
        name, turned = node.input[1], _turns(node)
        while name in producer and producer[name].op_type in (*DEQUANTIZE, "Transpose", "Cast"):
            turned ^= producer[name].op_type == "Transpose"
            name = producer[name].input[0]
        if name in stored:
            found[layer_of(node.name) or name] = stored[name], node.op_type != "Conv" and not turned
    return found


def _turns(node: onnx.NodeProto) -> bool:
    return any(item.name == "transB" and item.i for item in node.attribute)


def _is_2_4(tensor: onnx.TensorProto, turned: bool) -> bool:
    import torch

    weight = tensors.array(tensor).T if turned else tensors.array(tensor)
    dense = torch.from_numpy(np.ascontiguousarray(weight.astype(np.float32)))
    valid, groups = checkpoints.groups_2_4(dense)
    return groups > 0 and valid == groups


def _hold(facts: Facts, checkpoint: Facts) -> None:
    """What the checkpoint had, the graph must have: every 2:4 weight by name, every quantizer."""
    pruned = checkpoint.get("sparsity", {}).get("names", [])
    if lost := sorted(set(pruned) - set(facts["sparse_names"])):
        raise InputError(
            f"export: {len(pruned)} weights are 2:4 in the checkpoint; not in the graph: {', '.join(lost)}"
        )
    wanted = checkpoint.get("quantizers", {}).get("enabled", 0)
    if facts["dequantize_nodes"] < wanted:
        raise InputError(
            f"export: {wanted} quantizers are on in the checkpoint, {facts['dequantize_nodes']} in the graph"
        )
