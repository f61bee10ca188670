"""A network past protobuf's 2 GB through the whole pipeline: the peak of memory, stage by stage.

python -m benchmarks.large [--gigabytes 2.2] [--out FOLDER]

A BERT classifier with wide layers and random weights goes from its folder to a promoted INT8 engine, a
refit and a prediction. `copies` is the process's memory at a stage's peak, less what it had after importing
its libraries, by the bytes of the FP32 weights; pages of files that are mapped count as memory, though the
system may drop them at any time. Memory is measured by the gate in a process of its own, and not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

WIDTH, LAYERS = 1024, 4
WORDS = ["good", "bad", "film", "book", "very", "not", "a", "the", "was", "plot"]


def main() -> None:
    """Make the network, run the pipeline, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "enginehouse-large")
    given = parser.parse_args()
    shutil.rmtree(given.out, ignore_errors=True)
    given.out.mkdir(parents=True)
    os.environ["ENGINEHOUSE_HOME"] = str(given.out / "home")
    try:
        weights = network(given.out / "model", given.gigabytes)
        print(f"FP32 weights: {weights:,} bytes")
        run(recipe(given.out), weights)
    finally:
        shutil.rmtree(given.out, ignore_errors=True)


def network(folder: Path, gigabytes: float) -> int:
    """A BERT and a word tokenizer, as transformers saves them; returns the bytes of the weights."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    vocabulary = {word: k for k, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder
    )
    wide = round(gigabytes * 1e9 / (8 * WIDTH * LAYERS))
    config = BertConfig(
        vocab_size=64, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4,
        intermediate_size=wide, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    made = BertForSequenceClassification(config)
    made.save_pretrained(folder)
    return sum(parameter.numel() * 4 for parameter in made.parameters())


def recipe(folder: Path) -> Path:
    """The recipe beside the network: INT8 after calibration, judged by parity and size."""
    with (folder / "rows.jsonl").open("w") as out:
        for k in range(120):
            others = " ".join(WORDS[2 + (k * step) % 8] for step in (1, 3, 5))
            out.write(json.dumps({"text": f"{others} {k}", "label": WORDS[k % 2]}) + "\n")
    content = {
        "task": "text-classification",
        "model": {"name": "large", "source": f"path:{folder / 'model'}"},
        "data": {
            "source": f"path:{folder / 'rows.jsonl'}", "text": "text", "label": "label",
            "labels": ["bad", "good"], "split": {"train": 64, "test": 48, "calibration": 16}, "max_length": 8,
        },
        "quantize": {"format": "int8", "exclude": ["classifier"], "batch_size": 8},
        "benchmark": {"batch_sizes": [1], "rounds": 6},
        "deploy": {"triton": None},
        "gate": {"metric": "accuracy", "max_drop": 0.9, "max_size_ratio": 0.3, "on_coarse": "warn"},
    }  # fmt: skip
    (folder / "large.yaml").write_text(yaml.safe_dump(content))
    return folder / "large.yaml"


def run(file: Path, weights: int) -> None:
    """Optimize, refit, predict, verify; a line for each stage."""
    import flows  # noqa: F401  the settings
    from flows.optimize import optimize
    from flows.verify import report
    from tasks import checkpoints, deploy, store
    from tasks.build import host
    from tasks.refit import refit
    from tasks.stage import Stage

    store.prepare()
    with checkpoints.quiet():
        import modelopt.torch.quantization  # noqa: F401
    base = _memory("VmRSS")
    print("| stage | copies of the weights at its peak | seconds |\n|---|--:|--:|", flush=True)
    original = Stage.__call__

    def measured(stage: Any, *args: Any, **kwargs: Any) -> Any:
        with told(stage.task.name, base, weights):
            return original(stage, *args, **kwargs)

    Stage.__call__ = measured  # type: ignore[method-assign,assignment]
    outcome = optimize(str(file))
    print(_row("register, promote, deploy", base, weights, 0))
    assert outcome.verdict == "promoted", outcome.reasons
    attempt = outcome.attempt
    assert attempt is not None
    engine = attempt.engines["candidate"]
    again = refit(
        attempt.onnx["candidate"],
        attempt.checkpoints["candidate"],
        attempt.dataset,
        engine,
        host("onnxruntime"),
    )
    assert again.engine is not None, again.why
    with told("predict", base, weights):
        print(deploy.predict("large", ["a good film"]))
    with told("verify", base, weights):
        lines, right = report("large@champion")
    assert right, lines
    print(
        f"engine {engine.bytes:,} bytes, {engine.proved}; ONNX {attempt.onnx['candidate'].blob.bytes:,} bytes"
    )


@contextmanager
def told(name: str, base: int, weights: int) -> Iterator[None]:
    """Print the memory at the block's peak, and its seconds."""
    _anew()
    began = time.perf_counter()
    yield
    print(_row(name, base, weights, time.perf_counter() - began), flush=True)
    _anew()


def _row(name: str, base: int, weights: int, seconds: float) -> str:
    return f"| {name} | {(_memory('VmHWM') - base) / weights:.2f} | {seconds:.0f} |"


def _anew() -> None:
    """The peak starts from what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
