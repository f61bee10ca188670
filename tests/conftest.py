"""Every test session has a state folder of its own; set before Prefect and MLflow are imported."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

HOME = Path(tempfile.mkdtemp(prefix="enginehouse-tests-"))
os.environ["ENGINEHOUSE_HOME"] = str(HOME)
INHERITED = ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME", "PREFECT_PROFILE")
for name in (*INHERITED, "PREFECT_LOCAL_STORAGE_PATH"):  # a worker of xdist has the first process's
    os.environ.pop(name, None)

import flows  # noqa: E402, F401  applies the settings

if TYPE_CHECKING:
    from flows.judge import Outcome

ROOT = Path(__file__).resolve().parent.parent
# How fast it is, is not what these tests ask: thirty rounds, or up to 120 beside a champion, are a minute.
BRIEF = ("benchmark.rounds=6", "benchmark.max_rounds=8")


def pytest_sessionfinish() -> None:
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What a test leaves in the environment is not the next one's."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def fresh_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of this test's own."""
    monkeypatch.setenv("ENGINEHOUSE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def prefect_server() -> str:
    """The address of this session's Prefect server: a command that uses it need not start its own, 10 s."""
    from prefect.server.api.server import SubprocessASGIServer

    server = SubprocessASGIServer()
    server.start()
    return server.api_url


@pytest.fixture(scope="session")
def optimize() -> Callable[..., Outcome]:
    """Run a recipe in this process, on the session's state folder, with a short benchmark."""
    from flows.optimize import optimize
    from tasks import store

    store.prepare()

    def run(recipe: str, *overrides: str) -> Any:
        return optimize(recipe, [*BRIEF, *overrides])

    return run


@pytest.fixture(scope="session")
def digits(optimize: Callable[..., Outcome]) -> Outcome:
    """The quick recipe, run once."""
    return optimize("digits-cnn-int8-ptq")


WORDS = ["good", "bad", "film", "book", "very", "not", "a", "the", "was", "plot"]
CAPTIONS = ["a", "photo", "of", "bright", "left", "right"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def written(folder: Path, recipe: dict[str, Any]) -> Path:
    """A recipe's file, called as its model; with a benchmark of a few seconds."""
    file = folder / f"{recipe['model']['name']}.yaml"
    file.write_text(yaml.safe_dump({"benchmark": {"batch_sizes": [1], "rounds": 6}, **recipe}))
    return file


def tokenizer(folder: Path, words: list[str]) -> int:
    """A tokenizer of these words, as transformers saves it; how many tokens it has."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: k for k, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder
    )
    return len(vocabulary)


def bert_folder(folder: Path) -> Path:
    """A BERT of two layers, 32 wide, and a word tokenizer, as transformers saves them."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer(folder, WORDS)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, max_position_embeddings=32, **SMALL)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def sentences(file: Path, rows: range = range(600)) -> Path:
    """Rows whose label is the word `good` or `bad` among others; the number makes each one unique."""
    with file.open("w") as out:
        for k in rows:
            others = [WORDS[2 + (k * step) % 8] for step in (1, 3, 5)]
            label = "good" if k % 2 else "bad"
            out.write(json.dumps({"text": " ".join([*others, label, str(k)]), "label": label}) + "\n")
    return file


def texts(folder: Path, length: int, **split: int) -> dict[str, Any]:
    """A recipe's data: the sentences, without labels."""
    source = f"path:{sentences(folder / 'rows.jsonl')}"
    return {"source": source, "text": "text", "split": split, "max_length": length}


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with everything on (2:4, INT8 with embeddings, QAT) for a tiny BERT; a few seconds a run."""
    folder = tmp_path_factory.mktemp("tiny")
    train = {"epochs": 6, "batch_size": 8, "learning_rate": 2e-3}
    data = texts(folder, 16, train=320, test=240, calibration=32)
    recipe = {
        "task": "text-classification",
        "model": {"name": "tiny", "source": f"path:{bert_folder(folder / 'model')}"},
        "data": {**data, "label": "label", "labels": ["bad", "good"]},
        "finetune": train,
        "sparsify": {"exclude": ["classifier"]},
        "quantize": {"format": "int8", "embeddings": True, "exclude": ["classifier"]},
        "qat": train,
        "gate": {"max_drop": 0.05},
    }
    return written(folder, recipe)


@pytest.fixture(scope="session")
def embedding_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for sentence embeddings of a tiny BERT, as it is, in INT8."""
    folder = tmp_path_factory.mktemp("embedding")
    recipe = {
        "task": "sentence-embedding",
        "model": {"name": "tiny-embedding", "source": f"path:{bert_folder(folder / 'model')}"},
        "data": texts(folder, 16, train=64, test=200, calibration=32),
        "quantize": {"format": "int8"},
        "gate": {"metric": "cosine", "max_drop": 0.1},
    }
    return written(folder, recipe)


@pytest.fixture(scope="session")
def lm_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for a small language model over bytes, a few dozen steps, in INT8."""
    folder = tmp_path_factory.mktemp("lm")
    recipe = {
        "task": "causal-lm",
        "model": {
            "name": "tiny-lm",
            "source": "python:recipes.tiny_llama:build",
            "tokenizer": f"path:{ROOT / 'recipes' / 'bytes_tokenizer'}",
        },
        "data": texts(folder, 24, train=320, test=100, calibration=32),
        "finetune": {"epochs": 1, "batch_size": 8, "learning_rate": 3e-3},
        "quantize": {"format": "int8", "exclude": ["lm_head"]},
        "gate": {"metric": "perplexity", "min_ratio": 0.9, "on_coarse": "warn"},
    }
    return written(folder, recipe)


def clip_folder(folder: Path) -> Path:
    """A CLIP of two layers a tower, 32 wide, with random weights, and a word tokenizer."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    count = tokenizer(folder, CAPTIONS)
    # With 2 as its last token CLIP takes the text's vector where the token's number is highest.
    ends = {"bos_token_id": 3, "eos_token_id": 2, "pad_token_id": 0}
    config = CLIPConfig(
        text_config={**SMALL, **ends, "vocab_size": count, "max_position_embeddings": 16},
        vision_config={**SMALL, "image_size": 8, "patch_size": 4, "num_channels": 1},
        projection_dim=16,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    return folder


def sides(file: Path, count: int = 300) -> Path:
    """Grey pictures of 8 x 8 as arrays, bright on the side that the label names, and captions."""
    import numpy as np

    rng = np.random.default_rng(0)
    with file.open("w") as out:
        for k in range(count):
            pixels = rng.integers(0, 100, (8, 8))
            label = "left" if k % 2 else "right"
            pixels[:, slice(0, 4) if k % 2 else slice(4, 8)] += 120
            row = {"image": pixels.tolist(), "label": label, "caption": f"a photo bright {label}"}
            out.write(json.dumps(row) + "\n")
    return file


@pytest.fixture(scope="session")
def clip_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for a tiny CLIP, two graphs of one version, in INT8; a few seconds a run."""
    folder = tmp_path_factory.mktemp("clip")
    recipe = {
        "task": "image-text",
        "model": {"name": "tiny-clip", "source": f"path:{clip_folder(folder / 'model')}"},
        "data": {
            "source": f"path:{sides(folder / 'rows.jsonl')}",
            "image": {"shape": [1, 8, 8], "column": "image", "scale": 1 / 255, "mean": [0.5], "std": [0.25]},
            "label": "label",
            "labels": ["left", "right"],
            "prompt": "a photo of a {label}",
            "split": {"train": 160, "test": 120, "calibration": 32},
            "max_length": 12,
        },
        "finetune": {"epochs": 4, "batch_size": 16, "learning_rate": 1e-3},
        "quantize": {"format": "int8"},
        "gate": {"metric": "image-to-text@1", "max_drop": 0.1, "min_parity": 0.98},
    }
    return written(folder, recipe)
