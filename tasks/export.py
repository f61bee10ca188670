"""Export to ONNX with Q/DQ: opset 20, weights folded to INT8 or FP8 storage, checked.

python -m flows optimize RECIPE     (stage `export`)
"""

from __future__ import annotations

import inspect
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from recipes.schema import Export
from tasks import batches, checkpoints, export_scales, store, types
from tasks.artifacts import Checkpoint, Dataset, Facts, OnnxModel
from tasks.errors import InputError
from tasks.stage import stage

if TYPE_CHECKING:
    import onnx
    from torch import nn

Precision = Literal["fp32", "fp16"]
EXTERNAL_DATA_PAST = 1 << 30  # bytes; protobuf ends at 2 GiB


@stage(uses=("torch", "nvidia-modelopt", "onnx", "transformers"), name="export", timeout_seconds=3600)
def export(checkpoint: Checkpoint, dataset: Dataset, section: Export, precision: Precision) -> OnnxModel:
    """One graph: inputs and the one output of the task type, with a free batch.

    `precision` is of everything that is not quantized; inputs and outputs stay FP32.
    Raises InputError when the graph loses a 2:4 weight or a quantizer of the checkpoint.
    """
    import onnx

    model, _ = checkpoints.restore(checkpoint)
    export_scales.fill_empty(model)
    sample = batches.samples(dataset, batches.preprocessor(checkpoint), count=1, size=2)[0]
    graph = _trace(model, sample, types.load(dataset.type), section.opset)
    _fold(graph)
    if precision == "fp16":
        graph = _half(graph)
    pruned = checkpoint.facts.get("sparsity", {})
    facts = {"opset": section.opset, "precision": precision, **_counts(graph)}
    _hold(facts, checkpoint.facts, pruned)
    with store.staging() as folder:
        _write(graph, folder / "model.onnx")
        onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
        return OnnxModel(store.commit(folder), checkpoint.facts.get("format", precision), facts)


def _trace(model: nn.Module, sample: types.Example, kind: types.TaskType, opset: int) -> onnx.ModelProto:
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
    for node in graph.graph.node:
        if node.domain == "trt" and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            node.domain = ""
    opsets = [entry for entry in graph.opset_import if entry.domain != "trt"]
    del graph.opset_import[:]
    graph.opset_import.extend(opsets)
    _name_output(graph, kind.OUTPUTS)
    return graph


def _positional(model: nn.Module, kind: types.TaskType) -> nn.Module:
    import torch

    class Positional(torch.nn.Module):
        """Positional inputs in, the task type's output out."""

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


def _fold(model: onnx.ModelProto) -> None:
    """Constants become initializers, quantized weights INT8 (ModelOpt leaves Q and DQ on FP32)."""
    from onnx import numpy_helper

    graph = model.graph
    for node in [node for node in graph.node if node.op_type == "Constant"]:
        tensor = next(item.t for item in node.attribute if item.name == "value")
        tensor.name = node.output[0]
        graph.initializer.append(tensor)
        graph.node.remove(node)
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] in stored]:
        axis = next((item.i for item in node.attribute if item.name == "axis"), 1)
        weight, scale, zero = (numpy_helper.to_array(stored[name]) for name in node.input)
        folded = quantize_weight(weight, scale, zero, axis)
        name = f"{node.input[0]}_quantized"
        graph.initializer.append(numpy_helper.from_array(folded, name))
        for user in graph.node:
            user.input[:] = [name if item == node.output[0] else item for item in user.input]
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def quantize_weight(weight: np.ndarray, scale: np.ndarray, zero: np.ndarray, axis: int) -> np.ndarray:
    """ONNX QuantizeLinear for INT8: round half to even, saturate; `scale` is scalar or along `axis`."""
    assert zero.dtype == np.int8, f"only INT8 weights are folded here, got {zero.dtype}"
    shape = [-1 if k == axis else 1 for k in range(weight.ndim)] if scale.ndim else []
    scaled = np.rint(weight / scale.reshape(shape)) + zero.astype(np.float32).reshape(shape)
    folded: np.ndarray = np.clip(scaled, -128, 127).astype(np.int8)
    return folded


def _half(model: onnx.ModelProto) -> onnx.ModelProto:
    from modelopt.onnx.autocast.convert import convert_to_f16

    with checkpoints.quiet():
        half: onnx.ModelProto = convert_to_f16(model, keep_io_types=True)
        return half


def _counts(model: onnx.ModelProto) -> Facts:
    """Nodes by kind, stored types, and how many weights are exactly 2:4 along K."""
    from onnx import TensorProto

    operators = Counter(node.op_type for node in model.graph.node)
    types_ = Counter(TensorProto.DataType.Name(tensor.data_type) for tensor in model.graph.initializer)
    weights = _gemm_weights(model)
    return {
        "nodes": sum(operators.values()),
        "quantize_nodes": operators["QuantizeLinear"],
        "dequantize_nodes": operators["DequantizeLinear"],
        "tensors": dict(sorted(types_.items())),
        "gemm_weights": len(weights),
        "sparse_weights": sum(_is_2_4(weight) for weight in weights.values()),
    }


def _gemm_weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Stored weights of MatMul, Gemm and Conv, behind DequantizeLinear, Cast and Transpose; K on axis 1."""
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
            found[name] = weight.T if node.op_type != "Conv" and not turned else weight
    return found


def _turns(node: onnx.NodeProto) -> bool:
    return any(item.name == "transB" and item.i for item in node.attribute)


def _is_2_4(weight: Any) -> bool:
    import torch

    dense = torch.from_numpy(np.ascontiguousarray(weight.astype(np.float32)))
    valid, groups = checkpoints.groups_2_4(dense)
    return groups > 0 and valid == groups


def _hold(facts: Facts, checkpoint: Facts, pruned: Facts) -> None:
    """What the checkpoint had, the graph must have."""
    if pruned and facts["sparse_weights"] < pruned["modules"]:
        raise InputError(
            f"export: {pruned['modules']} weights are 2:4 in the checkpoint, "
            f"{facts['sparse_weights']} in the graph"
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
