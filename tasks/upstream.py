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


def padding_left_to_compute(model: onnx.ModelProto) -> None:
    """How much to pad is computed in every run, by a dozen nodes on constants."""
    from onnx import helper, numpy_helper
    from onnx.reference import ReferenceEvaluator

    graph = model.graph
    for pad in [node for node in graph.node if node.op_type == "Pad"]:
        chain = _chain(graph, pad.input[1])
        if not chain:
            continue
        wanted = helper.make_tensor_value_info(pad.input[1], 0, None)
        part = helper.make_graph(chain, "pads", [], [wanted], list(graph.initializer))
        evaluator = ReferenceEvaluator(helper.make_model(part, opset_imports=model.opset_import))
        found: Any = evaluator.run(None, {})
        pad.input[1] = f"{pad.output[0]}_pads"
        graph.initializer.append(numpy_helper.from_array(found[0], pad.input[1]))
    _drop_unused(graph)


def _chain(graph: onnx.GraphProto, name: str) -> list[onnx.NodeProto]:
    """The nodes that compute a value, in order; none where it is stored, or follows from an input."""
    makers = {output: node for node in graph.node for output in node.output}
    inputs = {item.name for item in graph.input}
    needed: set[int] = set()
    waiting = [name]
    while waiting:
        current = waiting.pop()
        if current in inputs:
            return []
        if current in makers and id(makers[current]) not in needed:
            needed.add(id(makers[current]))
            waiting += makers[current].input
    return [node for node in graph.node if id(node) in needed]


def _drop_unused(graph: onnx.GraphProto) -> None:
    used = {item.name for item in graph.output}
    kept = []
    for node in reversed(graph.node):
        if used & set(node.output):
            used |= set(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))


def float_types_of_fp8_values(model: onnx.ModelProto) -> None:
    """The types it notes say that FP8's Q nodes give floats; every type can be inferred again."""
    del model.graph.value_info[:]


def tiny_scores_look_equal_to_the_solver(state: dict[str, Any]) -> None:
    """auto_quantize's scores go with the gradient squared; below 1e-7 its solver takes them for zero."""
    every = [stats for stats in state["candidate_stats"].values() if not stats["is_fixed"]]
    largest = max(score for stats in every for score in stats["scores"])
    for stats in every if largest > 0 else ():
        stats["scores"] = [score / largest for score in stats["scores"]]
