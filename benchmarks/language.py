"""A small language model: perplexity before and after training and in each format, and what a cache saves.

python -m benchmarks.language [RECIPE [section.key=value …]]

The recipe's network (`bytes-llama-int8-ptq`) as it starts, trained on its texts, then in each format;
perplexity is over all held-out texts on the built engine. `greedy` is the share of tokens that the engine and
the quantized PyTorch network both go on with. The last lines are seconds for one text, token by token, with a
cache by those without, in interleaved rounds. One machine, one seed.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import flows  # noqa: F401  the settings
import recipes
from recipes.build import Build, Export
from recipes.compress import Quantize
from tasks import batches, store, types
from tasks.agreement import agreement
from tasks.artifacts import Checkpoint, Dataset
from tasks.build import build
from tasks.calibrate import calibrate
from tasks.evaluate import evaluate
from tasks.export import export
from tasks.finetune import finetune
from tasks.handover import handover
from tasks.load import content, fingerprint, load_data, load_model
from tasks.predictor import Runner
from tasks.running import opened

LEFT = ("lm_head", "model.embed_tokens")
FORMATS: dict[str, dict[str, Any]] = {
    "int8": {"format": "int8"},
    "int8 smoothquant": {"format": "int8", "algorithm": "smoothquant"},
    "int8-weight-only": {"format": "int8-weight-only"},
    "fp8": {"format": "fp8"},
    "int4, blocks of 32": {"format": "int4", "block_size": 32},
    "int4 awq, blocks of 32": {"format": "int4", "algorithm": "awq", "block_size": 32},
}
HANDED = ("int8 smoothquant", "fp8", "int4 awq, blocks of 32")
COLUMNS = ("network", "perplexity", "engine bytes", "proved", "greedy", "Hugging Face: codes apart, cosine")


def main() -> None:
    """The table, then the ratios."""
    recipe = recipes.load(sys.argv[1] if len(sys.argv) > 1 else "bytes-llama-int8-ptq", sys.argv[2:])
    assert recipe.finetune is not None
    store.prepare()
    found = fingerprint(recipe.model.source, recipe.model.revision)
    data = load_data.fn(recipe.data, recipe.task, content(recipe.data))
    start = load_model.fn(recipe.model, recipe.data, recipe.task, found, recipe.data.split.seed)
    trained = finetune(start, data, recipe.finetune)  # a stage: kept from a run of the recipe
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    row("fp32, random weights", start, data)
    row("fp32, trained", trained, data)
    for name, section in FORMATS.items():
        row(name, calibrate.fn(trained, data, Quantize(**section, exclude=LEFT)), data)
    for tokens in (32, 128):
        ratio(trained, data, tokens)


def row(name: str, checkpoint: Checkpoint, data: Dataset) -> None:
    """One line of the table."""
    model = export.fn(checkpoint, data, Export(opset=21), "fp32")
    engine = build.fn(model, checkpoint, data, Build(), "onnxruntime", "")
    value = evaluate.fn(engine, model, data, "perplexity", "", "").values["perplexity"]
    greedy = agreement.fn(engine, checkpoint, data, "").values["greedy_agreement"]
    cells = [name, f"{value:.3f}", f"{engine.bytes:,}", f"{engine.proved} at {engine.facts['level']}"]
    cells += [f"{greedy:.3f}", handed(checkpoint, data) if name in HANDED else ""]
    print(f"| {' | '.join(cells)} |", flush=True)


def handed(checkpoint: Checkpoint, data: Dataset) -> str:
    """How near the hand-over is."""
    made = handover.fn(checkpoint, data)
    return (
        f"{made.facts['codes_rounded_apart']} of {made.facts['codes']:,}, {made.values['logits_cosine']:.6f}"
    )


def ratio(checkpoint: Checkpoint, data: Dataset, tokens: int) -> None:
    """Seconds of `tokens` new tokens after 64, with a cache by those without: median and range of rounds."""
    kind: Any = types.load(data.type)
    graphs = [export.fn(checkpoint, data, Export(kv_cache=cached), "fp32") for cached in (True, False)]
    engines = [build.fn(graph, checkpoint, data, Build(), "onnxruntime", "") for graph in graphs]
    prompt = {
        name: array[:64]
        for name, array in batches.inputs(data, "calibration", batches.preprocessor(checkpoint))[0].items()
        if array.ndim
    }
    with opened(engines[0]) as with_cache, opened(engines[1]) as without:
        runs: list[Callable[[], Any]] = [
            lambda session=session: kind.generate([prompt], Runner(session, kind), tokens)  # type: ignore[misc]
            for session in (with_cache, without)
        ]
        assert list(runs[0]()[0]) == list(runs[1]()[0])
        found = sorted(seconds(runs[0]) / seconds(runs[1]) for _ in range(9))
    print(f"{tokens} tokens: {statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})", flush=True)


def seconds(run: Callable[[], Any]) -> float:
    """Of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
