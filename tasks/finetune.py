"""Fine-tune with the Hugging Face Trainer: the FP32 baseline, and again with mask and quantizers on (QAT).

python -m flows optimize RECIPE     (stage `fine-tune`, up to twice; with compare_dense four times)
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable

from recipes.compress import Finetune
from tasks import batches, checkpoints, processes, resume, store
from tasks.artifacts import Checkpoint, Dataset
from tasks.errors import InputError
from tasks.stage import stage, tell
from tasks.training import Job, described, train

DAY = 24 * 3600


def _processes(
    checkpoint: Checkpoint, dataset: Dataset, section: Finetune, teacher: Checkpoint | None = None
) -> int:
    """A GPU each."""
    return section.processes


@stage(
    uses=("torch", "transformers", "accelerate", "nvidia-modelopt", "peft"),
    name="fine-tune",
    gpu=_processes,
    timeout_seconds=DAY,
)
def finetune(
    checkpoint: Checkpoint, dataset: Dataset, section: Finetune, teacher: Checkpoint | None = None
) -> Checkpoint:
    """Train on the train rows; whatever mask and quantizers the checkpoint has stay on.

    Raises RuntimeError when training lost a 2:4 mask or changed a quantizer. The teacher is for
    `section.distill`.
    """
    assert (teacher is not None) == (section.distill is not None)
    key, what = finetune.key(checkpoint, dataset, section, teacher), described(checkpoint)
    with resume.held(key) as place, store.staging() as folder:
        run = train if section.processes == 1 else processes.train
        trained = run(
            Job(checkpoint, dataset, section, teacher, place),
            lambda step, losses: tell(key, what, step, losses),
        )
        model, config = checkpoints.restore(checkpoint)
        before = checkpoints.sparsity(model)
        model.load_state_dict(trained.weights)
        if checkpoints.sparsity(model) != before:
            raise RuntimeError("training changed the 2:4 mask")
        shutil.copytree(batches.preprocessor(checkpoint), folder / "preprocessor")
        facts = {**checkpoint.facts, "curve": trained.curve, "training": trained.facts}
        saved = checkpoints.save(model, config, folder, dataset.type, facts)
        tell(key, what, trained.facts["steps"], {})
        return saved


def check_training(sections: Iterable[Finetune | None]) -> None:
    """Raises InputError for what this machine cannot train."""
    asked = [section for section in sections if section]
    if all(section.precision == "fp32" and section.processes == 1 for section in asked):
        return
    import torch

    gpus = torch.cuda.device_count()
    for section in asked:
        if section.precision == "fp16" and not gpus:
            raise InputError(
                "precision: fp16 needs a GPU, and there is none here: use bf16, which a CPU can do, or fp32"
            )
        if section.precision == "bf16" and gpus and not torch.cuda.is_bf16_supported():
            raise InputError(f"precision: bf16 is not for {torch.cuda.get_device_name()}: use fp16 or fp32")
        if gpus and section.processes > gpus:
            raise InputError(f"processes: {section.processes} need as many GPUs, there are {gpus}")
