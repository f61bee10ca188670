"""Load: rows from where the recipe says into a checked, split Dataset; weights into a Checkpoint.

python -m flows optimize RECIPE     (stages `load data` and `load model`)
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.data import Data, Split
from recipes.schema import Model
from tasks import checkpoints, columns, own_code, query, store, types
from tasks.artifacts import Checkpoint, Dataset
from tasks.errors import InputError
from tasks.read import locate, parquet, table_of
from tasks.stage import NETWORK, stage
from tasks.types import texts

if TYPE_CHECKING:
    from torch import nn

LONGEST = 2049  # tokens that are tried: learned positions end below, and attention grows with the square


def fingerprint(source: str, revision: str | None = None, repository: str = "model") -> str:
    """What the source holds now, as one digest: a file's content, a module's with those of the user's own
    that it imports, a package's, a hub revision's commit."""
    kind, _, rest = source.partition(":")
    if kind == "hub":
        from huggingface_hub import HfApi

        return str(HfApi().repo_info(rest, revision=revision, repo_type=repository).sha)
    if kind == "python":
        return own_code.digest(rest.partition(":")[0])
    place = locate(source)
    return store.digest(place) if place.is_dir() else store.file_digest(place)


def content(data: Data) -> str:
    """What the rows are now, as one digest: the source's, or that of the query's result on it."""
    if data.query is None:
        return fingerprint(data.source, data.revision, "dataset")
    table = query.result(data.query, parquet(data))
    return query.digest(table)


@stage(uses=("datasets", "pyarrow"), name="load data", timeout_seconds=3600, **NETWORK)
def load_data(data: Data, task: str, content: str) -> Dataset:
    """Read, check, label, deduplicate and split the rows; `content` is the source's fingerprint."""
    table, files = table_of(data, content)
    inputs = column(task)
    values = columns.values(table, data, task)
    labels, kept = columns.labels(table, data)
    unique = _first_of_each(values, kept)
    if not unique:
        raise InputError(f"data.source {data.source}: no row is left with {inputs} and what else it needs")
    parts = _split([(k, values[k]) for k in unique], data.split)
    given = {data.labels[labels[k]] for k in parts["train"]} if data.labels else set()
    if len(given) == 1:
        raise InputError(f"data.label: every training row is {given.pop()!r}; give rows of other labels, too")
    extra = {name: list(map(str, columns.column(table, name, "data.keep"))) for name in data.keep}
    with store.staging() as folder:
        for part, rows in parts.items():
            _write(
                folder / f"{part}.parquet",
                {
                    inputs: [values[k] for k in rows],
                    **({"label": [labels[k] for k in rows]} if data.labels else {}),
                    "file": [files[k] for k in rows],
                    **{name: [column_[k] for k in rows] for name, column_ in extra.items()},
                },
            )
        digests = {part: store.file_digest(folder / f"{part}.parquet") for part in parts}
        blob = store.commit(folder)
    counts = {name: sum(labels[k] == i for k in parts["test"]) for i, name in enumerate(data.labels)}
    facts = {
        "source": data.source,
        "content": content,
        "sha256": digests,
        "rows_read": len(values),
        "rows_without_label": len(values) - len(kept),
        "rows_repeated": len(kept) - len(unique),
        "test_rows_per_label": counts,
    }
    return Dataset(blob, task, data.labels, {part: len(rows) for part, rows in parts.items()}, facts)


@stage(uses=("datasets", "pyarrow"), name="load inputs", timeout_seconds=3600, **NETWORK)
def load_inputs(data: Data, task: str, content: str) -> Dataset:
    """Rows without labels, as the one part `inputs`: what a model in use is given."""
    table, files = table_of(data, content, labelled=False)
    values = columns.values(table, data, task)
    with store.staging() as folder:
        _write(folder / "inputs.parquet", {column(task): values, "file": files})
        facts = {"source": data.source, "content": content}
        return Dataset(store.commit(folder), task, data.labels, {"inputs": len(values)}, facts)


def tokenizer(model: Model) -> str:
    """What a tokenizer of its own holds now, as one digest; empty where it comes with the weights."""
    return fingerprint(model.tokenizer) if model.tokenizer else ""


@stage(uses=("transformers", "torch"), name="load model", timeout_seconds=3600, **NETWORK)
def load_model(
    model: Model, data: Data, task: str, content: str, seed: int, tokenizer: str = ""
) -> Checkpoint:
    """The source's weights with a fresh head for the recipe's labels, and the preprocessor beside them.

    `content` and `tokenizer` are the fingerprints of the weights' source and of the tokenizer's.
    """
    with store.staging() as folder:
        if model.source.startswith("python:"):
            target = model.source.partition(":")[2]
            module, config = checkpoints.from_function(target, task, len(data.labels), seed)
            config["source_sha256"] = content  # another network may have the same tensors
        elif model.source.startswith("modelopt:"):
            module, config = checkpoints.from_modelopt(locate(model.source), task)
        else:
            weights = _weights(model, content)
            head = len(data.labels) if types.load(task).REFERENCES == "labels" else 0
            module, config = checkpoints.from_pretrained(weights, task, head, seed)
        told = _preprocessor(model, data, task, content, folder / "preprocessor")
        _fits(module, task, folder / "preprocessor", told)
        facts = {"source": model.source, "content": content, "parameters": checkpoints.parameters(module)}
        facts |= checkpoints.compression(module)
        return checkpoints.save(module, config, folder, task, facts)


def _preprocessor(model: Model, data: Data, task: str, content: str, folder: Path) -> dict[str, Any]:
    """Write what turns a value into inputs, tokenizer and `settings.json`; returns the settings."""
    told = settings(data, task)
    folder.mkdir()
    if column(task) != "image":
        _tokenizer(locate(model.tokenizer) if model.tokenizer else _weights(model, content), folder)
    (folder / "settings.json").write_text(json.dumps(told, sort_keys=True))
    return told


def settings(data: Data, task: str) -> dict[str, Any]:
    """What a version's `settings.json` says: how a value becomes inputs, and which labels come out."""
    told: dict[str, Any] = {"type": task, "labels": list(data.labels)}
    if column(task) != "image":
        told["max_length"] = data.max_length
    if column(task) != "text":
        assert data.image is not None
        told |= data.image.model_dump(mode="json", exclude={"column"}, exclude_defaults=True)
        told["scale"] = data.image.scale
    if data.prompt:
        told["prompt"] = data.prompt
    return told


def column(task: str) -> str:
    """The name of the input column of a task type: text, image or pair."""
    return types.load(task).COLUMN


def rows(dataset: Dataset, part: str) -> dict[str, list[Any]]:
    """One part's columns: the input column, `label` (class index) and `file` (where the row came from)."""
    import pyarrow.parquet as pq

    table = pq.read_table(store.path(dataset.blob) / f"{part}.parquet")
    return {name: columns.cells(table[name].combine_chunks()) for name in table.column_names}


def _fits(module: nn.Module, task: str, preprocessor: Path, settings: dict[str, Any]) -> None:
    """One example through the untrained network: shapes that disagree show here, not hours later.

    Of texts also the tokenizer's highest id, and one of `max_length` tokens.
    """
    kind = types.load(task)
    (example,) = kind.encode(preprocessor, [kind.example(settings)])
    found = _output(module, kind, example)
    if kind.COLUMN != "image":
        _ids_fit(module, kind, example, preprocessor)
    if isinstance(found, Exception):
        shapes = {name: array.shape for name, array in kind.collate([example]).items()}
        raise InputError(
            f"model.source: the network cannot take this recipe's inputs {shapes}: "
            f"{type(found).__name__}: {found}"
        ) from found
    if problem := kind.wrong(found, settings):
        raise InputError(f"model.source: {problem}")
    if kind.COLUMN != "image":
        _length_fits(module, kind, example, settings["max_length"])


def _output(module: nn.Module, kind: types.TaskType, example: types.Example) -> tuple[int, ...] | Exception:
    """The shape of the network's output for one example, or what it raised."""
    import torch

    inputs = {name: torch.from_numpy(array) for name, array in kind.collate([example]).items()}
    try:
        with torch.no_grad():
            return tuple(kind.forward(module.eval(), inputs).shape)
    except Exception as error:  # the user's network raises what it likes
        return error


def _ids_fit(module: nn.Module, kind: types.TaskType, example: types.Example, preprocessor: Path) -> None:
    highest = max(texts.tokenizer(preprocessor).get_vocab(with_added_tokens=True).values())
    ids = np.append(highest, example["input_ids"][1:])

    def works(largest: int) -> bool:
        changed = example | {"input_ids": np.minimum(ids, largest)}
        return not isinstance(_output(module, kind, changed), Exception)

    if not works(highest) and works(0):
        raise InputError(
            f"model.tokenizer: its token ids go up to {highest}, the network takes none above "
            f"{_last(works, 0, highest)}; give the tokenizer that the network was trained with, or a network "
            f"whose embedding has {highest + 1} rows (transformers: resize_token_embeddings)"
        )


def _length_fits(module: nn.Module, kind: types.TaskType, example: types.Example, max_length: int) -> None:
    def tried(length: int) -> tuple[int, ...] | Exception:
        longer = {name: np.resize(example[name], length) for name in texts.INPUTS}
        return _output(module, kind, example | longer)

    def works(length: int) -> bool:
        return not isinstance(tried(length), Exception)

    long = min(max_length, LONGEST)
    if isinstance(problem := tried(long), Exception):
        raise InputError(
            f"data.max_length is {max_length}, the longest text that the network takes has "
            f"{_last(works, len(example['input_ids']), long)} tokens; lower it "
            f"({type(problem).__name__}: {problem})"
        ) from problem


def _last(works: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number that works: `low` does, `high` does not, and between them there is one border."""
    return low - 1 + bisect_left(range(low, high), True, key=lambda number: not works(number))


def _weights(model: Model, content: str) -> Path:
    if not model.source.startswith("hub:"):
        return locate(model.source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model.source.removeprefix("hub:"), revision=content))


def _tokenizer(source: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InputError(f"{source}: no tokenizer that transformers can read: {error}") from error
    tokenizer.save_pretrained(folder)
    if not (folder / "tokenizer.json").is_file():
        raise InputError(
            f"{source}: its tokenizer ({type(tokenizer).__name__}) has no tokenizer.json, which is what "
            "serving reads; set model.tokenizer to a folder with that file (transformers' fast tokenizers "
            "write one)"
        )


def _first_of_each(values: Sequence[Any], kept: Sequence[int]) -> list[int]:
    """The kept rows without repetitions, so that no test row was trained on."""
    seen: dict[Any, int] = {}
    for k in kept:
        seen.setdefault(columns.identity(values[k]), k)
    return list(seen.values())


def _split(rows: Sequence[tuple[int, Any]], split: Split) -> dict[str, list[int]]:
    """Rows by part. The order is a hash of each row's value: more data moves no trained row into test
    or validation.
    """
    held = split.test + split.validation
    if split.train + held > len(rows):
        asked = " + ".join(str(n) for n in (split.train, split.test, split.validation) if n)
        raise InputError(
            f"data.split asks for {asked} rows, the data has {len(rows)} usable ones; lower train or test"
        )
    if split.calibration > split.train:
        raise InputError(f"data.split.calibration ({split.calibration}) is more than train ({split.train})")
    ranked = sorted(rows, key=lambda row: _rank(row[1], split.seed))
    drawn = [k for k, _ in ranked]
    test, train = drawn[: split.test], drawn[len(drawn) - split.train :]
    parts = {"train": train, "calibration": train[: split.calibration], "test": test}
    return parts | ({"validation": drawn[split.test : held]} if split.validation else {})


def _rank(value: Any, seed: int) -> bytes:
    if isinstance(value, (str, list)):
        return hashlib.sha256(f"{seed} {value}".encode()).digest()
    return hashlib.sha256(f"{seed} ".encode() + columns.identity(value)).digest()


def _write(file: Path, columns: dict[str, list[Any]]) -> None:
    import pyarrow
    import pyarrow.parquet as pq

    pq.write_table(pyarrow.table(columns), file)
