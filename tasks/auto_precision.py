"""Which layers stay as they are, so that the weights take a given number of bits on average.

ModelOpt's `auto_quantize` scores every layer by what quantizing it does to the loss, on a dense copy (it
asserts on a pruned network); the choice is then a list of names, which the network that is meant leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recipes.compress import Quantize
from tasks import checkpoints, types, upstream
from tasks.artifacts import Checkpoint, Dataset
from tasks.training import Collator, examples

if TYPE_CHECKING:
    from torch import nn

    Formats = list[dict[str, Any]]


@dataclass(frozen=True)
class Choice:
    """The layers left as they are, bits of a weight on average (16 where left), scores (the worst is 1)."""

    left: tuple[str, ...]
    bits: float
    scores: dict[str, float]


def choose(
    checkpoint: Checkpoint,
    dataset: Dataset,
    section: Quantize,
    searched: dict[str, nn.Module],
    formats: Formats,
) -> Choice:
    """Search with the calibration rows and their labels; the network of `checkpoint` is not touched."""
    with checkpoints.quiet():
        import modelopt.torch.quantization as mtq
    import torch

    kind = types.load(dataset.type)
    model, config = checkpoints.restore(checkpoint)
    dense = checkpoints.plain(model, config, dataset.type).to(checkpoints.device())
    rows = _rows(checkpoint, dataset, section.batch_size)
    others = [name for name, _ in dense.named_modules() if name and name not in searched]
    wanted = {"effective_bits": section.effective_bits}
    with torch.enable_grad(), checkpoints.quiet():
        _, state = mtq.auto_quantize(
            dense,
            constraints=wanted,
            quantization_formats=formats,
            data_loader=rows,
            forward_step=lambda net, batch: net(**batch[0]),
            loss_func=lambda output, batch: kind.loss(output, batch[1]),
            disabled_layers=others,
            num_calib_steps=len(rows),
            num_score_steps=len(rows),
        )
        upstream.tiny_scores_look_equal_to_the_solver(state)
        rules = mtq.get_auto_quantize_config(state, wanted)["quant_cfg"]
    on = {rule["quantizer_name"] for rule in rules if rule["enable"]}
    left = tuple(name for name in searched if f"{name}.weight_quantizer" not in on)
    return Choice(left, _bits(state, left), _scores(state))


def _bits(state: dict[str, Any], left: tuple[str, ...]) -> float:
    """Bits of a weight on average, over the layers that were searched."""
    every = list(state["candidate_stats"].values())
    taken = sum(
        stats["uncompressed_cost"] if set(stats["module_names"]) & set(left) else min(stats["costs"])
        for stats in every
    )
    return float(16 * taken / sum(stats["uncompressed_cost"] for stats in every))


def _rows(checkpoint: Checkpoint, dataset: Dataset, size: int) -> list[tuple[dict[str, Any], Any]]:
    """The calibration rows in batches on the device: inputs, and what the loss compares with."""
    collate, rows = Collator(dataset.type), examples(checkpoint, dataset, "calibration")
    found = []
    for start in range(0, len(rows), size):
        batch = {
            name: tensor.to(checkpoints.device())
            for name, tensor in collate(rows[start : start + size]).items()
        }
        found.append((batch, batch.pop("labels")))
    return found


def _scores(state: dict[str, Any]) -> dict[str, float]:
    """What quantizing each layer does to the loss, as ModelOpt estimates it; fused ones share a score."""
    return {
        name: float(max(stats["scores"]))
        for stats in state["candidate_stats"].values()
        for name in stats["module_names"]
    }
