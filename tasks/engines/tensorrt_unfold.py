"""INT8 weights as TensorRT 8.6 takes them: floats that are quantized in the graph.

Its builder ends with "convertMyelinWeightsToFp32 … Assertion params.weights.type() != DataType::kINT8
failed" where a compiled region holds a weight that is stored in INT8; later versions want it stored.

python -m tasks.engines.tensorrt_unfold MODEL.onnx OUT.onnx     (for `trtexec`; a build does it by itself)
"""

from __future__ import annotations

import sys

import numpy as np
import onnx
from onnx import helper, numpy_helper

AXIS = 1  # of QuantizeLinear and DequantizeLinear, where none is given


def unfolded(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with a QuantizeLinear before each DequantizeLinear of an INT8 weight; it computes the same.

    Tensors keep their names, so that weights are given to a refit under those of the model.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    stored = {tensor.name: tensor for tensor in made.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    widened: set[str] = set()
    for node in made.graph.node:
        tensor = stored.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if tensor is not None and (tensor.data_type == onnx.TensorProto.INT8 or tensor.name in widened):
            if tensor.name not in widened:
                tensor.CopyFrom(numpy_helper.from_array(_floats(node, stored), tensor.name))
                widened.add(tensor.name)
            again = onnx.NodeProto()
            again.CopyFrom(node)
            again.op_type, again.name = "QuantizeLinear", f"{node.name or node.output[0]}_quantize"
            again.output[:] = [f"{node.output[0]}_quantized"]
            node.input[0] = again.output[0]
            nodes.append(again)
        nodes.append(node)
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    return made


def _floats(node: onnx.NodeProto, stored: dict[str, onnx.TensorProto]) -> np.ndarray:
    """What the node makes of its weight, as float32."""
    values, scale, *zeros = (numpy_helper.to_array(stored[name]) for name in node.input)
    zero = zeros[0] if zeros else np.zeros_like(scale)
    axis = next((helper.get_attribute_value(a) for a in node.attribute if a.name == "axis"), AXIS)
    shape = [-1 if k == axis else 1 for k in range(values.ndim)] if scale.ndim else []
    found: np.ndarray = (values.astype(np.float32) - zero.astype(np.float32).reshape(shape)) * (
        scale.astype(np.float32).reshape(shape)
    )
    return found


if __name__ == "__main__":
    onnx.save(unfolded(onnx.load(sys.argv[1])), sys.argv[2])
