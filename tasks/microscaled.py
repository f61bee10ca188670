"""NVFP4 and MXFP8 between network and graph: weights in small blocks, activations quantized as they come.

ModelOpt's own exporters of both run the network on a GPU and leave graphs that TensorRT's parser refuses:
FP16 products beside FP32 biases, widths open where it must know them (and MXFP8's makes every GELU another
function). Here the network is traced without these quantizers; once the rest of the graph has its
precision, weights become codes and scales, and TensorRT's dynamic quantizers go in front of the products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.engines import microscale
from tasks.errors import InputError
from tasks.fold import TURNED

if TYPE_CHECKING:
    import onnx
    from torch import nn

OPSET, IR_VERSION = 23, 11  # the first with FP4
FP8_SCALES, E8M0_SCALES = (4, 3), (8, 0)
FORMATS = {FP8_SCALES: "nvfp4", E8M0_SCALES: "mxfp8"}
QUANTIZERS: dict[str, dict[str, Any]] = {
    "nvfp4": {
        "num_bits": (2, 1),  # of exponent and mantissa
        "block_sizes": {-1: microscale.NVFP4_BLOCK, "type": "dynamic", "scale_bits": FP8_SCALES},
    },
    "mxfp8": {
        "num_bits": (4, 3),
        "block_sizes": {-1: microscale.MXFP8_BLOCK, "type": "dynamic", "scale_bits": E8M0_SCALES},
    },
}
"""ModelOpt's words for both, the same of weights and activations."""
HALF = "_10"  # what `tasks.outside` adds to the name of a weight in FP16


@dataclass(frozen=True)
class Layer:
    """A weight as codes (out, K) and scales (out, K / block), and NVFP4's global scales."""

    codes: np.ndarray
    scales: np.ndarray
    weight_scale: float | None = None
    input_scale: float | None = None


def scale_bits(quantizer: Any) -> tuple[int, int] | None:
    """Bits of the scales of a quantizer of small blocks; None for any other quantizer."""
    sizes = getattr(quantizer, "block_sizes", None) or {}
    return tuple(sizes["scale_bits"]) if sizes.get("scale_bits") else None


def lift(network: nn.Module) -> dict[str, Layer]:
    """The layers in NVFP4 and MXFP8; the network keeps its weights, and no quantizer of these.

    Raises InputError for what ModelOpt has beside these two: weights alone, ranges of blocks that are kept.
    """
    found: dict[str, Layer] = {}
    for name, module in network.named_modules():
        quantizer: Any = getattr(module, "weight_quantizer", None)
        if scale_bits(quantizer) and quantizer.is_enabled:
            pair = (quantizer, module.input_quantizer)
            if not all(one.is_enabled and _known(one) for one in pair):
                raise InputError(
                    f"export: {name} is not in NVFP4 or MXFP8 as ModelOpt's NVFP4_DEFAULT_CFG and "
                    "MXFP8_DEFAULT_CFG have them, weights and activations both"
                )
            found[name] = _taken(module)
            for one in pair:
                one.disable()
                one._block_sizes, one._num_bits = None, 8  # else ModelOpt takes its own route, on or off
    return found


def _known(quantizer: Any) -> bool:
    bits = scale_bits(quantizer)
    sizes = {**(quantizer.block_sizes or {}), "scale_bits": bits}
    return {"num_bits": quantizer.num_bits, "block_sizes": sizes} in QUANTIZERS.values()


def _taken(module: Any) -> Layer:
    weight = module.weight.detach().float().cpu().numpy()
    if scale_bits(module.weight_quantizer) == E8M0_SCALES:
        return Layer(*microscale.mxfp8(weight))
    ends = (float(module.weight_quantizer.amax), float(module.input_quantizer.amax))
    of_weight, of_input = (microscale.global_scale(end) for end in ends)
    return Layer(*microscale.nvfp4(weight, of_weight), of_weight, of_input)


def values(layer: Layer) -> np.ndarray:
    """The weight (out, K) that the codes stand for."""
    if layer.weight_scale is None:
        return microscale.mxfp8_values(layer.codes, layer.scales)
    return microscale.nvfp4_values(layer.codes, layer.scales, layer.weight_scale)


def place(model: onnx.ModelProto, layers: dict[str, Layer]) -> None:
    """Exchange the stored weights of these layers for codes and scales, and quantize what they multiply."""
    from onnx import helper

    if not layers:
        return
    ranks = _unknown_ends(model)
    before: dict[str, list[onnx.NodeProto]] = {}
    first: list[onnx.NodeProto] = []
    for layer, given in layers.items():
        name, kind = _take_out(model, layer)
        first += _weight(model, name, given, kind)
        for user in _users(model, layer, name):
            reshaped = _reshaped(model, user, given, ranks)
            before[user.output[0]] = [*reshaped, *_activation(model, user, given, kind)]
    nodes = [part for node in model.graph.node for part in (*before.get(node.output[0], ()), node)]
    del model.graph.node[:]
    model.graph.node.extend([*first, *nodes])
    model.opset_import.append(helper.make_opsetid(microscale.DOMAIN, 1))
    model.ir_version = max(model.ir_version, IR_VERSION)


def in_graph(model: onnx.ModelProto, layer: str) -> str | None:
    """The name of a layer's weight among the stored values and the inputs, whatever its type."""
    names = {item.name for item in (*model.graph.initializer, *model.graph.input)}
    plain = f"model.{layer}.weight"
    every = (plain + turned + half for turned in ("", TURNED) for half in ("", HALF))
    return next((name for name in every if name in names), None)


def _take_out(model: onnx.ModelProto, layer: str) -> tuple[str, int]:
    """Remove the layer's weight; its name and type."""
    name = in_graph(model, layer)
    if name is None:
        raise InputError(f"export: the weight of {layer} is not in the graph")
    for item in model.graph.initializer:
        if item.name == name:
            model.graph.initializer.remove(item)
            return name, item.data_type
    item = next(item for item in model.graph.input if item.name == name)
    model.graph.input.remove(item)
    return name, item.type.tensor_type.elem_type


def _users(model: onnx.ModelProto, layer: str, name: str) -> list[onnx.NodeProto]:
    """The products with the weight; InputError where something else happens to it."""
    users = [node for node in model.graph.node if name in node.input]
    if not users or any(u.op_type not in ("MatMul", "Gemm") or u.input[1] != name for u in users):
        kinds = ", ".join(sorted({node.op_type for node in users})) or "nothing"
        raise InputError(
            f"export: {kinds} follows the weight of {layer}, not a product with its input; name the layer in "
            "quantize.exclude"
        )
    return users


def _weight(model: onnx.ModelProto, name: str, layer: Layer, kind: int) -> list[onnx.NodeProto]:
    """Nodes that make the weight `name` of codes and scales, turned where it was."""
    from onnx import helper

    parts = _names(name, layer.weight_scale)
    _store(model, parts, (layer.codes, layer.scales, layer.weight_scale))
    turned = name.removesuffix(HALF).endswith(TURNED)
    straight = f"{name}_straight" if turned else name
    nodes = _dequantized(parts, straight, kind)
    if turned:
        nodes.append(helper.make_node("Transpose", [straight], [name], name=f"{name}/Turn", perm=[1, 0]))
    return nodes


def _unknown_ends(model: onnx.ModelProto) -> dict[str, int]:
    """The ranks of values whose last dimension is not a number in the graph."""
    from onnx import shape_inference

    ranks = {}
    for value in shape_inference.infer_shapes(model).graph.value_info:
        dims = value.type.tensor_type.shape.dim
        if dims and not dims[-1].HasField("dim_value"):
            ranks[value.name] = len(dims)
    return ranks


def _reshaped(
    model: onnx.ModelProto, user: onnx.NodeProto, layer: Layer, ranks: dict[str, int]
) -> list[onnx.NodeProto]:
    """The width for the first input of a product where the graph leaves it open: TensorRT must know it."""
    from onnx import helper

    rank = ranks.get(user.input[0])
    if rank is None:
        return []
    shape, out = f"{user.name}_input_shape", f"{user.name}_input_reshaped"
    _store(model, [shape], [np.array([0] * (rank - 1) + [layer.codes.shape[1]], np.int64)])
    node = helper.make_node("Reshape", [user.input[0], shape], [out], name=f"{user.name}_input/Reshape")
    user.input[0] = out
    return [node]


def _activation(
    model: onnx.ModelProto, user: onnx.NodeProto, layer: Layer, kind: int
) -> list[onnx.NodeProto]:
    """Nodes that quantize the first input of a product, which then takes what they make."""
    from onnx import TensorProto, helper

    out, fp8 = f"{user.name}_input", TensorProto.FLOAT8E4M3FN
    codes, scales, *global_ = _names(out, layer.input_scale)
    _store(model, global_, (layer.input_scale,))
    more: dict[str, Any]
    operator, more = microscale.FP4_QUANTIZE, {"block_size": microscale.NVFP4_BLOCK, "scale_type": fp8}
    if not global_:
        operator, more = (
            microscale.MXFP8_QUANTIZE,
            {"block_size": microscale.MXFP8_BLOCK, "output_dtype": fp8},
        )
    quantize = helper.make_node(
        operator, [user.input[0], *global_], [codes, scales], name=f"{out}/Quantize",
        domain=microscale.DOMAIN, axis=-1, **more,
    )  # fmt: skip
    user.input[0] = out
    return [quantize, *_dequantized([codes, scales, *global_], out, kind)]


def _names(name: str, scale: float | None) -> list[str]:
    """Of codes, scales, and NVFP4's global scale."""
    return [f"{name}_codes", f"{name}_scales", *([] if scale is None else [f"{name}_global"])]


def _dequantized(parts: Sequence[str], out: str, kind: int) -> list[onnx.NodeProto]:
    """Nodes from codes and scales to `out` of type `kind`; NVFP4's scales are FP8 times the global one."""
    from onnx import TensorProto, helper

    codes, scales, *global_ = parts
    if not global_:
        return [
            helper.make_node(
                microscale.MXFP8_DEQUANTIZE, [codes, scales], [out], name=f"{out}/Dequantize",
                domain=microscale.DOMAIN, axis=-1, block_size=microscale.MXFP8_BLOCK, output_dtype=kind,
            )
        ]  # fmt: skip
    wide = out if kind == TensorProto.FLOAT else f"{out}_wide"  # TensorRT dequantizes FP4 to FP32 alone
    nodes = [
        helper.make_node("DequantizeLinear", [scales, *global_], [f"{out}_steps"], name=f"{out}/Scales"),
        helper.make_node(
            "DequantizeLinear", [codes, f"{out}_steps"], [wide], name=f"{out}/Dequantize", axis=-1,
            block_size=microscale.NVFP4_BLOCK,
        ),
    ]  # fmt: skip
    if wide != out:
        nodes.append(helper.make_node("Cast", [wide], [out], name=f"{out}/Cast", to=kind))
    return nodes


def _store(model: onnx.ModelProto, names: Sequence[str], arrays: Sequence[Any]) -> None:
    """Those of the arrays that have a name."""
    from onnx import numpy_helper

    for name, given in zip(names, arrays, strict=False):
        array = np.array(given, np.float32) if isinstance(given, float) else np.ascontiguousarray(given)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
