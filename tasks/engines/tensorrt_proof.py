"""What an engine really runs, from the inspector's layers: quantized and sparse shares, tactics."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Layer = Mapping[str, Any]

_HEAVY = ("conv", "gemm", "matmul", "matrix", "fullyconnected", "mha", "attention")
_QUANTIZED = ("int8", "fp8", "int4", "fp4")
_SPARSE = ("sparse", "_spgemm", "sparsegemm")


def layers(text: str) -> list[dict[str, Any]]:
    """The inspector's JSON as layers; it can hold raw control characters, hence strict=False."""
    found = json.loads(text, strict=False)["Layers"]
    return [layer if isinstance(layer, dict) else {"Name": str(layer), "LayerType": ""} for layer in found]


def summary(found: Sequence[Layer]) -> dict[str, Any]:
    """Shares (by count) of the layers that multiply matrices, their names, tactics and reformats.

    A share is None where the engine holds regions that the inspector cannot look into.
    """
    opaque = [layer for layer in found if is_opaque(layer)]
    heavy = [layer for layer in found if is_heavy(layer) and not is_opaque(layer)]
    quantized = [layer for layer in heavy if is_quantized(layer)]
    sparse = [layer for layer in heavy if is_sparse(layer)]
    return {
        "layers": len(found),
        "matrix_layers": len(heavy),
        "opaque": [layer["Name"] for layer in opaque],
        "quantized_share": _share(quantized, heavy, opaque),
        "sparse_share": _share(sparse, heavy, opaque),
        "quantized": [layer["Name"] for layer in quantized],
        "not_quantized": [layer["Name"] for layer in heavy if layer not in quantized],
        "sparse": [layer["Name"] for layer in sparse],
        "tactics": dict(Counter(_tactic(layer) for layer in heavy)),
        "reformats": sum(layer.get("LayerType", "").lower() == "reformat" for layer in found),
        "types": dict(Counter(layer.get("LayerType", "") for layer in found)),
    }


def _share(part: Sequence[Layer], whole: Sequence[Layer], opaque: Sequence[Layer]) -> float | None:
    if opaque:
        return None
    return len(part) / len(whole) if whole else 0.0


def is_opaque(layer: Layer) -> bool:
    """True for a compiled region of many operations of which the inspector tells nothing but the ends."""
    return str(layer.get("LayerType", "")).lower() == "myelin" or "ForeignNode" in str(layer.get("Name", ""))


def is_heavy(layer: Layer) -> bool:
    """True for a convolution, a matrix product, or a fused kernel that holds one."""
    kind = f"{layer.get('LayerType', '')} {layer.get('ParameterType', '')}".lower()
    if any(word in kind for word in _HEAVY):
        return True
    return "gemm" in _tactic(layer).lower() or "conv" in _tactic(layer).lower()


def is_quantized(layer: Layer) -> bool:
    """True when an input, the weights or the kernel is of eight bits or fewer."""
    words = [str(tensor.get("Format/Datatype", "")) for tensor in layer.get("Inputs", ())]
    weights = layer.get("Weights")
    words += [str(weights.get("Type", ""))] if isinstance(weights, Mapping) else []
    words += [_tactic(layer).replace("i8i8", "int8").replace("e4m3", "fp8")]
    return any(kind in word.lower() for word in words for kind in _QUANTIZED)


def is_sparse(layer: Layer) -> bool:
    """True when the kernel chosen is one for 2:4 sparse weights."""
    return any(word in _tactic(layer).lower() for word in _SPARSE)


def _tactic(layer: Layer) -> str:
    return str(layer.get("TacticName") or layer.get("TacticValue") or "")
