"""What the gate's rules share: the words of their sentences, and the rule that could not be evaluated."""

from __future__ import annotations

import re
from math import isclose, isfinite
from typing import Any

from recipes.gate import Gate
from tasks.artifacts import Rule
from tasks.metrics import Metric


def missing(name: str, what: str, why: str, gate: Gate) -> Rule:
    """A rule without its measurement; `on_missing` says whether that is a refusal."""
    sentence = f"{what} could not be evaluated: {why} (on_missing: {gate.on_missing})"
    return Rule(name, gate.on_missing == "pass", sentence, facts={"missing": True})


def word(how: Metric) -> str:
    """The metric's name as rule names and logged keys carry it."""
    return re.sub(r"[^A-Za-z0-9_]+", "_", how.name)


def bound(least: bool, unit: str) -> dict[str, Any]:
    """Which side of its limit a rule allows, and in what unit: for whoever draws it."""
    return {"bound": "at least" if least else "at most", "unit": unit}


def percent(confidence: float) -> str:
    """0.95 as 95 %."""
    return f"{100 * confidence:g} %"


def span(gate: Gate, ends: tuple[float, float], told: list[str]) -> str:
    """An interval in words; `told` are its ends as the sentence writes them."""
    words = " to ".join(told) if all(map(isfinite, ends)) else "without bounds"
    return f"{percent(gate.confidence)} interval {words}"


def texts(values: list[float], digits: int = 1) -> list[str]:
    """Numbers with just enough decimals that the last, a limit, is exact and looks equal to no other, and
    that the others do not all look like nothing.
    """
    limit, others = values[-1], [abs(x) for x in values[:-1]]
    for more in range(digits, digits + 4):
        found = [f"{x:.{more}f}" for x in values]
        exact = isclose(float(found[-1]), limit)
        if exact and all(isclose(x, limit) or f"{x:.{more}f}" != found[-1] for x in others):
            break
    largest = max((x for x in others if isfinite(x)), default=0.0)
    while largest >= 5e-9 and float(f"{largest:.{more}f}") == 0:
        more += 1
        found = [f"{x:.{more}f}" for x in values]
    return found
