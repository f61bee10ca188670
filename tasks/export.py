"""Export to ONNX with Q/DQ: weights folded to INT8, FP8 or INT4 storage, checked.

python -m flows optimize RECIPE     (stage `export`)
"""

from __future__ import annotations

import inspect
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.build import Export, Precision
from tasks import batches, checkpoints, export_scales, store, types, upstream
from tasks.artifacts import Checkpoint, Dataset, Facts, OnnxModel
from tasks.blockwise import Block, lift, place
from tasks.errors import InputError
from tasks.fold import TURNED, fold, layer_of, name_weights
from tasks.stage import stage

if TYPE_CHECKING:
    import onnx
    from torch import nn

EXTERNAL_DATA_PAST = 1 << 30  # bytes; protobuf ends at 2 GiB


@stage(uses=("torch", "nvidia-modelopt", "onnx", "transformers"), name="export", timeout_seconds=3600)
def export(checkpoint: Checkpoint, dataset: Dataset, section: Export, precision: Precision) -> OnnxModel:
    """A graph with inputs and output of the task type, with a free batch; of several, each in a subfolder.

    `precision` is of everything that is not quantized; inputs and outputs stay FP32.
    Raises InputError when the graph loses a 2:4 weight or a quantizer of the checkpoint.
    """
    import onnx

    model, _ = checkpoints.restore(checkpoint)
    export_scales.fill_empty(model)
    sample = batches.samples(dataset, batches.preprocessor(checkpoint), count=1, size=2)[0]
    blocks = lift(model)
    counts: list[Facts] = []
    with store.staging() as folder:
        for name, part in types.parts(types.load(dataset.type)).items():
            graph = _graph(model, sample, part, blocks, section.opset, precision, alone=not name)
            counts.append(_counts(graph))
            (folder / name).mkdir(exist_ok=True)
            _write(graph, folder / name / "model.onnx")
            onnx.checker.check_model(str(folder / name / "model.onnx"), full_check=True)
        facts = {"opset": section.opset, "precision": precision, **_summed(counts)}
        _hold(facts, checkpoint.facts)
        return OnnxModel(store.commit(folder), checkpoint.facts.get("format", precision), facts)


def _graph(
    model: nn.Module,
    sample: types.Example,
    part: types.Graph,
    blocks: dict[str, Block],
    opset: int,
    precision: Precision,
    *,
    alone: bool,
) -> onnx.ModelProto:
    """One graph, its weights in their storage and under their names."""
    graph = _trace(model, {name: sample[name] for name in part.INPUTS}, part, opset)
    fold(graph)
    name_weights(graph, model)
    place(graph, {layer: block for layer, block in blocks.items() if alone or _uses(graph, layer)})
    return graph if precision == "fp32" else _half(graph, precision)


def _uses(graph: onnx.ModelProto, layer: str) -> bool:
    names = {f"model.{layer}.weight", f"model.{layer}.weight{TURNED}"}
    return any(names & set(node.input) for node in graph.graph.node)


def _trace(model: nn.Module, sample: types.Example, kind: types.Graph, opset: int) -> onnx.ModelProto:
    """ModelOpt's exporter; the one route that works on every quantized network tried."""
    import onnx
    from modelopt.torch._deploy.utils import OnnxBytes, get_onnx_bytes_and_metadata

    axes = kind.INPUTS
    wrapped = _positional(model, kind)
    inputs = tuple(batches.tensors(sample)[name] for name in axes)
    with checkpoints.quiet():  # the tracer's warnings, too: parity is checked on the engine
        content, _ = get_onnx_bytes_and_metadata(
            wrapped, inputs, dynamic_axes=axes, weights_dtype="fp32", onnx_opset=opset, dynamo_export=False
        )
    graph = onnx.load_from_string(OnnxBytes.from_bytes(content).get_onnx_model_file_bytes())
    upstream.q_dq_in_tensorrts_domain(graph)
    upstream.q_dq_after_softmax(graph)
    upstream.padding_left_to_compute(graph)
    upstream.float_types_of_fp8_values(graph)
    _name_output(graph, kind.OUTPUTS)
    return graph


def _positional(model: nn.Module, kind: types.Graph) -> nn.Module:
    import torch

    class Positional(torch.nn.Module):
        """Positional inputs in, the graph's output out."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *arrays: torch.Tensor) -> torch.Tensor:
            return kind.forward(self.model, dict(zip(kind.INPUTS, arrays, strict=True)))

    # The exporter takes the graph's input names from here.
    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", *kind.INPUTS)
    ]
    Positional.forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return Positional().eval()


def _name_output(graph: onnx.ModelProto, outputs: dict[str, dict[int, str]]) -> None:
    """Call the only output what the task type calls it, with its free axes."""
    (output,) = graph.graph.output
    ((wanted, axes),) = outputs.items()
    for node in graph.graph.node:
        node.output[:] = [wanted if name == output.name else name for name in node.output]
        node.input[:] = [wanted if name == output.name else name for name in node.input]
    output.name = wanted
    for axis, symbol in axes.items():
        output.type.tensor_type.shape.dim[axis].dim_param = symbol


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
    sparse = [name for name, weight in weights.items() if _is_2_4(weight)]
    return {
        "nodes": sum(operators.values()),
        "quantize_nodes": operators["QuantizeLinear"],
        "dequantize_nodes": operators["DequantizeLinear"],
        "tensors": dict(sorted(types_.items())),
        "gemm_weights": len(weights),
        "sparse_weights": len(sparse),
        "sparse_names": sorted(sparse),
    }


def _summed(counts: list[Facts]) -> Facts:
    """The counts of all graphs together."""
    total: Facts = dict(counts[0])
    for more in counts[1:]:
        tensors: Counter[str] = Counter(total["tensors"]) + Counter(more["tensors"])
        names = sorted([*total["sparse_names"], *more["sparse_names"]])
        total = {key: value + more[key] for key, value in total.items() if isinstance(value, int)}
        total |= {"tensors": dict(sorted(tensors.items())), "sparse_names": names}
    return total


def _gemm_weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Stored weights of MatMul, Gemm and Conv by layer, behind DQ, Cast and Transpose; K on axis 1."""
    from onnx import numpy_helper

    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    producer = {name: node for node in model.graph.node for name in node.output}
    found: dict[str, np.ndarray] = {}
    for node in model.graph.node:
        if node.op_type not in ("MatMul", "Gemm", "Conv"):
            continue
        name, turned = node.input[1], _turns(node)
        while name in producer and producer[name].op_type in ("DequantizeLinear", "Transpose", "Cast"):
            turned ^= producer[name].op_type == "Transpose"
            name = producer[name].input[0]
        if name in stored:
            weight = numpy_helper.to_array(stored[name])
            layer = layer_of(node.name) or name
            found[layer] = weight.T if node.op_type != "Conv" and not turned else weight
    return found


def _turns(node: onnx.NodeProto) -> bool:
    return any(item.name == "transB" and item.i for item in node.attribute)


def _is_2_4(weight: Any) -> bool:
    import torch

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


def _write(model: onnx.ModelProto, file: Path) -> None:
    """Save; past 1 GB the tensors go beside the graph, into `model.onnx.data`."""
    import onnx

    large = sum(tensor.ByteSize() for tensor in model.graph.initializer) > EXTERNAL_DATA_PAST
    onnx.save_model(
        model,
        str(file),
        save_as_external_data=large,
        all_tensors_to_one_file=True,
        location="model.onnx.data",
    )
