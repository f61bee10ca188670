"""Rewrites from ONNX to ONNX that reach ONNX Runtime's fast kernels; each step is recorded.

Which steps apply follows from the graph alone, so two trainings of one recipe get the same steps and the
same plan. `requantize` changes numbers, `lower` only the order of the same arithmetic.
"""

from __future__ import annotations

import onnx

from tasks.engines.lowering.attention import fuse_attention
from tasks.engines.lowering.borders import clips_as_relus, take_in_padding
from tasks.engines.lowering.conv import lower_convs
from tasks.engines.lowering.embedding import lower_embeddings, quantize_embeddings
from tasks.engines.lowering.gemm import lower_gemms
from tasks.engines.lowering.graph import Graph
from tasks.engines.lowering.pairs import activation, drop_pairs, share_pairs

Steps = list[dict[str, str]]


def requantize(model: onnx.ModelProto) -> tuple[onnx.ModelProto, Steps]:
    """Large float embedding tables of a graph that is quantized to INT8 go to INT8 as well."""
    graph = Graph(model)
    integer = any(activation(graph, node.input[0]) for node in graph.of("MatMul", "Gemm", "Conv"))
    steps = quantize_embeddings(graph) if integer else []
    return (graph.write(), steps) if steps else (model, [])


def lower(model: onnx.ModelProto) -> tuple[onnx.ModelProto, Steps]:
    """The same function in operators that have fast kernels, and the steps that led there."""
    graph = Graph(model)
    share_pairs(graph)
    drop_pairs(graph)
    steps = take_in_padding(graph) + clips_as_relus(graph)
    steps += lower_convs(graph) + lower_gemms(graph) + fuse_attention(graph) + lower_embeddings(graph)
    return graph.write(), steps
