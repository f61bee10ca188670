"""What a run prints at its end."""

from __future__ import annotations

import json
import math

from flows.judge import Outcome
from flows.summary import as_json
from tasks.artifacts import Version


def test_the_json_line_is_json_whatever_a_metric_gives() -> None:
    numbers = {"candidate_roc_auc": math.nan, "candidate_worst": math.inf, "candidate_bytes": 5.0}
    version = Version("m", "1", "run", "refused", None, "manifest.json")
    line = json.dumps(as_json(Outcome("refused", "r", version, ("why",), numbers)), allow_nan=False)
    assert json.loads(line)["metrics"] == dict(zip(numbers, (None, None, 5.0), strict=True))
