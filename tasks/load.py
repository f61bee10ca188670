"""Load: rows from where the recipe says into a checked, split Dataset; weights into a Checkpoint.

python -m flows optimize RECIPE     (stages `load data` and `load model`)
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import math
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.schema import Data, Label, Model, Split
from tasks import checkpoints, query, store, types
from tasks.artifacts import Checkpoint, Dataset
from tasks.errors import InputError
from tasks.stage import NETWORK, stage

if TYPE_CHECKING:
    import pyarrow
    from torch import nn

SUFFIXES = {".csv": "csv", ".txt": "csv", ".tsv": "csv", ".gz": "csv", ".json": "json", ".jsonl": "json"}


def fingerprint(source: str, revision: str | None = None, repository: str = "model") -> str:
    """What the source holds now, as one digest: a file's content, a package's, a hub revision's commit."""
    kind, _, rest = source.partition(":")
    if kind == "hub":
        from huggingface_hub import HfApi

        return str(HfApi().repo_info(rest, revision=revision, repo_type=repository).sha)
    if kind == "python":
        try:
            module = importlib.util.find_spec(rest.partition(":")[0])
        except ModuleNotFoundError:
            module = None
        if module is None or module.origin is None:
            raise InputError(f"{source}: no module {rest.partition(':')[0]} here")
        return store.file_digest(Path(module.origin))
    place = locate(source)
    return store.digest(place) if place.is_dir() else store.file_digest(place)


def content(data: Data) -> str:
    """What the rows are now, as one digest: the source's, or that of the query's result on it."""
    if data.query is None:
        return fingerprint(data.source, data.revision, "dataset")
    table = query.result(data.query, _parquet(data))
    return query.digest(table)


def locate(source: str) -> Path:
    """The file or folder behind a source on this machine (a package is never imported)."""
    kind, _, rest = source.partition(":")
    if kind in ("path", "modelopt"):
        place = Path(rest).expanduser()
        if not place.exists():
            raise InputError(f"{source}: no such file or folder (looked at {place.absolute()})")
        return place
    name, _, suffix = rest.partition("/")
    try:
        files = importlib.metadata.distribution(name).files or []
    except importlib.metadata.PackageNotFoundError:
        raise InputError(
            f"{source}: the package {name} is not installed (pip install --no-deps {name})"
        ) from None
    for file in files:
        text = f"/{file.as_posix()}"
        if text.endswith(f"/{suffix}"):
            return Path(str(file.locate()))
        if f"/{suffix}/" in text:
            whole = Path(str(file.locate()))
            below = text.split(f"/{suffix}/", 1)[1]
            return whole.parents[below.count("/")]
    raise InputError(f"{source}: the package {name} is installed and holds no file that ends with {suffix}")


@stage(uses=("datasets", "pyarrow"), name="load data", timeout_seconds=3600, **NETWORK)
def load_data(data: Data, task: str, content: str) -> Dataset:
    """Read, check, label, deduplicate and split the rows; `content` is the source's fingerprint."""
    table, files = _read(data, content)
    inputs = column(task)
    values = _values(table, data, task)
    labels, kept = _labels(table, data)
    unique = _first_of_each(values, kept)
    if not unique:
        raise InputError(f"data.source {data.source}: no row is left with a label and a {inputs}")
    parts = _split([(k, values[k]) for k in unique], data.split)
    extra = {name: _column(table, name, "data.keep") for name in data.keep}
    with store.staging() as folder:
        for part, rows in parts.items():
            _write(
                folder / f"{part}.parquet",
                {
                    inputs: [values[k] for k in rows],
                    "label": [labels[k] for k in rows],
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
    table, files = _read(data, content, labelled=False)
    values = _values(table, data, task)
    with store.staging() as folder:
        _write(folder / "inputs.parquet", {column(task): values, "file": files})
        facts = {"source": data.source, "content": content}
        return Dataset(store.commit(folder), task, data.labels, {"inputs": len(values)}, facts)


@stage(uses=("transformers", "torch"), name="load model", timeout_seconds=3600, **NETWORK)
def load_model(model: Model, data: Data, task: str, content: str, seed: int) -> Checkpoint:
    """The source's weights with a fresh head for the recipe's labels, and the preprocessor beside them."""
    with store.staging() as folder:
        if model.source.startswith("python:"):
            module, config = checkpoints.from_function(model.source.partition(":")[2], len(data.labels), seed)
            config["source_sha256"] = content  # another network may have the same tensors
        elif model.source.startswith("modelopt:"):
            module, config = checkpoints.from_modelopt(locate(model.source))
        else:
            module, config = checkpoints.from_pretrained(_weights(model, content), len(data.labels), seed)
        settings: dict[str, Any] = {"type": task, "labels": list(data.labels)}
        if task == "text-classification":
            settings["max_length"] = data.max_length
            _tokenizer(_weights(model, content), folder / "preprocessor")
        elif data.image is not None:
            settings |= {"shape": list(data.image.shape), "scale": data.image.scale}
        (folder / "preprocessor").mkdir(exist_ok=True)
        (folder / "preprocessor" / "settings.json").write_text(json.dumps(settings, sort_keys=True))
        _fits(module, task, folder / "preprocessor", settings)
        facts = {"source": model.source, "content": content, "parameters": checkpoints.parameters(module)}
        facts |= checkpoints.compression(module)
        return checkpoints.save(module, config, folder, task, facts)


def column(task: str) -> str:
    """The name of the input column of a task type: text or image."""
    return types.load(task).COLUMN


def rows(dataset: Dataset, part: str) -> dict[str, list[Any]]:
    """One part's columns: the input column, `label` (class index) and `file` (where the row came from)."""
    import pyarrow.parquet as pq

    table = pq.read_table(store.path(dataset.blob) / f"{part}.parquet")
    return {name: table[name].to_pylist() for name in table.column_names}


def _fits(module: nn.Module, task: str, preprocessor: Path, settings: dict[str, Any]) -> None:
    """One example through the untrained network: shapes that disagree show here, not hours later."""
    import torch

    kind = types.load(task)
    value = "text" if kind.COLUMN == "text" else np.zeros(settings["shape"])
    example = kind.collate(kind.encode(preprocessor, [value]))
    try:
        with torch.no_grad():
            logits = module(**{name: torch.from_numpy(array) for name, array in example.items()}).logits
    except (RuntimeError, IndexError, TypeError) as error:
        shapes = {name: array.shape for name, array in example.items()}
        raise InputError(
            f"model.source: the network cannot take this recipe's inputs {shapes}: {error}"
        ) from error
    if logits.shape != (1, len(settings["labels"])):
        raise InputError(
            f"model.source: the network gives {tuple(logits.shape)}, "
            f"data.labels asks for (1, {len(settings['labels'])})"
        )


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


def _read(data: Data, content: str, labelled: bool = True) -> tuple[pyarrow.Table, list[str]]:
    """All rows as one table, and the name of the file that each came from."""
    import datasets
    import pyarrow

    datasets.disable_progress_bars()
    if data.query is not None:
        tables = {"query": query.result(data.query, _parquet(data))}
    elif data.source.startswith("hub:"):
        parts = datasets.load_dataset(
            data.source.removeprefix("hub:"), revision=content, data_files=list(data.files) or None
        )
        tables = {name: part.data.table for name, part in parts.items()}
    else:
        with store.staging() as scratch:
            found = _files(data, scratch)
            tables = {file.name.split(".")[0]: _parse(file, data, scratch) for file in found}
    lengths = {name: len(table) for name, table in tables.items()}
    if not sum(lengths.values()):
        raise InputError(f"data.source {data.source}: the data is empty")
    if data.image is None:  # only what is used, so that files may differ in the rest
        tables = {name: _used(part, data, name, labelled) for name, part in tables.items()}
    try:
        table = pyarrow.concat_tables(tables.values(), promote_options="permissive")
    except pyarrow.ArrowTypeError as error:
        raise InputError(
            f"data.files: the files of {data.source} disagree on a column's type: {error}"
        ) from error
    return table, [name for name, length in lengths.items() for _ in range(length)]


def _files(data: Data, scratch: Path) -> list[Path]:
    place = locate(data.source)
    if place.is_file() and tarfile.is_tarfile(place):
        with tarfile.open(place) as archive:
            archive.extractall(scratch / "archive", filter="data")
        place = scratch / "archive"
    if place.is_file():
        return [place]
    found = sorted(
        {file for pattern in data.files or ("*",) for file in place.rglob(pattern) if file.is_file()}
    )
    missing = [pattern for pattern in data.files if not any(place.rglob(pattern))]
    if missing or not found:
        raise InputError(f"data.files: nothing in {data.source} matches {', '.join(missing) or '*'}")
    return found


def _parquet(data: Data) -> list[Path]:
    """The Parquet files that a query reads."""
    if data.source.startswith("hub:"):
        raise InputError("data.query: a query needs Parquet files on this machine, not a hub: source")
    place = locate(data.source)
    found = [place] if place.is_file() else _files(data, place)
    other = [file.name for file in found if file.suffix != ".parquet"]
    if other:
        raise InputError(
            f"data.query: a query reads Parquet files; {', '.join(other[:3])} is not (data.files)"
        )
    return found


def _parse(file: Path, data: Data, scratch: Path) -> pyarrow.Table:
    from datasets import load_dataset

    kind = data.format or SUFFIXES.get(file.suffix, file.suffix.removeprefix("."))
    if kind not in ("csv", "json", "parquet"):
        raise InputError(
            f"{file}: cannot tell the format from the name; set data.format to csv, json or parquet"
        )
    if file.stat().st_size == 0:
        raise InputError(f"{file}: the file is empty")
    try:
        loaded = load_dataset(
            kind, data_files=[str(file)], split="train", cache_dir=scratch / "cache", **data.read
        )
    except Exception as error:  # datasets wraps pandas' and pyarrow's errors in several classes of its own
        if "corresponds to no data" in str(error):
            raise InputError(f"{file}: the file is empty: it has no rows") from error
        raise InputError(
            f"{file}: cannot be read as {kind} with data.read {data.read}: {error.__cause__ or error}"
        ) from error
    return loaded.with_format("arrow")[:] if len(loaded) else loaded.data.table


def _used(table: pyarrow.Table, data: Data, file: str, labelled: bool) -> pyarrow.Table:
    """The text and, with labels, the label and kept columns alone."""
    label = data.label.column if isinstance(data.label, Label) else data.label
    wanted = [("data.text", data.text)]
    if labelled:
        wanted += [("data.label", label), *(("data.keep", k) for k in data.keep)]
    for key, name in wanted:
        if name not in table.column_names:
            has = ", ".join(map(str, table.column_names))
            raise InputError(f"{key}: {file} has no column {name!r}; it has {has}")
    return table.select(list(dict.fromkeys(name for _, name in wanted)))


def _column(table: pyarrow.Table, name: str, key: str) -> list[Any]:
    if name not in table.column_names:
        raise InputError(f"{key}: no column {name!r}; there is {', '.join(map(str, table.column_names))}")
    return list(table[name].to_pylist())


def _values(table: pyarrow.Table, data: Data, task: str) -> list[Any]:
    return _texts(table, data) if column(task) == "text" else list(_images(table, data))


def _texts(table: pyarrow.Table, data: Data) -> list[str]:
    assert data.text is not None
    texts = _column(table, data.text, "data.text")
    bad = [k for k, text in enumerate(texts) if not isinstance(text, str) or not text.strip()]
    if bad:
        raise InputError(
            f"data.text: {len(bad)} of {len(texts)} rows have no text in column {data.text!r} "
            f"(first at row {bad[0] + 1}: {texts[bad[0]]!r}); remove or fill them"
        )
    return texts


def _images(table: pyarrow.Table, data: Data) -> list[list[float]]:
    assert data.image is not None
    size = math.prod(data.image.shape)
    if len(table.column_names) < size:
        raise InputError(
            f"data.image.shape {data.image.shape} needs {size} columns, there are {len(table.column_names)}"
        )
    label = data.label.column if isinstance(data.label, Label) else data.label
    if label in table.column_names[:size]:
        raise InputError(
            f"data.image: the label column {label!r} is among the first {size} columns, the pixels"
        )
    try:
        pixels = np.stack([np.asarray(table[k].to_numpy(), dtype=np.float64) for k in range(size)], axis=1)
    except ValueError as error:
        raise InputError(f"data.image: the first {size} columns are not all numbers: {error}") from error
    bad = np.flatnonzero(~np.isfinite(pixels).all(axis=1))
    if len(bad):
        raise InputError(f"data.image: {len(bad)} images hold NaN or infinity (first at row {bad[0] + 1})")
    images: list[list[float]] = pixels.tolist()
    return images


def _labels(table: pyarrow.Table, data: Data) -> tuple[dict[int, int], list[int]]:
    """Class index by row, and the rows that have one."""
    if isinstance(data.label, Label):
        return _labels_from_numbers(table, data, data.label)
    index = {name: k for k, name in enumerate(data.labels)}
    values = _column(table, data.label, "data.label")
    for row, value in enumerate(values):
        if str(value) not in index:
            raise InputError(
                f"data.label: unknown label {value!r} in column {data.label!r}, row {row + 1}; "
                f"data.labels has {', '.join(data.labels)}"
            )
    return {row: index[str(value)] for row, value in enumerate(values)}, list(range(len(values)))


def _labels_from_numbers(table: pyarrow.Table, data: Data, rule: Label) -> tuple[dict[int, int], list[int]]:
    if len(data.labels) != 2:
        raise InputError(f"data.label.cut makes two classes, data.labels has {len(data.labels)}")
    numbers = _column(table, rule.column, "data.label.column")
    bad = [k for k, x in enumerate(numbers) if not isinstance(x, (int, float)) or not math.isfinite(x)]
    if bad:
        raise InputError(
            f"data.label: {len(bad)} rows have no finite number in column {rule.column!r} "
            f"(first at row {bad[0] + 1}: {numbers[bad[0]]!r})"
        )
    kept = [k for k, x in enumerate(numbers) if abs(x - rule.cut) > rule.margin]
    return {k: int(numbers[k] > rule.cut) for k in kept}, kept


def _first_of_each(values: Sequence[Any], kept: Sequence[int]) -> list[int]:
    """The kept rows without repetitions, so that no test row was trained on."""
    seen: dict[Any, int] = {}
    for k in kept:
        seen.setdefault(values[k] if isinstance(values[k], str) else tuple(values[k]), k)
    return list(seen.values())


def _split(rows: Sequence[tuple[int, Any]], split: Split) -> dict[str, list[int]]:
    """Rows by part. The order is a hash of each row's value: more data moves no trained row into test."""
    wanted = split.train + split.test
    if wanted > len(rows):
        raise InputError(
            f"data.split asks for {split.train} + {split.test} rows, the data has {len(rows)} usable ones; "
            "lower train or test"
        )
    if split.calibration > split.train:
        raise InputError(f"data.split.calibration ({split.calibration}) is more than train ({split.train})")
    ranked = sorted(rows, key=lambda row: hashlib.sha256(f"{split.seed} {row[1]}".encode()).digest())
    drawn = [k for k, _ in ranked]
    test, train = drawn[: split.test], drawn[len(drawn) - split.train :]
    return {"train": train, "calibration": train[: split.calibration], "test": test}


def _write(file: Path, columns: dict[str, list[Any]]) -> None:
    import pyarrow
    import pyarrow.parquet as pq

    pq.write_table(pyarrow.table(columns), file)
