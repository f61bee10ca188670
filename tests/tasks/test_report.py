from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib import image

from recipes.gate import Gate
from tasks.artifacts import Rule, Verdict
from tasks.gate import judge
from tasks.measurements import Measured, Measurements
from tasks.report import BAD, GOOD, plot, report

SECTION = Gate(
    max_drop=0.02,
    max_forgetting=0.02,
    floors={"label": {"a": 0.5}},
    max_size_ratio=0.6,
    max_latency_ratio=0.9,
    min_parity=0.9,
)


def measurements(losses: int) -> Measurements:
    right = np.arange(1000) < 900
    wrong = right ^ (np.arange(1000) < losses)
    rounds = np.full((8, 3), 0.01) * np.linspace(1, 1.1, 8)[:, None]
    engines = {
        "candidate": Measured(
            "executed", wrong.astype(float), bytes=50, parity=0.99, latency={4: rounds / 2}
        ),
        "baseline": Measured("executed", right.astype(float), bytes=100, latency={4: rounds}),
        "champion": Measured("executed", right.astype(float), bytes=50, latency={4: rounds / 2}),
    }
    previous = Measurements("accuracy", {name: engines[name] for name in ("candidate", "champion")})
    return Measurements("accuracy", engines, {"label": ["a", "b"] * 500}, previous=previous)


def colours(path: Path) -> set[str]:
    pixels = np.rint(255 * image.imread(path)[..., :3]).astype(int) @ [65536, 256, 1]
    return {f"#{pixel:06x}" for pixel in np.unique(pixels)}


@pytest.mark.parametrize(("losses", "word"), [(2, "passed"), (50, "refused")])
def test_the_report_says_every_rule_and_shows_the_verdict(tmp_path: Path, losses: int, word: str) -> None:
    found = measurements(losses)
    verdict = judge(found, SECTION)
    text_file, picture = report(verdict, found, SECTION, tmp_path / "new", "demo")
    text = text_file.read_text()
    assert text.startswith(f"# demo: {word}\n")
    assert all(rule.sentence in text for rule in verdict.rules)
    assert "| candidate | 4 | 5.250 ms |" in text
    assert "| `forgetting` | " in text
    assert (GOOD in colours(picture), verdict.passed) == (True, word == "passed")


def test_the_rules_in_the_report_are_the_recipes(tmp_path: Path) -> None:
    text = report(judge(measurements(2), SECTION), measurements(2), SECTION, tmp_path, "demo")[0].read_text()
    section = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert Gate(**section["gate"]) == SECTION


def test_the_same_verdict_draws_the_same_picture(tmp_path: Path) -> None:
    verdict = judge(measurements(50), SECTION)
    for name in ("a.png", "b.png"):
        plot(verdict, tmp_path / name, "demo")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert BAD in colours(tmp_path / "a.png")


def test_a_verdict_with_nothing_to_draw_still_says_why(tmp_path: Path) -> None:
    verdict = Verdict(False, (Rule("evidence", False, "the candidate did not run on its target"),))
    plot(verdict, tmp_path / "a.png", "demo")
    assert BAD in colours(tmp_path / "a.png")
