"""Read: what `data.source` holds, as one table: files, a folder, a package or a hub data set."""

from __future__ import annotations

import glob
import importlib.metadata
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.data import Data, Label
from tasks import query, store
from tasks.errors import InputError

if TYPE_CHECKING:
    import pyarrow

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
SUFFIXES = {".csv": "csv", ".txt": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}


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


def table_of(data: Data, content: str, labelled: bool = True) -> tuple[pyarrow.Table, list[str]]:
    """All rows as one table, and the name of the file that each came from."""
    import datasets
    import pyarrow

    datasets.disable_progress_bars()
    tables: list[tuple[str, pyarrow.Table]]  # files of several folders may have the same name
    if data.query is not None:
        tables = [("query", query.result(data.query, parquet(data)))]
    elif data.source.startswith("hub:"):
        parts = datasets.load_dataset(
            data.source.removeprefix("hub:"), revision=content, data_files=list(data.files) or None
        )
        tables = [(name, part.data.table) for name, part in parts.items()]
    elif data.format == "imagefolder":
        tables = [_folder_of_images(data)]
    else:
        with store.staging() as scratch:
            found = _files(data, scratch)
            tables = [
                (file.name.split(".")[0], _beside(_parse(file, data, scratch), data, file, scratch))
                for file in found
            ]
    files = [name for name, part in tables for _ in range(len(part))]
    if not files:
        raise InputError(f"data.source {data.source}: the data is empty")
    if data.image is None or data.image.column:  # only what is used, so that files may differ in the rest
        tables = [(name, _used(part, data, name, labelled)) for name, part in tables]
    try:
        table = pyarrow.concat_tables([part for _, part in tables], promote_options="permissive")
    except pyarrow.ArrowTypeError as error:
        raise InputError(
            f"data.files: the files of {data.source} disagree on a column's type: {error}"
        ) from error
    return table, files


def _beside(table: pyarrow.Table, data: Data, file: Path, scratch: Path) -> pyarrow.Table:
    """Paths of images are relative to the file that lists them; `scratch` is gone when they are opened."""
    import pyarrow

    name = data.image.column if data.image else None
    if name not in table.column_names:
        return table
    if table.schema.field(name).type not in (pyarrow.string(), pyarrow.large_string()):
        return table
    places = [None if path is None else file.parent / path for path in table[name].to_pylist()]
    if any(place and place.is_relative_to(scratch) for place in places):
        raise InputError(
            f"data.source: {data.source} is an archive, and {file.name} in it lists images by their paths, "
            "which are only read from a folder; unpack it, and name the folder"
        )
    paths = pyarrow.array([place and str(place) for place in places], pyarrow.string())
    return table.set_column(table.column_names.index(name), name, paths)


def _folder_of_images(data: Data) -> tuple[str, pyarrow.Table]:
    """Every image below the source as one table: `image` (its path), and its folder's name as `label`."""
    import pyarrow

    place = locate(data.source)
    if not place.is_dir():
        raise InputError(f"data.source: {data.source} is no folder, which data.format: imagefolder reads")
    patterns = data.files or ("**/*",)
    files = set().union(*(_matching(place.glob, pattern, data) for pattern in patterns))
    found = sorted(file for file in files if file.suffix.lower() in PICTURES)
    if not found:
        raise InputError(f"data.source: no image ({', '.join(PICTURES)}) below {place}")
    columns_ = {"image": [str(file) for file in found], "label": [file.parent.name for file in found]}
    return place.name, pyarrow.table(columns_)


def _files(data: Data, scratch: Path) -> list[Path]:
    place = locate(data.source)
    if place.is_file() and tarfile.is_tarfile(place):
        with tarfile.open(place) as archive:
            archive.extractall(scratch / "archive", filter="data")
        place = scratch / "archive"
    if place.is_file():
        return [place]
    matched = {pattern: _matching(place.rglob, pattern, data) for pattern in data.files or ("*",)}
    if missing := [pattern for pattern, files in matched.items() if not files]:
        raise InputError(f"data.files: nothing in {data.source} matches {', '.join(missing)}")
    return sorted(set().union(*matched.values()))


def _matching(find: Callable[[str], Iterable[Path]], pattern: str, data: Data) -> set[Path]:
    try:
        return {file for file in find(pattern) if file.is_file()}
    except (NotImplementedError, ValueError) as error:  # an absolute one, or `**` within a name
        raise InputError(
            f"data.files: {pattern!r} is not a pattern of files below {data.source}: {error}; write it "
            "relative to that folder, for example *.csv or 2024/**/*.parquet"
        ) from error


def parquet(data: Data) -> list[Path]:
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

    suffix = Path(file.name.removesuffix(".gz")).suffix
    kind = data.format or SUFFIXES.get(suffix, suffix.removeprefix("."))
    if kind not in ("csv", "json", "parquet"):
        raise InputError(
            f"{file}: cannot tell the format from the name; set data.format to csv, json or parquet"
        )
    if file.stat().st_size == 0:
        raise InputError(f"{file}: the file is empty")
    try:
        loaded = load_dataset(
            kind,
            data_files=[glob.escape(str(file))],  # else `*` or `[1]` in a name would be a pattern
            split="train",
            cache_dir=scratch / "cache",
            **data.read,
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
