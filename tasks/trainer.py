"""The Hugging Face Trainer with what a resumed, a distilled and a compressed training need here.

Imported inside functions alone, as torch and transformers stand at its top.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Sampler
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from recipes.compress import Finetune
from tasks import resume, shards
from tasks.types import TaskType

SAVE_SECONDS = 300
Tell = Callable[[int, dict[str, float]], None]
"""Is told of a step's numbers as they come."""


@dataclass(frozen=True)
class Plan:
    """How long a training is, when it looks at the validation rows, and where it keeps its place."""

    section: Finetune
    steps: int
    validates: bool
    folder: Path

    @property
    def every(self) -> int:
        """Steps between two looks at the validation rows."""
        return max(1, self.steps // self.section.evaluations)


class Tuner(Trainer):  # type: ignore[misc]
    """Loss by task type, perhaps with a teacher; its own data order; checkpoints that hold every tensor."""

    def __init__(self, plan: Plan, kind: TaskType, teacher: nn.Module | None, **options: Any) -> None:
        self.plan, self.kind, self.teacher = plan, kind, teacher
        super().__init__(**options)
        self.remove_callback(ProgressCallback)
        self.model_accepts_loss_kwargs = False  # the loss is a batch's mean
        if teacher is not None:
            teacher.to(self.args.device).eval().requires_grad_(False)

    def create_accelerator_and_postprocess(self) -> None:
        """As upstream, but FSDP where it was asked for, on CPUs, too."""
        with shards.accelerate_takes_ddp_for_fsdp_on_cpus():
            super().create_accelerator_and_postprocess()
        assert self.is_fsdp_enabled == (self.plan.section.shard == "fsdp2")

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        """The task's loss; of a training step with a teacher, mixed with the distance to its logits."""
        given = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        found = model(**given)
        loss = self.kind.loss(found, inputs["labels"])
        wanted = self.plan.section.distill
        if self.teacher is not None and wanted and model.training:
            distance = self._distance(found, given, inputs["labels"])
            loss = wanted.weight * distance + (1 - wanted.weight) * loss
        return (loss, found) if return_outputs else loss

    def _distance(self, found: Any, given: dict[str, Tensor], labels: Tensor) -> Tensor:
        """ModelOpt's loss on logits. Its KDTrainer shifts them as a language model's, whatever they are."""
        from modelopt.torch.distill.losses import LogitsDistillationLoss

        assert self.teacher is not None
        assert self.plan.section.distill is not None
        with torch.no_grad(), self.accelerator.autocast():
            taught = self.teacher(**given)
        criterion = LogitsDistillationLoss(self.plan.section.distill.temperature, reduction="batchmean")
        student, teacher = (self.kind.scores(logits, labels).float() for logits in (found, taught))
        distance: Tensor = criterion(student, teacher)
        return distance

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The validation loss; with early stopping the weights of the lowest are kept."""
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        losses = validation_losses(self.state.log_history)
        if self.plan.section.early_stopping and losses.index(min(losses)) == len(losses) - 1:
            self._write(self.plan.folder / "best.safetensors")
        return metrics

    def sample(self) -> dict[str, Tensor]:
        """The inputs of a few rows, where the network is."""
        batch = self.data_collator(list(self.train_dataset)[:8])
        return {name: tensor.to(self.args.device) for name, tensor in batch.items() if name != "labels"}

    def weights(self) -> dict[str, Tensor]:
        """Every tensor, whole, on the CPU, in the first process; all must ask."""
        found = {}
        for name, tensor in self.model.state_dict().items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.args.should_save:
                found[name] = whole.detach().cpu().contiguous().clone()
        return found

    def _write(self, file: Path) -> None:
        """Every tensor as it is; `save_pretrained` would rename some and leave masks out."""
        weights = self.weights()
        if self.args.should_save:
            file.parent.mkdir(parents=True, exist_ok=True)
            write(weights, file)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return Order(self)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The weights of a checkpoint."""
        assert output_dir is not None
        self._write(Path(output_dir) / "model.safetensors")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            resume.finish(self.plan.folder / f"checkpoint-{self.state.global_step}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Every process reads the file and keeps its part."""
        whole = load_file(Path(resume_from_checkpoint) / "model.safetensors")
        own = self.model.state_dict()
        self.model.load_state_dict({name: shards.part(whole.pop(name), own[name]) for name in own})

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")
        shards.save(self.optimizer, Path(output_dir) / f"optimizer_{self.args.process_index}.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))
        shards.load(self.optimizer, Path(checkpoint) / f"optimizer_{self.args.process_index}.pt")


class Order(Sampler[int]):
    """The rows of an epoch, by seed and epoch alone, so that a resumed one meets the same.

    Texts of like length share a batch: half of the time would go into padding. Pairs do not: an image finds
    its text among those of its batch, which would be of few kinds.
    """

    def __init__(self, tuner: Tuner) -> None:
        rows = tuner.train_dataset
        self.tuner, self.count = tuner, len(rows)
        texts = tuner.kind.COLUMN == "text"
        self.lengths = [len(row["input_ids"]) for row in rows] if texts else None

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        section, epoch = self.tuner.plan.section, int(self.tuner.state.epoch or 0)
        draw = torch.Generator().manual_seed(section.seed * 1_000_003 + epoch)
        if self.lengths is None:
            return iter(torch.randperm(self.count, generator=draw).tolist())
        together = section.batch_size * section.accumulate
        return iter(get_length_grouped_indices(self.lengths, together, generator=draw))


class Clock(TrainerCallback):  # type: ignore[misc]
    """When to look at the validation rows, when to save, and when there is no use in going on."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.saved = plan, time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> Any:
        """Sets what the Trainer does after this step."""
        done = state.global_step >= self.plan.steps
        if self.plan.validates and (done or state.global_step % self.plan.every == 0):
            control.should_evaluate = True
        if not done and self._save_now(state.global_step):
            # With its log, so that a resumed training's curve is the uninterrupted one's.
            control.should_save = control.should_log = True
            self.saved = time.monotonic()
        return control

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> Any:
        """Stop early after so many evaluations without a lower loss."""
        losses, patience = validation_losses(state.log_history), self.plan.section.early_stopping
        if patience and len(losses) - 1 - losses.index(min(losses)) >= patience:
            control.should_training_stop = True
        return control

    def _save_now(self, step: int) -> bool:
        """Every so many steps, or by the first process's clock."""
        if self.plan.section.save_steps:
            return step % self.plan.section.save_steps == 0
        due = time.monotonic() - self.saved > SAVE_SECONDS
        return bool(broadcast_object_list([due])[0])


class Bar(ProgressCallback):  # type: ignore[misc]
    """One progress bar; the losses go to whoever listens, not between the bar's lines."""

    def __init__(self, tell: Tell) -> None:
        super().__init__()
        self.tell = tell

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """No bar of its own for the validation rows."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Tell of the losses."""
        if state.is_world_process_zero and (values := losses(logs or {})):
            self.tell(state.global_step, values)


def losses(entry: dict[str, float]) -> dict[str, float]:
    """The losses in a line of the Trainer's log, by our names."""
    names = {"loss": "loss", "eval_loss": "validation_loss"}
    return {ours: float(entry[theirs]) for theirs, ours in names.items() if theirs in entry}


def validation_losses(history: Sequence[dict[str, float]]) -> list[float]:
    """The validation losses so far, in order."""
    return [entry["eval_loss"] for entry in history if "eval_loss" in entry]


def write(tensors: dict[str, Tensor], file: Path) -> None:
    """A safetensors file that appears whole or not at all."""
    save_file(tensors, file.with_suffix(".part"))
    file.with_suffix(".part").replace(file)
