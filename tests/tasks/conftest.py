"""A tiny text classifier and a small CNN, both real: a folder that transformers wrote, rows in a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from recipes.schema import Data, Model
from tasks import load
from tasks.artifacts import Checkpoint, Dataset

WORDS = ["good", "bad", "film", "book", "very", "not", "a", "the", "was", "plot"]


@dataclass(frozen=True)
class Case:
    """A dataset and the untrained network for it."""

    dataset: Dataset
    checkpoint: Checkpoint
    model: Model
    data: Data


def bert_folder(folder: Path) -> Path:
    """A BERT of two layers, 32 wide, and a word tokenizer, as transformers saves them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    vocabulary = {word: k for k, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder
    )
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=32,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def sentences(file: Path, count: int = 96) -> Path:
    with file.open("w") as out:
        for k in range(count):
            words = [WORDS[(k * step) % 10] for step in (1, 3, 7, 9)]
            row = {"text": " ".join([*words, str(k)]), "label": "good" if k % 2 else "bad"}
            out.write(json.dumps(row) + "\n")
    return file


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("text")
    data = Data.model_validate(
        {
            "source": f"path:{sentences(folder / 'rows.jsonl')}",
            "text": "text",
            "label": "label",
            "labels": ("bad", "good"),
            "split": {"train": 64, "test": 32, "calibration": 32},
            "max_length": 16,
        }
    )
    model = Model(name="tiny", source=f"path:{bert_folder(folder / 'model')}")
    return _case(model, data, "text-classification")


@pytest.fixture(scope="session")
def image() -> Case:
    from recipes import load as recipe

    digits = recipe("digits-cnn-int8-ptq")
    return _case(digits.model, digits.data, digits.task)


def _case(model: Model, data: Data, task: str) -> Case:
    dataset = load.load_data.fn(data, task, "content")
    return Case(dataset, load.load_model.fn(model, data, task, "content", 0), model, data)
