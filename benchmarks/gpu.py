"""Calibration, SparseGPT and QAT on a GPU, against the same calls in a bare script; two GPUs against one.

python -m benchmarks.gpu REPORT.json [PART …] [--small]

Parts: calibrate, sparsegpt, qat (calibrate:fp8 or qat:int8 for one format alone), processes.

A BERT of 335 million parameters (BERT-large's shape, bytes as tokens, random weights: speed and memory
only). "Pipeline" is the stage's own function, without Prefect's few milliseconds; "bare" is what one would
type into a script with ModelOpt and the Trainer, on the same rows in the same batches. They take turns; the
first does not count. `steady` is samples a second between the first and the last line of a training's log,
without what stands before and after the steps. `processes` is INT8 QAT of a Llama of 308 million parameters
in one process, two (DDP) and two (FSDP2), on as many GPUs: throughput, and the loss of the weights that come
out on held-out rows (the letters' own entropy is 3.24). ModelOpt compiles its CUDA extensions first, which
takes a minute or two. `--small` tries the script out on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.compress import Finetune, Quantize, Sparsify
from tasks import batches, calibrate, checkpoints, layers, processes, sparsify, store, training
from tasks.artifacts import Checkpoint, Dataset

if TYPE_CHECKING:
    from torch import nn

TASK, LENGTH, LABELS = "text-classification", 128, ("left", "right")
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
ROWS = {"calibration": 512, "train": 2560, "test": 8}
LONGER = {"calibration": 128, "train": 6400, "validation": 320, "test": 8}
Ticks = list[tuple[int, float]]
Work = Callable[[Ticks], int]
BATCH = 32
SHARED = 128  # rows of a step that two GPUs share: few do not fill them
TURNS = {"calibrate": 2, "sparsegpt": 1, "qat": 2}
OWN = 0.6  # of a text's letters
ROOT = Path(__file__).resolve().parents[1]


def network(labels: int) -> Any:
    """A BERT over bytes."""
    from transformers import BertConfig, BertForSequenceClassification

    shape = SMALL if os.environ.get("BENCHMARK_SMALL") else LARGE
    config = BertConfig(vocab_size=256, num_labels=labels, attn_implementation="eager", **shape)
    return BertForSequenceClassification(config)


def llama(labels: int) -> Any:
    """A Llama over bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SMALL if os.environ.get("BENCHMARK_SMALL") else LARGE | {"intermediate_size": 2816}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=256, pad_token_id=None, attn_implementation="eager", **shape)
    )


def prepared(
    function: str = "benchmarks.gpu:network", wanted: dict[str, int] = ROWS, task: str = TASK
) -> tuple[Checkpoint, Dataset]:
    """Untrained weights of a network over bytes, and sentences of random letters, in the store.

    Three of five letters are of the label's half of the alphabet, so there is something to learn.
    """
    import shutil

    import pyarrow
    import pyarrow.parquet as pq

    labels = LABELS if task == TASK else ()
    model, config = checkpoints.from_function(function, task, len(labels), 0)
    with store.staging() as folder:
        shutil.copytree(ROOT / "recipes/bytes_tokenizer", folder / "preprocessor")
        settings = {"type": task, "labels": list(labels), "max_length": LENGTH}
        (folder / "preprocessor/settings.json").write_text(json.dumps(settings))
        facts = {"parameters": checkpoints.parameters(model)}
        checkpoint = checkpoints.save(model, config, folder, task, facts)
    random = np.random.default_rng(0)
    small = 64 if os.environ.get("BENCHMARK_SMALL") else 1
    rows = {part: max(count // small, 8) for part, count in wanted.items()}
    with store.staging() as folder:
        for part, count in rows.items():
            side = random.integers(0, 2, count)
            half = (random.random((count, LENGTH)) < OWN) == (side[:, None] == 1)
            letters = (97 + 13 * half + random.integers(0, 13, (count, LENGTH))).astype(np.uint8)
            table = {"text": [bytes(row).decode() for row in letters]}
            table |= {"label": side.tolist()} if labels else {}
            pq.write_table(pyarrow.table(table), folder / f"{part}.parquet")
        return checkpoint, Dataset(store.commit(folder), task, labels, rows)


def bare_batches(checkpoint: Checkpoint, dataset: Dataset) -> list[dict[str, Any]]:
    """The calibration rows, tokenized in batches as a script would."""
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(batches.preprocessor(checkpoint))
    texts = pq.read_table(store.path(dataset.blob) / "calibration.parquet")["text"].to_pylist()
    return [
        dict(tokenizer(texts[k : k + BATCH], truncation=True, max_length=LENGTH, return_tensors="pt"))
        for k in range(0, len(texts), BATCH)
    ]


def bare_loop(checkpoint: Checkpoint, dataset: Dataset) -> Callable[[nn.Module], None]:
    """Every calibration row through a network."""

    def loop(model: nn.Module) -> None:
        for batch in bare_batches(checkpoint, dataset):
            model(**{name: tensor.to(model.device) for name, tensor in batch.items()})

    return loop


def one(part: str, who: str, kind: str, checkpoint: Checkpoint, dataset: Dataset) -> dict[str, Any]:
    """Seconds, samples a second and peak device memory of one call, and what it made."""
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()
    model, _ = checkpoints.restore(checkpoint)
    model.to(checkpoints.device())
    work = PARTS[part](model, who, kind, checkpoint, dataset)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    ticks: Ticks = []
    start = time.perf_counter()
    samples = work(ticks)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    made = {
        "quantizers": len(checkpoints.quantizers(model)),
        "sparse": len(checkpoints.sparse_modules(model)),
    }
    found = {"seconds": seconds, "samples_per_second": samples / seconds, "peak_bytes": memory, **made}
    return found | steady(ticks, BATCH)


def steady(ticks: Ticks, batch: int) -> dict[str, float]:
    """Samples a second between the first and the last line of a training's log."""
    if len(ticks) < 2:
        return {}
    (first, start), (last, end) = ticks[0], ticks[-1]
    return {"steady": (last - first) * batch / (end - start)}


def of_calibrate(model: Any, who: str, kind: str, checkpoint: Checkpoint, dataset: Dataset) -> Work:
    """Quantizers whose ranges are settled by every calibration row."""
    section = Quantize(format=kind, batch_size=BATCH, exclude=("classifier",))

    def pipeline(ticks: Ticks) -> int:
        loop = batches.forward_loop(dataset, batches.preprocessor(checkpoint), BATCH, "calibrate")
        calibrate.quantized(model, section, loop)
        return dataset.rows["calibration"]

    def bare(ticks: Ticks) -> int:
        import modelopt.torch.quantization as mtq
        import torch

        with torch.no_grad():
            mtq.quantize(
                model,
                calibrate.quant_config(section, layers.quantizable(model)),
                bare_loop(checkpoint, dataset),
            )
        return dataset.rows["calibration"]

    return pipeline if who == "pipeline" else bare


def of_sparsegpt(model: Any, who: str, kind: str, checkpoint: Checkpoint, dataset: Dataset) -> Work:
    """A 2:4 mask by SparseGPT."""
    section = Sparsify(method="sparsegpt", exclude=("classifier",))

    def pipeline(ticks: Ticks) -> int:
        loop = batches.forward_loop(dataset, batches.preprocessor(checkpoint), BATCH, "sparsify")
        sparsify.prune(model, section, loop)
        return dataset.rows["calibration"]

    def bare(ticks: Ticks) -> int:
        import modelopt.torch.sparsity as mts

        rules: dict[str, Any] = {"nn.Linear": {"*": {}, "classifier": None}}
        mts.sparsify(model, [("sparsegpt", rules)], config={"forward_loop": bare_loop(checkpoint, dataset)})
        return dataset.rows["calibration"]

    return pipeline if who == "pipeline" else bare


def of_qat(model: Any, who: str, kind: str, checkpoint: Checkpoint, dataset: Dataset) -> Work:
    """Training with the quantizers on, the network read from its checkpoint first."""
    section = Quantize(format=kind, batch_size=BATCH, exclude=("classifier",))
    quantized = calibrate.calibrate.fn(checkpoint, dataset, section)
    settings = Finetune(epochs=1, batch_size=BATCH)
    scratch = Path(tempfile.mkdtemp())

    def pipeline(ticks: Ticks) -> int:
        job = training.Job(quantized, dataset, settings, None, scratch)
        training.train(job, lambda step, _: ticks.append((step, time.perf_counter())))
        return dataset.rows["train"]

    def bare(ticks: Ticks) -> int:
        network, _ = checkpoints.restore(quantized)
        _bare_trainer(network, checkpoint, dataset, settings, scratch, ticks).train()
        return dataset.rows["train"]

    return pipeline if who == "pipeline" else bare


def _bare_trainer(
    model: Any, checkpoint: Checkpoint, dataset: Dataset, section: Finetune, scratch: Path, ticks: Ticks
) -> Any:
    """The Trainer as its documentation has it, with the same schedule."""
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

    class Told(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in (logs or {}):
                ticks.append((state.global_step, time.perf_counter()))

    tokenizer = AutoTokenizer.from_pretrained(batches.preprocessor(checkpoint))
    table = pq.read_table(store.path(dataset.blob) / "train.parquet").to_pydict()
    encoded = tokenizer(table["text"], truncation=True, max_length=LENGTH)
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": label}
        for ids, mask, label in zip(
            encoded["input_ids"], encoded["attention_mask"], table["label"], strict=True
        )
    ]
    steps = len(rows) // BATCH
    arguments = TrainingArguments(
        output_dir=str(scratch),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=section.learning_rate,
        warmup_steps=int(section.warmup_ratio * steps),
        weight_decay=section.weight_decay,
        save_strategy="no",
        report_to=[],
        logging_steps=max(1, steps // 50),
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # as in the pipeline: not DataParallel over all it sees
    return Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Told()])


PARTS: dict[str, Callable[..., Work]] = {
    "calibrate": of_calibrate,
    "sparsegpt": of_sparsegpt,
    "qat": of_qat,
}
KINDS = {"calibrate": ("int8", "fp8"), "sparsegpt": ("2:4",), "qat": ("int8", "fp8")}


WAYS: dict[str, dict[str, Any]] = {
    "one": {},
    "two, ddp": {"processes": 2},
    "two, fsdp2": {"processes": 2, "shard": "fsdp2"},
}


def quantized_llama() -> tuple[Checkpoint, Dataset]:
    """What the processes train: the Llama in INT8, and its texts."""
    checkpoint, dataset = prepared("benchmarks.gpu:llama", LONGER, "causal-lm")
    section = Quantize(format="int8", batch_size=BATCH, exclude=("lm_head", "model.embed_tokens"))
    return calibrate.calibrate.fn(checkpoint, dataset, section), dataset


def of_processes(way: str, quantized: Checkpoint, dataset: Dataset) -> dict[str, Any]:
    """INT8 QAT to its end: throughput, and the loss on held-out rows."""
    settings = Finetune(epochs=1, batch_size=SHARED, learning_rate=3e-4, evaluations=1, **WAYS[way])
    ticks: Ticks = []

    def tell(step: int, losses: dict[str, float]) -> None:
        if "loss" in losses:
            ticks.append((step, time.perf_counter()))

    job = training.Job(quantized, dataset, settings, None, Path(tempfile.mkdtemp()))
    start = time.perf_counter()
    trained = (training if settings.processes == 1 else processes).train(job, tell)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "validation_loss": trained.facts["validation_loss"], **steady(ticks, SHARED)}


def compile_extensions() -> None:
    """ModelOpt's kernels; who is ended while compiling leaves a lock that all others wait for."""
    import torch
    from modelopt.torch.quantization import extensions

    if torch.cuda.is_available():
        for get in (extensions.get_cuda_ext, extensions.get_cuda_ext_fp8):
            get(raise_if_failed=True)


def asked(parts: list[str]) -> list[tuple[str, str]]:
    """Each part with each of its formats, or with the one that is named after it."""
    found = []
    for part, _, kind in (name.partition(":") for name in parts if name != "processes"):
        if part not in PARTS or (kind and kind not in KINDS[part]):
            raise SystemExit(f"no part {part}:{kind}; there are {KINDS} and processes")
        found += [(part, each) for each in ((kind,) if kind else KINDS[part])]
    return found


def main() -> None:
    """Each measurement in turns; the report is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("parts", nargs="*", default=[*PARTS, "processes"])
    parser.add_argument("--turns", type=int, help="that count, of each part")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    if given.small:
        os.environ["BENCHMARK_SMALL"] = "1"
    os.environ.setdefault("ENGINEHOUSE_HOME", tempfile.mkdtemp())
    store.prepare()
    compile_extensions()
    report: dict[str, Any] = {"device": device()}

    def add(title: str, row: dict[str, Any]) -> None:
        report.setdefault(title, []).append(row)
        given.report.write_text(json.dumps(report, indent=1))
        print(title, json.dumps(row), flush=True)

    checkpoint, dataset = prepared()
    report["parameters"] = checkpoint.facts["parameters"]
    for part, kind in asked(given.parts):
        for _ in range(1 + (given.turns or TURNS[part])):
            for who in ("pipeline", "bare"):
                add(f"{part} {kind} {who}", one(part, who, kind, checkpoint, dataset))
    if "processes" in given.parts:
        start = quantized_llama()
        for way in WAYS:
            add(f"processes {way}", of_processes(way, *start))


def device() -> str:
    """The GPU's name, and how many."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
