"""Prune to 2:4 with ModelOpt: two of every four weights along K become zero and stay zero in training.

python -m flows optimize RECIPE     (stage `sparsify`; before quantizing, the reverse prunes nothing)
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from recipes.compress import Sparsify
from tasks import batches, checkpoints, store
from tasks.artifacts import Checkpoint, Dataset
from tasks.errors import InputError
from tasks.stage import stage

if TYPE_CHECKING:
    from torch import nn


@stage(uses=("torch", "nvidia-modelopt", "transformers"), name="sparsify", gpu=True, timeout_seconds=3 * 3600)
def sparsify(checkpoint: Checkpoint, dataset: Dataset, section: Sparsify) -> Checkpoint:
    """Mask every linear layer and convolution that 2:4 fits, but for those excluded; counted exactly."""
    model, config = checkpoints.restore(checkpoint)
    model, config = checkpoints.without_norms(model, config, batches.forward(dataset, checkpoint))
    model.to(checkpoints.device())
    looked_at = _prunable(model)
    checkpoints.excluded(looked_at, section.exclude, "sparsify.exclude")
    prune(model, section, batches.forward_loop(dataset, batches.preprocessor(checkpoint), 16, "sparsify"))
    counts = checkpoints.sparsity(model)
    if not counts:
        raise InputError(
            "sparsify: nothing was pruned; sizes must be multiples of 16 and names not excluded. "
            f"Looked at: {', '.join(looked_at) or 'no linear layer or convolution'}"
        )
    if counts["valid_groups"] != counts["groups"]:
        raise InputError(
            f"sparsify: method {section.method} left {counts['groups'] - counts['valid_groups']} of "
            f"{counts['groups']} groups denser than 2:4; use method: magnitude"
        )
    left_dense = sorted(set(looked_at) - set(counts["names"]))
    with store.staging() as folder:
        shutil.copytree(batches.preprocessor(checkpoint), folder / "preprocessor")
        facts = {**checkpoints.untrained(checkpoint), "sparsity": counts | {"left_dense": left_dense}}
        return checkpoints.save(model, config, folder, dataset.type, facts)


def _prunable(model: nn.Module) -> list[str]:
    from torch import nn

    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]


def prune(model: nn.Module, section: Sparsify, loop: Callable[[nn.Module], None]) -> None:
    """Give the network its 2:4 masks; only SparseGPT runs `loop`."""
    with checkpoints.quiet():
        import modelopt.torch.sparsity as mts

        rules: dict[str, Any] = {"*": {}, **dict.fromkeys(section.exclude)}
        mode = {"magnitude": "sparse_magnitude", "sparsegpt": "sparsegpt"}[section.method]
        config = {"forward_loop": loop} if section.method == "sparsegpt" else {}
        mts.sparsify(model, [(mode, {"nn.Linear": rules, "nn.Conv2d": rules})], config=config)
