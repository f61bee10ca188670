"""INT4 weights in blocks along K: out of the tracer's way before export, back into the graph after it.

ModelOpt's own exporter of INT4 stops at AWQ's scales of activations ("Expected Cast node"), at W4A8 and at
anything that is not a MatMul behind a Reshape. Here the network is traced with the values that the integers
stand for, and the stored weights then become integers, scales and DequantizeLinear of opset 21.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.errors import InputError
from tasks.fold import STORED, TURNED

if TYPE_CHECKING:
    import onnx
    from torch import nn

LARGEST = 7  # what a block's largest value becomes
FP8_LARGEST = 448.0


@dataclass(frozen=True)
class Block:
    """A weight as integers (out, K) and scales (out, K / block size); `fp8` is W4A8's second scale."""

    integers: np.ndarray
    scales: np.ndarray
    fp8: float | None

    @property
    def size(self) -> int:
        """Weights that share a scale."""
        return int(self.integers.shape[1] // self.scales.shape[1])


def lift(network: nn.Module) -> dict[str, Block]:
    """The INT4 weights by layer; the network keeps what they stand for, and no quantizer of them."""
    found: dict[str, Block] = {}
    for name, module in network.named_modules():
        quantizer: Any = getattr(module, "weight_quantizer", None)
        parts = list(quantizer.children()) or [quantizer] if quantizer is not None else []
        if parts and parts[0].is_enabled and parts[0].num_bits == 4:
            found[name] = _take(name, module, quantizer, parts)
    return found


def _take(name: str, module: Any, quantizer: Any, parts: list[Any]) -> Block:
    import torch

    with torch.no_grad():
        weight = module.weight.detach().float()
        meant = quantizer(weight)
        size = parts[0].block_sizes[-1]
        scales = (parts[0].amax.float() / LARGEST).reshape(weight.shape[0], -1)
        scales = torch.where(scales == 0, torch.ones_like(scales), scales)
        fp8 = float(parts[1].amax) / FP8_LARGEST if len(parts) > 1 else None
        near = meant if fp8 is None else parts[0](weight)
        # Of what the quantizer gave: a weight halfway between two is rounded here up, there down.
        integers = (near.reshape(*scales.shape, size) / scales.unsqueeze(-1)).round()
        integers = integers.clamp(-LARGEST - 1, LARGEST)
        values = (integers * scales.unsqueeze(-1)).reshape(weight.shape)
        if not torch.allclose(values, near, rtol=1e-4, atol=1e-6 * float(scales.max())):
            raise InputError(f"export: the INT4 integers of {name} do not give its quantizer's values back")
        module._parameters["weight"].data = values.to(module._parameters["weight"].dtype)
    parts[0].disable()
    parts[0]._num_bits = 8  # ModelOpt takes any 4 here, on or off, for its own INT4 route
    module.weight_quantizer = parts[0]
    return Block(_array(integers.reshape(weight.shape), np.int8), _array(scales, np.float32), fp8)


def _array(tensor: Any, kind: Any) -> np.ndarray:
    return np.asarray(tensor.cpu().numpy(), dtype=kind)


def place(model: onnx.ModelProto, blocks: dict[str, Block]) -> None:
    """Exchange the stored weights of these layers for integers, scales and DequantizeLinear."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    outside = {item.name: item for item in model.graph.input}
    nodes: list[onnx.NodeProto] = []
    for layer, block in blocks.items():
        plain = f"model.{layer}.weight"
        name = next((name for name in (plain, plain + TURNED) if name in stored or name in outside), None)
        if name is None:
            raise InputError(f"export: the INT4 weight of {layer} is not in the graph")
        if name in stored:
            model.graph.initializer.remove(stored[name])
        else:
            model.graph.input.remove(outside[name])
        nodes += _dequantized(model, name, block)
    kept = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *kept])


def _dequantized(model: onnx.ModelProto, name: str, block: Block) -> list[onnx.NodeProto]:
    """Nodes that make the weight `name`: INT4 to float, and for W4A8 through FP8."""
    import ml_dtypes
    from onnx import helper, numpy_helper

    turned = name.endswith(TURNED)
    integers, scales = (array.T if turned else array for array in (block.integers, block.scales))
    tensors = {name + STORED: integers.astype(ml_dtypes.int4), f"{name}_scale": scales}
    through = {f"{name}_fp8_scale": np.array(block.fp8, np.float32)} if block.fp8 is not None else {}
    if through:
        tensors |= {**through, f"{name}_fp8_zero": np.zeros((), ml_dtypes.float8_e4m3fn)}
    for key, value in tensors.items():
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), key))
    first = f"{name}_int4" if through else name
    nodes = [
        helper.make_node(
            "DequantizeLinear", [name + STORED, f"{name}_scale"], [first], name=f"{first}/DequantizeLinear",
            axis=0 if turned else 1, block_size=block.size,
        )
    ]  # fmt: skip
    if through:
        numbers = [f"{name}_fp8_scale", f"{name}_fp8_zero"]
        nodes += [
            helper.make_node("QuantizeLinear", [first, *numbers], [f"{name}_fp8"], name=f"{name}/Quantize"),
            helper.make_node(
                "DequantizeLinear", [f"{name}_fp8", *numbers], [name], name=f"{name}/Dequantize"
            ),
        ]
    return nodes
