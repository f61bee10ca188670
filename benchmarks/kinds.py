"""The table of docs/models.md: recipes through the whole pipeline, a line each.

python -m benchmarks.kinds RECIPE … [--set section.key=value …]

The metric is of the engines, over every held-out row; a recipe with `qat` also runs without it, which gives
the numbers after calibration alone. Bytes are of plan and weights. Seconds stand in the gate's report.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from flows.judge import Outcome

HEAD = """\
| recipe | metric, rows | FP32 | calibrated | after QAT | MB, FP32 and quantized | engine | verdict |
|---|---|--:|--:|--:|--:|---|---|"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipes and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="+", metavar="RECIPE")
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args(arguments)
    rows = [row(recipe, options.set) for recipe in options.recipes]
    print("\n".join([HEAD, *rows]))


def row(recipe: str, overrides: Sequence[str]) -> str:
    """One recipe's line; its models are registered, and the alias is left alone."""
    import recipes
    from flows.optimize import optimize
    from tasks import store

    store.prepare()
    whole = recipes.load(recipe, overrides)
    manual = [*overrides, "promote=manual"]
    done = optimize(recipe, manual)
    before = optimize(recipe, [*manual, "qat=null"]) if whole.qat else None
    return line(done, before)


def line(done: Outcome, calibrated: Outcome | None) -> str:
    """An outcome in the table's words; `calibrated` is the same without the second training."""
    assert done.attempt is not None
    recipe, engine = done.attempt.recipe, done.attempt.engines["candidate"]
    metric = recipe.gate.metric
    share = engine.facts.get("proof", {}).get("quantized_share")
    ran = f"{engine.plan.runtime} {engine.plan.version}, {engine.proved}"
    cells = [
        f"`{done.recipe}`",
        f"`{metric}`, {done.attempt.dataset.rows['test']:,}",
        _number(done, f"baseline_{metric}"),
        _number(calibrated or done, f"candidate_{metric}"),
        _number(done, f"candidate_{metric}") if calibrated else "-",
        ", ".join(f"{done.attempt.engines[name].bytes / 1e6:.2f}" for name in ("baseline", "candidate")),
        ran + (f"; {share:.1%} of the products in integers" if share is not None else ""),
        done.verdict,
    ]
    return f"| {' | '.join(cells)} |"


def _number(outcome: Outcome, name: str) -> str:
    return f"{outcome.metrics[name]:.4f}" if name in outcome.metrics else "-"


if __name__ == "__main__":
    main()
