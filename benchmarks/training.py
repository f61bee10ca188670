"""What training with mask and quantizers on brings: the validation losses of a run, network by network.

python -m benchmarks.training RECIPE --set compare_dense=true [--set section.key=value …]

Runs the recipe (kept stages serve) and prints what its manifest's curves and its table say.
"""

from __future__ import annotations

import argparse

from flows.judge import Outcome
from tasks import store
from tasks.curves import curves, validation


def main() -> None:
    """Parse, run, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    given = parser.parse_args()
    store.prepare()
    from flows.optimize import optimize

    print("\n".join(table(optimize(given.recipe, given.overrides))))


def table(outcome: Outcome) -> list[str]:
    """Loss before and after, the lowest and its step, and the metric where an engine was made of it."""
    assert outcome.attempt is not None
    metric = outcome.attempt.recipe.gate.metric
    lines = [f"| network | before | after | lowest (step) | {metric} |", "|---|--:|--:|--:|--:|"]
    for name, curve in curves(outcome.attempt).items():
        if points := validation(curve):
            step, lowest = min(points, key=lambda point: point[1])
            value = outcome.metrics.get(f"{name}_{metric}")
            ends = f"{points[0][1]:.4f} | {points[-1][1]:.4f} | {lowest:.4f} ({step})"
            lines.append(f"| {name} | {ends} | {'' if value is None else f'{value:.4f}'} |")
    return lines


if __name__ == "__main__":
    main()
