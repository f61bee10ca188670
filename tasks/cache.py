"""A language model with its key/value cache as inputs and outputs of the graph, of any length.

The mask covers past and new tokens: shape (batch, past + length). Positions are counted along it, so that
padding before or after a text moves none.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks import batches, types
from tasks.artifacts import Dataset
from tasks.engines.common import PAST, PRESENT, model_file
from tasks.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

TRACED = 3
"""Tokens of past in the example that is traced, and in those that an engine is proved by."""


def with_cache(network: nn.Module, kind: types.TaskType, sample: types.Example) -> tuple[Any, types.Example]:
    """The task type with a cache among its inputs and outputs, and an example that has a past."""
    layers = _layers(network, batches.tensors(sample))
    free = {0: "batch", 2: "past"}
    names = [f"{layer}.{part}" for layer in range(len(layers)) for part in ("key", "value")]
    inputs = kind.INPUTS | {"attention_mask": {0: "batch", 1: "total"}}
    cached = SimpleNamespace(
        INPUTS={**inputs, **{PAST + name: free for name in names}},
        OUTPUTS={**kind.OUTPUTS, **{PRESENT + name: {0: "batch", 2: "total"} for name in names}},
        forward=forward,
    )
    sizes = [(layer.keys.shape[1], layer.keys.shape[3]) for layer in layers for _ in range(2)]
    return cached, _after_a_past(sample, dict(zip(names, sizes, strict=True)))


def samples(dataset: Dataset, preprocessor: Path, model: Path) -> list[types.Example]:
    """`batches.samples`, and for a graph with a cache the same texts again as if they went on from others."""
    import onnx

    found = batches.samples(dataset, preprocessor)
    if not model_file(model).is_file():  # of several graphs
        return found
    graph = onnx.load(model_file(model), load_external_data=False).graph
    dims = {item.name: item.type.tensor_type.shape.dim for item in graph.input if item.name.startswith(PAST)}
    sizes = {name.removeprefix(PAST): (dim[1].dim_value, dim[3].dim_value) for name, dim in dims.items()}
    return [*found, *(_after_a_past(sample, sizes) for sample in found)] if sizes else found


def _after_a_past(sample: types.Example, sizes: dict[str, tuple[int, int]]) -> types.Example:
    """The batch behind random keys and values; `sizes` has heads and width of each."""
    random, rows = np.random.default_rng(0), len(sample["input_ids"])
    past = {
        PAST + name: random.standard_normal((rows, heads, TRACED, width), np.float32)
        for name, (heads, width) in sizes.items()
    }
    mask = np.pad(sample["attention_mask"], ((0, 0), (TRACED, 0)), constant_values=1)
    return {"input_ids": sample["input_ids"], "attention_mask": mask, **past}


def forward(network: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Logits of the new tokens, then each layer's keys and values, past and new."""
    import torch
    from transformers.cache_utils import DynamicCache, DynamicLayer

    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    past = [tensor for name, tensor in inputs.items() if name.startswith(PAST)]
    cache = DynamicCache()
    for keys, values in zip(past[::2], past[1::2], strict=True):
        layer = DynamicLayer()
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    start = mask.shape[1] - ids.shape[1]
    places = torch.arange(mask.shape[1], device=mask.device)
    seen = (places[None, :] <= places[start:, None])[None, None] & mask[:, None, None, :].bool()
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start:]
    lowest = torch.finfo(torch.float32).min
    found = network(
        input_ids=ids,
        attention_mask=torch.where(seen, 0.0, lowest),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    return (found.logits, *(part for layer in cache.layers for part in (layer.keys, layer.values)))


def _layers(network: Any, inputs: dict[str, Tensor]) -> list[Any]:
    """The network's own cache after a short text; InputError where there is none that grows by its tokens."""
    import torch
    from transformers.cache_utils import DynamicLayer

    if not hasattr(network, "config"):
        raise InputError("export.kv_cache: the network is not a language model of transformers; leave it out")
    with torch.no_grad():
        found = getattr(network(**inputs, use_cache=True), "past_key_values", None)
    layers = list(getattr(found, "layers", []))
    if odd := {type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer} or not layers:
        what = "no cache" if odd is True else f"a cache of {', '.join(sorted(odd))}"
        raise InputError(
            f"export.kv_cache: {type(network).__name__} has {what}; only one that keeps every token's keys "
            "and values can be exported; leave it out"
        )
    return layers
