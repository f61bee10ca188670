from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from recipes.compress import Finetune
from tasks import stage as stages
from tasks import store
from tasks.artifacts import Blob, Checkpoint, Dataset
from tasks.engines import tensorrt_api
from tasks.finetune import finetune
from tasks.handover import handover
from tasks.slots import making, slot

ROOT = Path(__file__).resolve().parent.parent.parent
CODE = """
import sys, time
from tasks.slots import slot
with slot("gpu-test"):
    with open(sys.argv[1], "a") as log:
        log.write("in\\n"); log.flush(); time.sleep(0.5); log.write("out\\n")
"""


@pytest.mark.slow
def test_two_processes_hold_a_device_one_after_the_other(tmp_path: Path) -> None:
    log = tmp_path / "log"
    both = [subprocess.Popen([sys.executable, "-c", CODE, str(log)], cwd=ROOT) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert log.read_text().split() == ["in", "out", "in", "out"]


def test_a_slot_is_free_again_after_an_error() -> None:
    for _ in range(2):
        try:
            with slot("gpu-test"):
                raise RuntimeError
        except RuntimeError:
            pass


ALONE = """
import sys, time
from tasks.slots import alone
with alone("retrain-model"):
    print(time.monotonic(), flush=True); time.sleep(float(sys.argv[1])); print(time.monotonic(), flush=True)
"""


@pytest.mark.slow
def test_a_second_retrain_of_a_model_says_that_it_waits_and_waits() -> None:
    def start(seconds: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", ALONE, seconds],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    first = start("3")
    assert first.stdout is not None
    assert first.stdout.readline()
    second = start("0")
    came, told = second.communicate(timeout=120)
    assert told.count("another process is at it; waiting") == 1
    assert float(came.split()[0]) >= float(first.communicate(timeout=60)[0]), "the second did not wait"


MAKING = """
import time
from tasks.slots import making
with making("probe", "key"):
    print("held", flush=True); time.sleep(60)
"""


def test_the_key_of_a_killed_process_is_free(fresh_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    with subprocess.Popen([sys.executable, "-c", MAKING], cwd=ROOT, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"

        def say(line: str) -> None:
            told.append(line)
            holder.kill()

        monkeypatch.setattr(stages, "say", say)
        with making("probe", "key"):
            assert holder.wait(10) < 0
    assert len(told) == 1
    with making("probe", "key"):
        pass
    assert len(told) == 1


class Waits(Exception):
    """What was said of the wait, and which GPUs were held then."""


CHECKPOINT = Checkpoint(Blob("a" * 64, 3), "causal-lm", "same")
DATASET = Dataset(Blob("b" * 64, 3), "causal-lm", (), {}, {})


@pytest.fixture
def gpus(fresh_home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, FileLock]:
    """The locks of the GPUs of a host, where who waits for one gives up."""
    locks = {name: FileLock(store.prepare() / f"gpu-{name}.lock") for name in "0123457"}

    def say(line: str) -> None:
        if "waiting" in line:
            raise Waits(line, held(locks))

    monkeypatch.setattr(stages, "say", say)
    monkeypatch.setattr(tensorrt_api, "gpu", lambda: tensorrt_api.Gpu("NVIDIA H100 80GB HBM3", (9, 0)))
    return locks


def held(locks: dict[str, FileLock]) -> str:
    return "".join(name for name, lock in locks.items() if lock.is_locked or not _free(lock))


def _free(lock: FileLock) -> bool:
    try:
        with lock.acquire(timeout=0):
            return True
    except Timeout:
        return False


@pytest.mark.parametrize(
    ("seen", "busy", "first"), [("7,2,5,3,1", "7", "2357"), ("", "3", "0123"), ("7,2,5,3,1", "2", "2")]
)
def test_a_training_holds_a_gpu_for_each_process_and_takes_them_in_one_order(
    gpus: dict[str, FileLock], monkeypatch: pytest.MonkeyPatch, seen: str, busy: str, first: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    section = Finetune(epochs=1, batch_size=4, processes=4)
    with gpus[busy], pytest.raises(Waits, match=f"gpu-{busy}: another process works on it") as waited:
        finetune(CHECKPOINT, DATASET, section)
    assert waited.value.args[1] == first
    assert held(gpus) == ""


def test_handing_over_holds_the_gpu(gpus: dict[str, FileLock], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with gpus["1"], pytest.raises(Waits):
        handover(CHECKPOINT, DATASET)
