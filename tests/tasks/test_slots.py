from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tasks.slots import slot

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
