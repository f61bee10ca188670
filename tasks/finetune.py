"""Fine-tune with the Hugging Face Trainer: the FP32 baseline, and again with mask and quantizers on (QAT).

python -m flows optimize RECIPE     (stage `fine-tune`, up to twice)
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.compress import Finetune
from tasks import batches, checkpoints, store, types
from tasks.artifacts import Checkpoint, Dataset
from tasks.stage import stage

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer

DAY = 24 * 3600


@stage(
    uses=("torch", "transformers", "accelerate", "nvidia-modelopt"),
    name="fine-tune",
    gpu=True,
    timeout_seconds=DAY,
)
def finetune(checkpoint: Checkpoint, dataset: Dataset, section: Finetune) -> Checkpoint:
    """Train on the train rows; whatever mask and quantizers the checkpoint has stay on.

    Raises RuntimeError when training lost a 2:4 mask or switched a quantizer off.
    """
    model, config = checkpoints.restore(checkpoint)
    before = checkpoints.sparsity(model), checkpoints.quantizers(model)
    with store.staging() as folder:
        shutil.copytree(batches.preprocessor(checkpoint), folder / "preprocessor")
        with store.staging() as scratch:
            trainer = _trainer(model, checkpoint, dataset, section, scratch)
            trainer.train()
        model.eval()
        if (checkpoints.sparsity(model), checkpoints.quantizers(model)) != before:
            raise RuntimeError("training changed the 2:4 mask or the set of quantizers")
        facts = {**checkpoint.facts, "curve": _curve(trainer.state.log_history)}
        return checkpoints.save(model, config, folder, dataset.type, facts)


def _trainer(
    model: nn.Module, checkpoint: Checkpoint, dataset: Dataset, section: Finetune, scratch: Path
) -> Trainer:
    from transformers import ProgressCallback, Trainer, TrainingArguments

    class Bar(ProgressCallback):  # type: ignore[misc]
        """The progress bar alone; the loss goes to the curve, not between the bar's lines."""

        def on_log(self, *args: Any, **kwargs: Any) -> None:
            pass

    kind = types.load(dataset.type)
    encoded, labels = batches.examples(dataset, "train", batches.preprocessor(checkpoint))
    steps = max(1, round(section.epochs * -(-len(encoded) // section.batch_size)))
    arguments = TrainingArguments(
        output_dir=str(scratch),
        max_steps=steps,
        per_device_train_batch_size=section.batch_size,
        learning_rate=section.learning_rate,
        warmup_steps=int(section.warmup_ratio * steps),
        weight_decay=section.weight_decay,
        seed=section.seed,
        save_strategy="no",
        logging_steps=max(1, steps // 50),
        report_to=[],
        disable_tqdm=False,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        # Texts of like length share a batch: half of the time would go into padding.
        train_sampling_strategy="group_by_length" if kind.COLUMN == "text" else "random",
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[
            {**example, "label": int(k)}
            for example, k in zip(encoded, labels if len(labels) else [0] * len(encoded), strict=True)
        ],
        data_collator=_Collator(dataset.type),
        compute_loss_func=lambda found, targets, num_items_in_batch=None: kind.loss(found, targets),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Bar)
    return trainer


class _Collator:
    """Rows to a batch of tensors, with what the loss compares with as `labels`."""

    def __init__(self, task: str) -> None:
        self.kind = types.load(task)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = self.kind.collate(rows)
        labels = np.array([row["label"] for row in rows])
        return batches.tensors({**batch, "labels": self.kind.targets(batch, labels)})


def _curve(history: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    return [{"step": entry["step"], "loss": entry["loss"]} for entry in history if "loss" in entry]
