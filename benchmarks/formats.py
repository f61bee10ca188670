"""Every post-training format: accuracy before and after, ONNX bytes, evidence per runtime, seconds.

python -m benchmarks.formats digits          (the CNN of digits-cnn-int8-ptq, trained first; minutes)
python -m benchmarks.formats RECIPE --start  (a recipe's model as it starts, not trained: bytes and parity)
python -m benchmarks.formats RECIPE --set data.split.test=1500

Accuracy is over the recipe's whole test split, on the exported graph in ONNX Runtime without optimization;
cosine is of its logits to those of the FP32 network. The table for docs/formats.md goes to stdout.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import recipes
from recipes.build import Build, Export
from recipes.compress import Quantize
from tasks import batches, store
from tasks.artifacts import Checkpoint, Dataset, Engine, OnnxModel
from tasks.build import build, host, installed
from tasks.calibrate import calibrate
from tasks.engines import onnxruntime
from tasks.errors import InputError
from tasks.export import export
from tasks.finetune import finetune
from tasks.load import content, fingerprint, load_data, load_model

SECTIONS: dict[str, dict[str, Any]] = {
    "int8 max": {"format": "int8"},
    "int8 entropy": {"format": "int8", "algorithm": "entropy"},
    "int8 percentile 99.99": {"format": "int8", "algorithm": "percentile"},
    "int8 smoothquant": {"format": "int8", "algorithm": "smoothquant"},
    "int8-weight-only": {"format": "int8-weight-only"},
    "fp8": {"format": "fp8"},
    "fp8 with attention": {"format": "fp8", "attention": True},
    "int4": {"format": "int4"},
    "int4 awq": {"format": "int4", "algorithm": "awq"},
    "w4a8": {"format": "w4a8"},
    "w4a8 awq": {"format": "w4a8", "algorithm": "awq"},
}
COLUMNS = ("format", "accuracy", "cosine", "ONNX bytes", "ONNX Runtime CPU", "TensorRT-RTX", "seconds")


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--start", action="store_true", help="do not train first")
    parser.add_argument("--only", nargs="*", default=list(SECTIONS), help="some of the formats")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    given = parser.parse_args()
    name = "digits-cnn-int8-ptq" if given.recipe == "digits" else given.recipe
    recipe = recipes.load(name, given.overrides)
    store.prepare()
    found = fingerprint(recipe.model.source, recipe.model.revision)
    data = load_data.fn(recipe.data, recipe.task, content(recipe.data))
    start = load_model.fn(recipe.model, recipe.data, recipe.task, found, recipe.data.split.seed)
    if recipe.finetune and not given.start:
        start = finetune.fn(start, data, recipe.finetune)
    table(start, data, recipe.quantize.exclude if recipe.quantize else (), given.only)


def table(start: Checkpoint, data: Dataset, exclude: tuple[str, ...], wanted: list[str]) -> None:
    """A row for the network as it is, in FP16 and BF16, and for each format."""
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    plain = export.fn(start, data, Export(opset=22), "fp32")
    reference = logits(plain, start, data)
    row("fp32", lambda: start, data, reference, "fp32", "fp32")
    row("fp16", lambda: start, data, reference, "fp16", "fp16")
    row("bf16", lambda: start, data, reference, "bf16", "bf16")
    for name in wanted:
        section = Quantize(**SECTIONS[name], exclude=exclude)
        row(name, lambda: calibrate.fn(start, data, section), data, reference, "fp32", "fp16")  # noqa: B023


def row(
    name: str, make: Callable[[], Checkpoint], data: Dataset, reference: np.ndarray, cpu: Any, gpu: Any
) -> None:
    """One line of the table, or why there is none."""
    began = time.perf_counter()
    try:
        checkpoint = make()
        model = export.fn(checkpoint, data, Export(opset=22), cpu)
        seconds = time.perf_counter() - began
    except InputError as error:
        print(f"| {name} | refused: {error} |", flush=True)
        return
    try:
        got = logits(model, checkpoint, data)
        quality = [f"{accuracy(got, data, checkpoint):.4f}", f"{cosine(got, reference):.6f}"]
        there = told(build.fn(model, checkpoint, data, Build(), "onnxruntime", host("onnxruntime")))
    except InputError as error:
        quality, there = ["-", "-"], f"none: {str(error).splitlines()[0][-60:]}"
    rtx = on_tensorrt(checkpoint, data, gpu)
    size = f"{sum(file.stat().st_size for file in store.path(model.blob).iterdir()):,}"
    cells = [name, *quality, size, there, rtx, f"{seconds:.1f}"]
    print(f"| {' | '.join(cells)} |", flush=True)


def on_tensorrt(checkpoint: Checkpoint, data: Dataset, precision: Any) -> str:
    """What TensorRT for RTX proves here."""
    if installed("tensorrt-rtx") is None:
        return "not installed"
    model = export.fn(checkpoint, data, Export(opset=22), precision)
    settings = Build(runtime="tensorrt-rtx")
    try:
        engine = build.fn(model, checkpoint, data, settings, "tensorrt-rtx", host("tensorrt-rtx"))
    except InputError as error:
        return f"none: {str(error).splitlines()[0][:60]}"
    return told(engine)


def told(engine: Engine) -> str:
    """How far the proof goes, and the engine's bytes."""
    level = f" at {engine.facts['level']}" if "level" in engine.facts else ""
    return f"{engine.proved}{level}, {engine.bytes:,} bytes"


def logits(model: OnnxModel, checkpoint: Checkpoint, data: Dataset) -> np.ndarray:
    """Of every test row, by the graph as it is."""
    feed = batches.batches(data, "test", batches.preprocessor(checkpoint), 64)
    with onnxruntime.open(store.path(model.blob), None, level="disabled") as session:
        return np.concatenate([session.run(batch)["logits"] for batch in feed])


def accuracy(got: np.ndarray, data: Dataset, checkpoint: Checkpoint) -> float:
    """The share of test rows whose largest logit is the label's."""
    _, labels = batches.examples(data, "test", batches.preprocessor(checkpoint))
    return float((got.argmax(1) == labels).mean())


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Of all logits as one vector."""
    return float((one * other).sum() / (np.linalg.norm(one) * np.linalg.norm(other)))


if __name__ == "__main__":
    main()
