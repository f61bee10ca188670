"""One training as several processes of this host: `torchrun` starts `python -m tasks.processes JOB` in each.

They compute on a GPU each, or on CPUs with gloo. What they say of losses comes back by a file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.compress import Finetune
from tasks import children, training
from tasks.artifacts import Blob, Checkpoint, Dataset
from tasks.errors import InputError
from tasks.training import Job, Trained

if TYPE_CHECKING:
    from tasks.trainer import Tell

ROOT = Path(__file__).resolve().parent.parent
TOLD, RESULT, WEIGHTS, ERROR = "told.jsonl", "trained.json", "trained.safetensors", "error.txt"


def train(job: Job, tell: Tell) -> Trained:
    """Train in `section.processes` processes; InputError is theirs, RuntimeError when one failed."""
    from safetensors.torch import load_file

    for name in (TOLD, RESULT, WEIGHTS, ERROR):
        (job.folder / name).unlink(missing_ok=True)
    order = job.folder / "job.json"
    order.write_text(json.dumps(_to_json(job)))
    count = job.section.processes
    launcher = ["torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command = [sys.executable, "-m", *launcher, f"--nproc-per-node={count}", "-m", "tasks.processes"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)), **os.environ}
    process = subprocess.Popen(
        [*command, str(order)],
        env=environment | {"PYTHONPATH": path},
        preexec_fn=children.end_with_the_parent,
    )
    try:
        for step, losses in _told(job.folder / TOLD, process):
            tell(step, losses)
    finally:
        _end(process)
    if (job.folder / ERROR).is_file():
        raise InputError((job.folder / ERROR).read_text())
    if process.returncode or not (job.folder / RESULT).is_file():
        raise RuntimeError(f"training in {count} processes ended with status {process.returncode}; see above")
    content = json.loads((job.folder / RESULT).read_text())
    return Trained(load_file(job.folder / WEIGHTS), content["curve"], content["facts"])


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the launcher, which ends the others, if it still runs."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _told(file: Path, process: subprocess.Popen[bytes]) -> Iterator[tuple[int, dict[str, float]]]:
    """The lines of the file as they come, until the process has ended."""
    seen, ended = 0, False
    while not ended:
        ended = process.poll() is not None
        text = file.read_text() if file.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        for line in whole[seen:].splitlines():
            step, losses = json.loads(line)
            yield step, losses
        seen = len(whole)
        if not ended:
            time.sleep(0.5)


def _to_json(job: Job) -> dict[str, Any]:
    return {
        "checkpoint": asdict(job.checkpoint),
        "dataset": asdict(job.dataset),
        "section": job.section.model_dump(mode="json") | {"save_steps": job.section.save_steps},
        "teacher": asdict(job.teacher) if job.teacher else None,
        "folder": str(job.folder),
    }


def _from_json(content: dict[str, Any]) -> Job:
    def blob(artifact: dict[str, Any]) -> dict[str, Any]:
        return {**artifact, "blob": Blob(**artifact["blob"])}

    return Job(
        Checkpoint(**blob(content["checkpoint"])),
        Dataset(**blob(content["dataset"])),
        Finetune.model_validate(content["section"]),
        Checkpoint(**blob(content["teacher"])) if content["teacher"] else None,
        Path(content["folder"]),
    )


def _main(order: Path) -> None:
    """One of the processes."""
    import torch

    from tasks.trainer import write

    job = _from_json(json.loads(order.read_text()))
    told = (job.folder / TOLD).open("a", buffering=1)
    try:
        trained = training.train(job, lambda step, losses: print(json.dumps([step, losses]), file=told))
        if torch.distributed.get_rank() == 0:
            write(trained.weights, job.folder / WEIGHTS)
            (job.folder / RESULT).write_text(json.dumps({"curve": trained.curve, "facts": trained.facts}))
        torch.distributed.barrier()
    except InputError as error:
        (job.folder / ERROR).write_text(str(error))
        raise
    finally:
        told.close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
