"""A network past protobuf's 2 GB, for real: `benchmarks.large`, whose table must hold what docs say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_network_past_2_gb_goes_through_with_at_most_three_copies_in_memory(tmp_path: Path) -> None:
    """From its folder to a promoted engine, a refit, a prediction and verified digests; 12 GB of memory."""
    command = [sys.executable, "-m", "benchmarks.large", "--out", str(tmp_path / "large")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(re.findall(r"weights: ([\d,]+) bytes", done.stdout)[0].replace(",", "")) > 1 << 31
    found = re.findall(r"^\| ([\w ,]+) \| ([\d.]+) \|", done.stdout, re.MULTILINE)
    assert {"export", "build", "evaluate", "refit", "predict", "verify"} <= {name for name, _ in found}
    assert max(float(copies) for _, copies in found) <= 3
    assert not (tmp_path / "large").exists()
