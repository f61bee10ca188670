"""A layer that is all zeros, or sees only zeros, exports with a scale that TensorRT takes."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from tasks import checkpoints, export
from tasks.engines import tensorrt_parity
from tasks.export_scales import fill_empty
from tasks.fold import fold


class Dead(nn.Module):
    """Its middle layer is pruned away; the last one sees only zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.dead, self.last = nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        for parameter in self.dead.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.last(torch.relu(self.dead(self.first(x)))))


@pytest.mark.parametrize("format", ["INT8", "FP8"])
def test_what_saw_only_zeros_exports(format: str) -> None:
    with checkpoints.quiet():
        import modelopt.torch.quantization as mtq

        torch.manual_seed(0)
        rows = torch.randn(8, 16)
        config = copy.deepcopy(getattr(mtq, f"{format}_DEFAULT_CFG"))
        model = mtq.quantize(Dead().eval(), config, lambda network: network(rows))
    assert fill_empty(model) == ["dead.weight_quantizer", "last.input_quantizer"]
    assert fill_empty(model) == []
    kind: Any = SimpleNamespace(
        INPUTS={"x": {0: "batch"}},
        OUTPUTS={"logits": {0: "batch"}},
        forward=lambda network, inputs: network(**inputs).logits,
    )
    graph = export._trace(model, {"x": rows.numpy()}, kind, 20)
    fold(graph)
    assert scales(graph)
    assert all((scale > 0).all() and np.isfinite(scale).all() for scale in scales(graph))
    found = tensorrt_parity.evaluate(graph, [{"x": rows.numpy()}])[0]["logits"]
    assert np.allclose(found, model.last.bias.detach().numpy(), atol=1e-6)


def scales(graph: onnx.ModelProto) -> list[np.ndarray]:
    stored = {tensor.name: tensor for tensor in graph.graph.initializer}
    nodes = [node for node in graph.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    return [numpy_helper.to_array(stored[node.input[1]]) for node in nodes]
