"""When calibration's scales have settled: how far they still move as rows are added.

python -m benchmarks.calibration RECIPE [--set section.key=value …]     (starts from the untrained weights)

For 8, 16, 32 … rows up to `data.split.calibration`: the median and the largest relative change of the
activations' ranges against the count before. Below a percent, more rows buy nothing.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

import recipes
from recipes.compress import Quantize
from tasks import batches, checkpoints, store
from tasks.artifacts import Checkpoint, Dataset
from tasks.calibrate import quantized
from tasks.load import content, fingerprint, load_data, load_model


def main() -> None:
    """Parse, run, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    given = parser.parse_args()
    recipe = recipes.load(given.recipe, given.overrides)
    assert recipe.quantize, f"{given.recipe} quantizes nothing"
    store.prepare()
    found = fingerprint(recipe.model.source, recipe.model.revision)
    data = load_data.fn(recipe.data, recipe.task, content(recipe.data))
    start = load_model.fn(recipe.model, recipe.data, recipe.task, found, recipe.data.split.seed)
    print("| rows | median change | largest change | of |\n|--:|--:|--:|---|")
    for line in sweep(start, data, recipe.quantize):
        print(f"| {line['rows']} | {line['median']:.4f} | {line['largest']:.4f} | {line['of']} |")


def sweep(start: Checkpoint, data: Dataset, section: Quantize) -> list[dict[str, Any]]:
    """For each count of rows: how far ranges moved since the count before, and which one moved most."""
    found: list[dict[str, Any]] = []
    before: dict[str, float] = {}
    for rows in counts(data.rows["calibration"]):
        now = ranges(start, data, section, rows)
        if before:
            moved = {name: abs(value - before[name]) / before[name] for name, value in now.items()}
            worst = max(moved, key=lambda name: moved[name])
            middle = float(np.median(list(moved.values())))
            found.append({"rows": rows, "median": middle, "largest": moved[worst], "of": worst})
        before = now
    return found


def counts(most: int) -> list[int]:
    """8, 16, 32 … and all."""
    return [*(8 << k for k in range(32) if 8 << k < most), most]


def ranges(start: Checkpoint, data: Dataset, section: Quantize, rows: int) -> dict[str, float]:
    """The activations' ranges after so many calibration rows."""
    model, _ = checkpoints.restore(start)
    size = min(section.batch_size, rows)
    loop = batches.forward_loop(data, batches.preprocessor(start), size, f"{rows} rows", rows)
    model = quantized(model, section, loop)
    names = [name for name in checkpoints.quantizers(model) if not name.endswith("weight_quantizer")]
    found: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    return {name: float(quantizer.amax) for name, quantizer in found.items()}


if __name__ == "__main__":
    main()
