"""Strip: a checkpoint's own weights without mask and quantizers, to train on or to compare with.

python -m flows retrain MODEL     (stage `strip`)
"""

from __future__ import annotations

import shutil

from tasks import batches, checkpoints, store
from tasks.artifacts import Checkpoint
from tasks.stage import stage


@stage(uses=("torch", "nvidia-modelopt", "transformers"), name="strip", timeout_seconds=3600)
def strip(checkpoint: Checkpoint) -> Checkpoint:
    """The same network and weights (what 2:4 pruned stays zero), dense and in FP32."""
    model, config = checkpoints.restore(checkpoint)
    with store.staging() as folder:
        shutil.copytree(batches.preprocessor(checkpoint), folder / "preprocessor")
        kept = ("source", "content", "parameters")
        facts = {name: checkpoint.facts[name] for name in kept if name in checkpoint.facts}
        dense = checkpoints.plain(model, config, checkpoint.type)
        return checkpoints.save(dense, config, folder, checkpoint.type, facts)
