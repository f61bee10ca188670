"""What really runs in 8-bit integers: read node by node from a profiled run, not from the plan."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import onnx

from tasks.artifacts import Facts
from tasks.engines.common import Arrays
from tasks.engines.lowering.split import PLAN
from tasks.engines.onnxruntime_session import open

INTEGER = {
    "MatMulIntegerToFloat", "QLinearMatMul", "QGemm", "MatMulInteger", "DynamicQuantizeMatMul",
    "QLinearConv", "ConvInteger",
}  # fmt: skip
FLOAT = {
    "MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MatMulNBits", "Conv", "FusedConv", "ConvTranspose",
    "Attention", "MultiHeadAttention",
}  # fmt: skip
EIGHT_BITS = {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}


def proof(plan: Path, weights: Path | None, sample: Arrays, *, threads: int | None = None) -> Facts:
    """Shares of products that ran in integers, by count and by floating point operations, on one real input.

    `fallbacks` says for each product that ran in float why it did; `milliseconds` is the profile by operator.
    """
    with tempfile.TemporaryDirectory() as name:
        session = open(plan, weights, threads=threads, profile=Path(name) / "run")
        with session:
            session.run(sample)
            session.run(sample)
            events = json.loads(Path(session.raw.end_profiling()).read_text())
    nodes = _second_run(events)
    graph = onnx.load(plan / PLAN, load_external_data=False)
    products = [_product(event, graph) for event in nodes if event["args"]["op_name"] in INTEGER | FLOAT]
    reasons = _reasons(graph)
    floats = [p for p in products if not p["integer"]]
    unplaced = [p["node"] for p in products if not p["operations"]]
    by_count = _share([1] * len(products), [1] * len(floats))
    by_work = _share([p["operations"] for p in products], [p["operations"] for p in floats])
    return {
        "products": len(products),
        # One without known work would count for nothing, however much it does.
        "quantized_share": min(by_work, by_count) if unplaced else by_work,
        "quantized_share_by_count": by_count,
        "operators": dict(sorted(Counter(p["operator"] for p in products).items())),
        "fallbacks": [{**p, "why": reasons.get(p["node"], "not quantized in the graph")} for p in floats],
        "unplaced": unplaced,
        "sparse_share": 0.0,  # ONNX Runtime has no kernel that skips 2:4 zeros
        "milliseconds": _milliseconds(nodes),
    }


def _second_run(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Kernel events of the last run, which is past all first-use costs."""
    start = max(e["ts"] for e in events if e.get("cat") == "Session" and e["name"] == "model_run")
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    return [e for e in kernels if e["ts"] >= start]


def _product(event: dict[str, Any], plan: onnx.ModelProto) -> dict[str, Any]:
    name, arguments = event["name"].removesuffix("_kernel_time"), event["args"]
    operator = arguments["op_name"]
    if "Conv" in operator:
        name, operations = _convolution(name, arguments, plan)
    else:
        operations = _operations(arguments)
    return {"node": name, "operator": operator, "integer": operator in INTEGER, "operations": operations}


def _operations(arguments: dict[str, Any]) -> int:
    """Multiplications and additions of a matrix product, from the shapes that it ran on."""
    inputs = [shape for item in arguments["input_type_shape"] for shape in item.values()]
    output = next(iter(arguments["output_type_shape"][0].values()))
    operator = arguments["op_name"]
    if operator in ("Attention", "MultiHeadAttention"):
        batch, queries, width = inputs[0]
        return int(4 * batch * queries * inputs[1][1] * width)
    inner = math.prod(inputs[0]) // math.prod(output[:-1]) if "Gemm" in operator else inputs[0][-1]
    return int(2 * math.prod(output) * inner)


def _convolution(name: str, arguments: dict[str, Any], plan: onnx.ModelProto) -> tuple[str, int]:
    """A convolution's name in the plan and its operations.

    The runtime renames it for its layout (`_token_N`: channels last, `_nchwc`: blocks of channels,
    padded) or after a Relu that it took in, and hides the packed weight: its shape is the plan's.
    One that cannot be found there, or whose weight is computed, has 0 operations and shows up as unplaced.
    """
    output = next(iter(arguments["output_type_shape"][0].values()))
    last = re.search(r"_token_\d+$", name)
    producers = {name: node for node in plan.graph.node for name in node.output}
    known = {**producers, **{node.name: node for node in plan.graph.node}}  # the runtime uses either name
    node = known.get(re.sub(r"_token_\d+$|_nchwc$", "", name))
    while node is not None and "Conv" not in node.op_type:
        node = producers.get(node.input[0])
    shapes = {tensor.name: list(tensor.dims) for tensor in plan.graph.initializer}
    stored = [producers[i].input[0] if i in producers else i for i in (node.input if node else ())]
    weight = next((shapes[i] for i in stored if len(shapes.get(i, ())) >= 3), None)
    if node is None or weight is None:
        return name, 0
    pixels = math.prod(output) // (output[-1] if last else output[1])
    return node.name, int(2 * pixels * math.prod(weight))


def _reasons(plan: onnx.ModelProto) -> dict[str, str]:
    """Why a product that has Q/DQ around it did not become an integer one, by node name."""
    producers = {name: node for node in plan.graph.node for name in node.output}
    kinds = {tensor.name: tensor.data_type for tensor in plan.graph.initializer}
    found = {}
    for node in plan.graph.node:
        if node.op_type in FLOAT:
            sides = [_stored(producers, kinds, name) for name in node.input[:2]]
            if any(side is not None for side in sides):
                found[node.name] = _why(node.op_type, sides)
    return found


def _stored(producers: dict[str, onnx.NodeProto], kinds: dict[str, int], name: str) -> int | None:
    """The type that a value is dequantized from, None when it is not; 0 when it is unknown."""
    node = producers.get(name)
    if node is not None and node.op_type in ("Transpose", "Reshape"):
        node = producers.get(node.input[0])
    if node is None or node.op_type != "DequantizeLinear":
        return None
    return kinds.get(node.input[0], kinds.get(node.input[2], 0) if len(node.input) > 2 else 0)


def _why(operator: str, sides: list[int | None]) -> str:
    types = [
        onnx.TensorProto.DataType.Name(kind) if kind else "unknown" for kind in sides if kind is not None
    ]
    if any(kind is None for kind in sides):
        return f"only one side is quantized ({types[0]})"
    if all(kind in EIGHT_BITS for kind in sides) and operator == "Conv":
        return "its result is wanted in float, where ConvInteger is slower than a float convolution"
    if all(kind in EIGHT_BITS for kind in sides):
        return "its scales or axes have no integer kernel"
    return f"no kernel on this processor for {' times '.join(types)}"


def _share(all_: list[int], floats: list[int]) -> float:
    return 1 - sum(floats) / sum(all_) if sum(all_) else 0.0


def _milliseconds(nodes: list[dict[str, Any]]) -> dict[str, float]:
    times: Counter[str] = Counter()
    for event in nodes:
        times[event["args"]["op_name"]] += event["dur"]
    return {name: duration / 1e3 for name, duration in times.most_common(8)}
