"""Load: rows from where the recipe says into a checked, split Dataset; weights into a Checkpoint.

python -m flows optimize RECIPE     (stages `load data` and `load model`)
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.data import Data, Label, Split
from recipes.schema import Model
from tasks import checkpoints, columns, query, store, types
from tasks.artifacts import Checkpoint, Dataset
from tasks.errors import InputError
from tasks.stage import NETWORK, stage

if TYPE_CHECKING:
    import pyarrow
    from torch import nn

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
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
    values = columns.values(table, data, task)
    labels, kept = columns.labels(table, data)
    unique = _first_of_each(values, kept)
    if not unique:
        raise InputError(f"data.source {data.source}: no row is left with {inputs} and what else it needs")
    parts = _split([(k, values[k]) for k in unique], data.split)
    extra = {name: columns.column(table, name, "data.keep") for name in data.keep}
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
    table, files = _read(data, content, labelled=False)
    values = columns.values(table, data, task)
    with store.staging() as folder:
        _write(folder / "inputs.parquet", {column(task): values, "file": files})
        facts = {"source": data.source, "content": content}
        return Dataset(store.commit(folder), task, data.labels, {"inputs": len(values)}, facts)


@stage(uses=("transformers", "torch"), name="load model", timeout_seconds=3600, **NETWORK)
def load_model(model: Model, data: Data, task: str, content: str, seed: int) -> Checkpoint:
    """The source's weights with a fresh head for the recipe's labels, and the preprocessor beside them."""
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
        settings = _preprocessor(model, data, task, content, folder / "preprocessor")
        _fits(module, task, folder / "preprocessor", settings)
        facts = {"source": model.source, "content": content, "parameters": checkpoints.parameters(module)}
        facts |= checkpoints.compression(module)
        return checkpoints.save(module, config, folder, task, facts)


def _preprocessor(model: Model, data: Data, task: str, content: str, folder: Path) -> dict[str, Any]:
    """Write what turns a value into inputs, tokenizer and `settings.json`; returns the settings."""
    settings: dict[str, Any] = {"type": task, "labels": list(data.labels)}
    folder.mkdir()
    if column(task) != "image":
        settings["max_length"] = data.max_length
        _tokenizer(locate(model.tokenizer) if model.tokenizer else _weights(model, content), folder)
    if column(task) != "text":
        assert data.image is not None
        settings |= data.image.model_dump(mode="json", exclude={"column"}, exclude_defaults=True)
        settings["scale"] = data.image.scale
    if data.prompt:
        settings["prompt"] = data.prompt
    (folder / "settings.json").write_text(json.dumps(settings, sort_keys=True))
    return settings


def column(task: str) -> str:
    """The name of the input column of a task type: text, image or pair."""
    return types.load(task).COLUMN


def rows(dataset: Dataset, part: str) -> dict[str, list[Any]]:
    """One part's columns: the input column, `label` (class index) and `file` (where the row came from)."""
    import pyarrow.parquet as pq

    table = pq.read_table(store.path(dataset.blob) / f"{part}.parquet")
    return {name: columns.cells(table[name].combine_chunks()) for name in table.column_names}


def _fits(module: nn.Module, task: str, preprocessor: Path, settings: dict[str, Any]) -> None:
    """One example through the untrained network: shapes that disagree show here, not hours later."""
    import torch

    kind = types.load(task)
    example = kind.collate(kind.encode(preprocessor, [kind.example(settings)]))
    try:
        with torch.no_grad():
            inputs = {name: torch.from_numpy(array) for name, array in example.items()}
            shape = tuple(kind.forward(module.eval(), inputs).shape)
    except (RuntimeError, IndexError, TypeError, ValueError, AttributeError) as error:
        shapes = {name: array.shape for name, array in example.items()}
        raise InputError(
            f"model.source: the network cannot take this recipe's inputs {shapes}: {error}"
        ) from error
    if problem := kind.wrong(shape, settings):
        raise InputError(f"model.source: {problem}")


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
    elif data.format == "imagefolder":
        tables = _folder_of_images(data)
    else:
        with store.staging() as scratch:
            found = _files(data, scratch)
            tables = {
                file.name.split(".")[0]: _beside(_parse(file, data, scratch), data, file) for file in found
            }
    lengths = {name: len(table) for name, table in tables.items()}
    if not sum(lengths.values()):
        raise InputError(f"data.source {data.source}: the data is empty")
    if data.image is None or data.image.column:  # only what is used, so that files may differ in the rest
        tables = {name: _used(part, data, name, labelled) for name, part in tables.items()}
    try:
        table = pyarrow.concat_tables(tables.values(), promote_options="permissive")
    except pyarrow.ArrowTypeError as error:
        raise InputError(
            f"data.files: the files of {data.source} disagree on a column's type: {error}"
        ) from error
    return table, [name for name, length in lengths.items() for _ in range(length)]


def _beside(table: pyarrow.Table, data: Data, file: Path) -> pyarrow.Table:
    """Paths of images are relative to the file that lists them."""
    import pyarrow

    name = data.image.column if data.image else None
    if name not in table.column_names:
        return table
    if table.schema.field(name).type not in (pyarrow.string(), pyarrow.large_string()):
        return table
    places = [None if path is None else str(file.parent / path) for path in table[name].to_pylist()]
    return table.set_column(table.column_names.index(name), name, pyarrow.array(places))


def _folder_of_images(data: Data) -> dict[str, pyarrow.Table]:
    """Every image below the source as one table: `image` (its path), and its folder's name as `label`."""
    import pyarrow

    place = locate(data.source)
    if not place.is_dir():
        raise InputError(f"data.source: {data.source} is no folder, which data.format: imagefolder reads")
    patterns = data.files or ("**/*",)
    found = sorted({f for p in patterns for f in place.glob(p) if f.suffix.lower() in PICTURES})
    if not found:
        raise InputError(f"data.source: no image ({', '.join(PICTURES)}) below {place}")
    columns_ = {"image": [str(file) for file in found], "label": [file.parent.name for file in found]}
    return {place.name: pyarrow.table(columns_)}


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
    """The input and, with labels, the label and kept columns alone."""
    label = data.label.column if isinstance(data.label, Label) else data.label
    inputs = {"data.image.column": data.image and data.image.column, "data.text": data.text}
    wanted = [(key, name) for key, name in inputs.items() if name]
    if labelled:
        wanted += [("data.label", label)] if label else []
        wanted += [("data.keep", name) for name in data.keep]
    for key, name in wanted:
        if name not in table.column_names:
            has = ", ".join(map(str, table.column_names))
            raise InputError(f"{key}: {file} has no column {name!r}; it has {has}")
    return table.select(list(dict.fromkeys(name for _, name in wanted)))


def _first_of_each(values: Sequence[Any], kept: Sequence[int]) -> list[int]:
    """The kept rows without repetitions, so that no test row was trained on."""
    seen: dict[Any, int] = {}
    for k in kept:
        seen.setdefault(columns.identity(values[k]), k)
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
    ranked = sorted(rows, key=lambda row: _rank(row[1], split.seed))
    drawn = [k for k, _ in ranked]
    test, train = drawn[: split.test], drawn[len(drawn) - split.train :]
    return {"train": train, "calibration": train[: split.calibration], "test": test}


def _rank(value: Any, seed: int) -> bytes:
    if isinstance(value, (str, list)):
        return hashlib.sha256(f"{seed} {value}".encode()).digest()
    return hashlib.sha256(f"{seed} ".encode() + columns.identity(value)).digest()


def _write(file: Path, columns: dict[str, list[Any]]) -> None:
    import pyarrow
    import pyarrow.parquet as pq

    pq.write_table(pyarrow.table(columns), file)
