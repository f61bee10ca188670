"""Embedding tables in INT8: rows are picked first and scaled after."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from tasks.engines.lowering.graph import Graph, attribute
from tasks.engines.lowering.tensors import blocks

LARGE = 1 << 20  # a table of fewer values is not worth an error


def lower_embeddings(graph: Graph) -> list[dict[str, str]]:
    """A Gather from a dequantized table becomes a Gather of INT8 rows, times the row's scale: equal."""
    done = []
    for node in graph.of("Gather"):
        source = graph.producer(node.input[0], "DequantizeLinear")
        table = graph.array(source.input[0]) if source is not None else None
        if source is None or table is None or not _rows(graph, source, table) or attribute(node, "axis", 0):
            continue
        _pick(graph, node, source.input[0], source.input[1])
        done.append({"transform": "embedding", "node": node.output[0], "weight": source.input[0]})
    return done


def quantize_embeddings(graph: Graph) -> list[dict[str, str]]:
    """Large float tables become INT8 with one symmetric scale a row (largest value / 127): new numbers."""
    done = []
    for node in graph.of("Gather"):
        table = graph.array(node.input[0])
        if table is None or table.dtype != np.float32 or table.ndim != 2 or table.size < LARGE:
            continue
        if attribute(node, "axis", 0) or len(graph.consumers(node.input[0])) > 1:
            continue
        scale, values = _symmetric(table)
        name = node.input[0]
        pair = [graph.constant(f"{name}.i8", values), graph.constant(f"{name}.scale", scale)]
        dequantize = helper.make_node("DequantizeLinear", pair, [f"{name}.f32"], axis=0)
        new = onnx.NodeProto()
        new.CopyFrom(node)
        new.input[0] = f"{name}.f32"
        graph.replace([node], [dequantize, new])
        done.append({"transform": "quantize_embedding", "node": node.output[0], "weight": name})
    return done


def _symmetric(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A scale for each row, and the row's values in INT8."""
    largest = np.concatenate([np.abs(rows).max(axis=1) for rows in blocks(table)])
    scale = (np.maximum(largest, np.finfo(np.float32).tiny) / 127).astype(np.float32)
    values = np.empty(table.shape, np.int8)
    start = 0
    for rows in blocks(table):
        part = slice(start, start := start + len(rows))
        values[part] = np.rint(rows / scale[part, None])
    return scale, values


def _rows(graph: Graph, source: onnx.NodeProto, table: np.ndarray) -> bool:
    scale = graph.array(source.input[1])
    zero = graph.array(source.input[2]) if len(source.input) > 2 else None
    return (
        scale is not None
        and table.dtype == np.int8
        and scale.shape == table.shape[:1]
        and attribute(source, "axis", 1) == 0
        and (zero is None or not np.any(zero))
    )


def _pick(graph: Graph, node: onnx.NodeProto, table: str, scale: str) -> None:
    output = node.output[0]
    axis = graph.constant("axis.last", np.array([-1], np.int64))
    graph.replace(
        [node],
        [
            helper.make_node("Gather", [table, node.input[1]], [f"{output}.i8"], axis=0),
            helper.make_node("Cast", [f"{output}.i8"], [f"{output}.f32"], to=TensorProto.FLOAT),
            helper.make_node("Gather", [scale, node.input[1]], [f"{output}.scales"], axis=0),
            helper.make_node("Unsqueeze", [f"{output}.scales", axis], [f"{output}.scale"]),
            helper.make_node("Mul", [f"{output}.f32", f"{output}.scale"], [output]),
        ],
    )
