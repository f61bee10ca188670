"""What ModelOpt 0.47 leaves behind that must not stay, one function each, named after it.

Each has a test that fails when ModelOpt no longer does it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

FP8_NODES = {"TRT_FP8QuantizeLinear": "QuantizeLinear", "TRT_FP8DequantizeLinear": "DequantizeLinear"}
QDQ = ("QuantizeLinear", "DequantizeLinear")


def q_dq_in_tensorrts_domain(model: onnx.ModelProto) -> None:
    """Some Q and DQ nodes stand in the domain `trt`, and FP8's keep a name of TensorRT's own (W4A8)."""
    from onnx import TensorProto, helper

    graph = model.graph
    for node in graph.node:
        if node.domain == "trt" and node.op_type in FP8_NODES:
            zero = f"{node.output[0]}_fp8_zero"
            tensor = helper.make_tensor(zero, TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
            graph.initializer.append(tensor)
            node.op_type, node.domain = FP8_NODES[node.op_type], ""
            node.input.append(zero)
        elif node.domain == "trt" and node.op_type in QDQ:
            node.domain = ""
    opsets = [entry for entry in model.opset_import if entry.domain != "trt"]
    del model.opset_import[:]
    model.opset_import.extend(opsets)


def q_dq_after_softmax(model: onnx.ModelProto) -> None:
    """In FP8 it quantizes every attention's softmax, asked or not, which calibration never saw."""
    graph = model.graph
    softmax = {node.name: node.output[0] for node in graph.node if node.op_type == "Softmax"}
    for name, output in softmax.items():
        pair = [node for kind in QDQ for node in graph.node if node.name == f"{name}/{kind}"]
        if len(pair) == 2:
            for node in graph.node:
                node.input[:] = [output if item == pair[1].output[0] else item for item in node.input]
            for node in pair:
                graph.node.remove(node)


def float_types_of_fp8_values(model: onnx.ModelProto) -> None:
    """The types it notes say that FP8's Q nodes give floats; every type can be inferred again."""
    del model.graph.value_info[:]


def tiny_scores_look_equal_to_the_solver(state: dict[str, Any]) -> None:
    """auto_quantize's scores go with the gradient squared; below 1e-7 its solver takes them for zero."""
    every = [stats for stats in state["candidate_stats"].values() if not stats["is_fixed"]]
    largest = max(score for stats in every for score in stats["scores"])
    for stats in every if largest > 0 else ():
        stats["scores"] = [score / largest for score in stats["scores"]]
