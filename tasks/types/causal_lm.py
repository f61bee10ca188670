"""Text in, the next tokens out: logits of shape (batch, length, vocabulary), with or without a cache.

There are no labels: the text is its own reference. A row is the loss of each token after the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks import types
from tasks.engines.common import PAST, PRESENT
from tasks.types import Example, Run
from tasks.types.texts import *  # noqa: F403
from tasks.types.texts import collate, tokenizer

if TYPE_CHECKING:
    from torch import Tensor, nn

REFERENCES = "inputs"
OUTPUTS = {"logits": {0: "batch", 1: "length"}}
AUTO = "AutoModelForCausalLM"
TAKES = ("loss",)
ANSWER = {"text": "string", "truncated": "boolean"}
NEW_TOKENS = 32


def forward(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The logits of every position."""
    options = {"use_cache": False} if hasattr(model, "config") else {}
    logits: Tensor = types.result(model(**inputs, **options), "logits")
    return logits


def wrong(shape: tuple[int, ...], settings: dict[str, Any]) -> str:
    """One logit per position and word."""
    return "" if len(shape) == 3 else f"the network gives {shape}, not (batch, length, vocabulary)"


def targets(batch: Example, labels: np.ndarray) -> np.ndarray:
    """The text itself; -100 where it is padding."""
    return np.where(batch["attention_mask"] == 1, batch["input_ids"], -100)


def loss(found: Any, targets: Tensor) -> Tensor:
    """Cross entropy of each next token."""
    from torch.nn.functional import cross_entropy

    logits = types.result(found, "logits")[:, :-1]
    return cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100)


def scores(found: Any, targets: Tensor) -> Tensor:
    """The logits of each next token, without padding."""
    logits: Tensor = types.result(found, "logits")[:, :-1]
    return logits[targets[:, 1:] != -100]


def row(output: np.ndarray, example: Example) -> np.ndarray:
    """The loss of each token after the first, of shape (length - 1,)."""
    wanted = example["input_ids"][1:]
    logits = output[: len(wanted)].astype(np.float64)
    largest = logits.max(axis=-1, keepdims=True)
    total = largest[:, 0] + np.log(np.exp(logits - largest).sum(axis=-1))
    return np.asarray(total - logits[np.arange(len(wanted)), wanted])


def predictions(rows: Sequence[np.ndarray], takes: str) -> np.ndarray:
    """The summed loss of each text."""
    return np.array([row.sum() for row in rows])


def references(
    examples: Sequence[Example], labels: np.ndarray, baseline: Sequence[np.ndarray] | None
) -> np.ndarray:
    """How many tokens each loss is the sum of."""
    return np.array([len(example["input_ids"]) - 1 for example in examples])


def trial(labels: int) -> tuple[list[np.ndarray], np.ndarray]:
    """A few texts of three tokens."""
    return [np.ones(3)] * 4, np.full(4, 3)


def traits(row: np.ndarray) -> dict[str, float]:
    """The mean loss."""
    return {"loss": float(row.mean()) if row.size else 0.0}


def answer(folder: Path, examples: Sequence[Example], run: Run) -> list[dict[str, Any]]:
    """What goes on after each text: the likeliest token, `NEW_TOKENS` times."""
    own = tokenizer(folder)
    return [
        {"text": own.decode(ids.tolist()), **types.truncated(example)}
        for ids, example in zip(generate(examples, run), examples, strict=True)
    ]


def generate(examples: Sequence[Example], run: Any, count: int = NEW_TOKENS) -> list[np.ndarray]:
    """The likeliest next `count` tokens of each text, by an engine with a cache (`run.step`) or without."""
    return (
        _step_by_step(examples, run, count) if getattr(run, "cached", False) else _anew(examples, run, count)
    )


def _anew(examples: Sequence[Example], run: Run, count: int) -> list[np.ndarray]:
    """Each text is read whole for every token."""
    texts = [example["input_ids"] for example in examples]
    for _ in range(count):
        logits = run([{"input_ids": ids, "attention_mask": np.ones_like(ids)} for ids in texts])
        texts = [
            np.append(ids, found[len(ids) - 1].argmax()) for ids, found in zip(texts, logits, strict=True)
        ]
    return [ids[-count:] for ids in texts]


def _step_by_step(examples: Sequence[Example], run: Any, count: int) -> list[np.ndarray]:
    """Each text is read once, then token by token; shorter ones keep their padding, masked, in the middle."""
    feed = collate(examples)
    last = feed["attention_mask"].sum(axis=1) - 1
    tokens: list[np.ndarray] = []
    while True:
        found = run.step(feed)
        logits = found["logits"]
        tokens.append(logits[np.arange(len(logits)), last].argmax(axis=-1))
        if len(tokens) == count:
            return list(np.stack(tokens, axis=1))
        past = {PAST + n.removeprefix(PRESENT): a for n, a in found.items() if n.startswith(PRESENT)}
        new = tokens[-1][:, None]
        mask = np.concatenate([feed["attention_mask"], np.ones_like(new)], axis=1)
        feed = {"input_ids": new, "attention_mask": mask, **past}
        last = np.zeros(len(new), np.int64)
