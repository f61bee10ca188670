"""One training in this process, alone or as one of several: rows and network in, weights and curve out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.compress import Finetune
from tasks import batches, checkpoints, resume, types
from tasks.artifacts import Checkpoint, Dataset, Facts

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import TrainingArguments

    from tasks.trainer import Plan, Tell

FIXED = ("._weight_mask", "._amax", "._pre_quant_scale")
"""Buffers that no training may change: masks, ranges, and what SmoothQuant and AWQ moved."""


@dataclass(frozen=True)
class Job:
    """What is trained on what, how, and where it keeps its place."""

    checkpoint: Checkpoint
    dataset: Dataset
    section: Finetune
    teacher: Checkpoint | None
    folder: Path


@dataclass(frozen=True)
class Trained:
    """Every tensor (in the first process), the losses by step, and how it went."""

    weights: dict[str, Tensor]
    curve: list[dict[str, float]]
    facts: Facts


def train(job: Job, tell: Tell) -> Trained:
    """Train to the end, from the last whole checkpoint in the job's folder where there is one.

    Raises RuntimeError when training changed a mask, a range or the set of quantizers.
    """
    from safetensors.torch import load_file

    from tasks import lora, trainer

    model, _ = checkpoints.restore(job.checkpoint)
    before = checkpoints.quantizers(model), fixed(model)
    if job.section.lora:
        model = lora.attach(model, job.section.lora, job.section.seed)
    teacher = checkpoints.restore(job.teacher)[0] if job.teacher else None
    parts = [name for name in ("train", "validation") if name in job.dataset.rows]
    sets = {name: examples(job.checkpoint, job.dataset, name) for name in parts}
    plan = _plan(job, len(sets["train"]))
    last = resume.last(job.folder)
    tuner = trainer.Tuner(
        plan,
        types.load(job.dataset.type),
        teacher,
        model=model,
        args=arguments(plan, "validation" in sets and last is None),
        train_dataset=sets["train"],
        eval_dataset=sets.get("validation"),
        data_collator=Collator(job.dataset.type),
    )
    for callback in (trainer.Bar(tell), trainer.Clock(plan)):
        tuner.add_callback(callback)
    tuner.train(resume_from_checkpoint=str(last) if last else None)
    # Else bf16 and fp16 stay wrapped around `forward`, and merged adapters seem to be off by their rounding.
    whole = tuner.accelerator.unwrap_model(tuner.model, keep_fp32_wrapper=False)
    if (checkpoints.quantizers(whole), fixed(whole)) != before:
        raise RuntimeError("training changed the 2:4 mask, a range or the set of quantizers")
    best = job.folder / "best.safetensors"
    weights = load_file(best) if best.is_file() else tuner.weights()
    if job.section.lora and weights:
        whole.load_state_dict(weights)
        weights = lora.merged(whole, tuner.kind, tuner.sample())
    curve = merged(tuner.state.log_history)
    return Trained(weights, curve, _facts(plan, curve, tuner.state.global_step, last))


def examples(checkpoint: Checkpoint, dataset: Dataset, part: str) -> list[dict[str, Any]]:
    """The encoded rows of a part with their labels."""
    encoded, labels = batches.examples(dataset, part, batches.preprocessor(checkpoint))
    known = labels if len(labels) else np.zeros(len(encoded), np.int64)
    return [{**example, "label": int(k)} for example, k in zip(encoded, known, strict=True)]


def fixed(model: nn.Module) -> str:
    """Digest of the buffers that stay as they are."""
    kept = {name: tensor for name, tensor in model.named_buffers() if name.endswith(FIXED)}
    content = hashlib.sha256()
    for name, tensor in sorted(kept.items()):
        content.update(name.encode())
        content.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return content.hexdigest()


def _plan(job: Job, rows: int) -> Plan:
    from tasks.trainer import Plan

    section = job.section
    steps = max(1, round(section.epochs * -(-rows // (section.batch_size * section.accumulate))))
    return Plan(section, steps, "validation" in job.dataset.rows, job.folder)


def arguments(plan: Plan, look_first: bool) -> TrainingArguments:
    """The Trainer's own settings; what to do when is `trainer.Clock`'s."""
    from transformers import TrainingArguments

    section, cpu = plan.section, checkpoints.device() == "cpu"
    sharded: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "NO_WRAP"}}
    given = TrainingArguments(
        output_dir=str(plan.folder),
        max_steps=plan.steps,
        per_device_train_batch_size=section.batch_size // section.processes,
        per_device_eval_batch_size=section.batch_size // section.processes,
        gradient_accumulation_steps=section.accumulate,
        learning_rate=section.learning_rate,
        warmup_steps=int(section.warmup_ratio * plan.steps),
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        bf16=section.precision == "bf16",
        fp16=section.precision == "fp16",
        seed=section.seed,
        eval_on_start=look_first,
        prediction_loss_only=True,
        label_names=["labels"],
        save_strategy="no",
        logging_steps=max(1, plan.steps // 50),
        report_to=[],
        disable_tqdm=False,
        remove_unused_columns=False,
        dataloader_pin_memory=not cpu,
        use_cpu=cpu,
        **({"ddp_backend": "gloo"} if cpu and section.processes > 1 else {}),
        **(sharded if section.shard == "fsdp2" else {}),
    )
    given._n_gpu = min(given.n_gpu, 1)  # one process takes one GPU, not DataParallel over all that it sees
    return given


class Collator:
    """Rows to a batch of tensors, with what the loss compares with as `labels`."""

    def __init__(self, task: str) -> None:
        self.kind = types.load(task)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch."""
        batch = self.kind.collate(rows)
        labels = np.array([row["label"] for row in rows])
        return batches.tensors({**batch, "labels": self.kind.targets(batch, labels)})


def described(checkpoint: Checkpoint) -> str:
    """What of the network is compressed, in a few words: `dense`, `2:4`, `2:4 int8`."""
    words = ["2:4"] * bool(checkpoint.facts.get("sparsity")) + [str(checkpoint.facts.get("format", ""))]
    return " ".join(filter(None, words)) or "dense"


def merged(history: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """The losses by step: [{step, loss, validation_loss}], each where it was taken."""
    from tasks.trainer import losses

    points: dict[int, dict[str, float]] = {}
    for entry in history:
        if found := losses(entry):
            points.setdefault(int(entry["step"]), {}).update(found)
    return [{"step": step, **points[step]} for step in sorted(points)]


def _facts(plan: Plan, curve: list[dict[str, float]], steps: int, last: Path | None) -> Facts:
    """Steps planned and done, and of the validation loss the first, the lowest and the last."""
    facts: Facts = {"steps": steps, "planned_steps": plan.steps}
    if last is not None:
        facts["resumed_from_step"] = resume.step(last)
    seen = [point for point in curve if "validation_loss" in point]
    if seen:
        best = min(seen, key=lambda point: point["validation_loss"])
        facts |= {
            "validation_loss": {"first": seen[0]["validation_loss"], "last": seen[-1]["validation_loss"]},
            "best": {"step": best["step"], "validation_loss": best["validation_loss"]},
            "kept": "best" if plan.section.early_stopping else "last",
        }
    return facts
