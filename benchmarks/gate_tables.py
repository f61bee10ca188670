"""What the parts of `benchmarks.gate` share: how many trials, and tables in Markdown."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

TRIALS, CONFIDENCE = 2000, 0.95
Table = Iterator[list[str]]


def percent(values: Any) -> str:
    """A share of trials."""
    return f"{100 * float(np.mean(values)):.1f} %"


def table(title: str, rows: Table) -> None:
    """One Markdown table."""
    began = time.perf_counter()
    head, *body = list(rows)
    print(f"\n### {title}\n")
    for row in (head, ["--:"] * len(head), *body):
        print(f"| {' | '.join(row)} |")
    print(f"\n{time.perf_counter() - began:.0f} s", flush=True)


def shares(refused: Any, coarse: Any) -> str:
    """By the interval, as too coarse, for either reason."""
    text = " / ".join(percent(x) for x in (refused, coarse, refused | coarse))
    return f"**{text}**" if refused.mean() <= 1 - CONFIDENCE else text
