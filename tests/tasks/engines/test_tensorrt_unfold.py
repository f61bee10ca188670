"""INT8 weights given as floats that the graph quantizes: the same function, the same names."""

from __future__ import annotations

import numpy as np
import onnx

from benchmarks.tensorrt import mlp, qdq
from tasks.engines.tensorrt_parity import evaluate
from tasks.engines.tensorrt_unfold import unfolded

WIDTH, ROWS = 16, 4


def stored_in_int8(model: onnx.ModelProto) -> set[str]:
    """The INT8 tensors that a DequantizeLinear reads as its values."""
    read = {node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return {
        t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8 and t.name in read
    }


def test_it_computes_the_same_and_stores_no_weight_in_int8() -> None:
    plain = mlp.mlp(WIDTH, ROWS, kind="fp32")
    folded = qdq.insert(plain, {f"matmul{i}": 4.5 for i in range(3)}, "int8", fold=True)
    assert len(stored_in_int8(folded)) == 3
    found = unfolded(folded)
    onnx.checker.check_model(found, full_check=True)
    assert not stored_in_int8(found)
    assert {t.name for t in found.graph.initializer} == {t.name for t in folded.graph.initializer}
    feed = mlp.feed(WIDTH, ROWS)
    (right,), (got,) = evaluate(folded, [feed]), evaluate(found, [feed])
    assert np.array_equal(right["y"], got["y"])
    assert np.abs(right["y"] - evaluate(plain, [feed])[0]["y"]).max() > 0


def test_a_graph_without_int8_weights_stays_as_it_is() -> None:
    model = mlp.mlp(WIDTH, ROWS, kind="fp16")
    assert unfolded(model).SerializeToString() == model.SerializeToString()
