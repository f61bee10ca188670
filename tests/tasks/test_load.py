from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recipes.data import Data
from recipes.schema import Model
from tasks import load
from tasks.artifacts import Dataset
from tasks.errors import InputError
from tests.conftest import WORDS, bert_folder, tokenizer

ROWS = [f"sentence number {k},{'good' if k % 3 else 'bad'}" for k in range(40)]


def table(folder: Path, rows: list[str], header: str = "text,label") -> Path:
    file = folder / "rows.csv"
    file.write_text("\n".join([header, *rows]) + "\n")
    return file


def section(file: Path, **changes: Any) -> Data:
    base: dict[str, Any] = {
        "source": f"path:{file}",
        "text": "text",
        "label": "label",
        "labels": ("bad", "good"),
        "split": {"train": 20, "test": 10, "calibration": 5},
    }
    return Data.model_validate(base | changes)


def loaded(data: Data, task: str = "text-classification") -> Dataset:
    return load.load_data.fn(data, task, load.fingerprint(data.source))


def test_rows_are_split_once_and_disjoint(fresh_home: Path, tmp_path: Path) -> None:
    data = section(table(tmp_path, [*ROWS, ROWS[0], ROWS[5]]))
    dataset = loaded(data)
    train, test = (set(load.rows(dataset, part)["text"]) for part in ("train", "test"))
    assert dataset.rows == {"train": 20, "calibration": 5, "test": 10}
    assert not train & test
    assert set(load.rows(dataset, "calibration")["text"]) <= train
    assert dataset.facts["rows_repeated"] == 2
    assert loaded(data) == dataset


def test_validation_rows_are_neither_trained_on_nor_judged_with(fresh_home: Path, tmp_path: Path) -> None:
    plain = section(table(tmp_path, ROWS))
    data = plain.model_copy(update={"split": plain.split.model_copy(update={"validation": 6})})
    before, after = loaded(plain), loaded(data)
    parts = {part: set(load.rows(after, part)["text"]) for part in ("train", "test", "validation")}
    assert {part: len(rows) for part, rows in parts.items()} == {"train": 20, "test": 10, "validation": 6}
    assert not parts["validation"] & (parts["train"] | parts["test"])
    assert before.facts["sha256"].items() <= after.facts["sha256"].items()
    greedy = plain.model_copy(update={"split": plain.split.model_copy(update={"validation": 60})})
    with pytest.raises(InputError, match=r"asks for 20 \+ 10 \+ 60 rows"):
        loaded(greedy)


def test_more_data_moves_no_trained_row_into_test(fresh_home: Path, tmp_path: Path) -> None:
    before = loaded(section(table(tmp_path, ROWS)))
    trained = set(load.rows(before, "train")["text"])
    after = loaded(section(table(tmp_path, [f"a new one {k},good" for k in range(25)] + ROWS)))
    assert not trained & set(load.rows(after, "test")["text"])


def test_further_columns_are_kept_for_the_gate(fresh_home: Path, tmp_path: Path) -> None:
    rows = [f"{row},{'en' if k % 2 else 'de'}" for k, row in enumerate(ROWS)]
    dataset = loaded(section(table(tmp_path, rows, "text,label,language"), keep=("language",)))
    assert set(load.rows(dataset, "test")["language"]) == {"en", "de"}
    assert set(load.rows(dataset, "test")["file"]) == {"rows"}


def test_kept_columns_of_any_kind_are_texts(fresh_home: Path, tmp_path: Path) -> None:
    """The gate compares them as texts, and what is logged of them must be JSON."""
    kinds = {"day": "2024-01-31 00:00:00", "tags": ["a", "b"], "stars": 5, "none": None}
    rows = [{"text": f"sentence {k}", "label": "good" if k % 2 else "bad", **kinds} for k in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = loaded(section(tmp_path / "rows.jsonl", keep=tuple(kinds)))
    found = {name: set(load.rows(dataset, "test")[name]) for name in kinds}
    assert found == {name: {str(value)} for name, value in kinds.items()}


def test_every_file_is_read_and_no_other(fresh_home: Path, tmp_path: Path) -> None:
    """Shards share what stands before the first dot, folders of a partition their files' whole name."""
    parts = ("part.0.csv", "part.1.csv", "a/rows[0].csv", "b/rows[0].csv", "b/rows*.csv")
    for k, name in enumerate(parts):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("\n".join(["text,label", *ROWS[8 * k : 8 * (k + 1)]]) + "\n")
    dataset = loaded(section(tmp_path, files=("**/*.csv",)))
    assert (dataset.facts["rows_read"], dataset.facts["rows_repeated"]) == (len(ROWS), 0)
    assert set(load.rows(dataset, "train")["file"]) == {"part", "rows[0]", "rows*"}


def test_words_that_a_csv_reads_as_missing_are_told_and_can_be_kept(fresh_home: Path, tmp_path: Path) -> None:
    """pandas reads `None` and `NA` so."""
    way = r"unless data\.read is {keep_default_na: false}"
    texts = table(tmp_path, [*ROWS, "None,good"])
    with pytest.raises(InputError, match=f"rows have no text .*row 41: None.*{way}"):
        loaded(section(texts))
    labels = {"labels": ("NA", "good")}
    names = table(tmp_path, [row.replace("bad", "NA") for row in ROWS])
    with pytest.raises(InputError, match=f"unknown label None .*, row 1; data.labels has NA, good; .*{way}"):
        loaded(section(names, **labels))
    assert loaded(section(names, **labels, read={"keep_default_na": False})).facts["rows_read"] == len(ROWS)
    empty = table(tmp_path, [row.replace("bad", "") for row in ROWS])
    with pytest.raises(InputError, match="unknown label None .*, row 1; data.labels has None, good"):
        loaded(section(empty, labels=("None", "good")))


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz", "rows.jsonl", "rows.jsonl.gz", "rows.json.gz"])
def test_the_name_tells_the_format_with_gz_behind_it_too(fresh_home: Path, tmp_path: Path, name: str) -> None:
    lines = ["text,label", *ROWS]
    if "json" in name:
        lines = [json.dumps(dict(zip(("text", "label"), row.split(","), strict=True))) for row in ROWS]
    content = "\n".join(lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert loaded(section(tmp_path / name)).facts["rows_read"] == len(ROWS)
    shutil.move(tmp_path / name, tmp_path / "rows.gz")
    with pytest.raises(InputError, match=r"rows\.gz: cannot tell the format .*; set data\.format"):
        loaded(section(tmp_path / "rows.gz"))


@pytest.mark.parametrize("pattern", ["{0}/rows.csv", "**.csv"])
@pytest.mark.parametrize("format", [None, "imagefolder"])
def test_files_are_patterns_below_the_source(
    fresh_home: Path, tmp_path: Path, pattern: str, format: str | None
) -> None:
    table(tmp_path, ROWS)
    with pytest.raises(InputError, match=r"data\.files: '.*' is not a pattern .*; write it relative to"):
        loaded(section(tmp_path, files=(pattern.format(tmp_path),), format=format))


@pytest.mark.parametrize("end", ["", " ;", " -- all of them", "\n-- all\n-- of them\n"])
def test_a_query_may_end_with_a_comment(fresh_home: Path, tmp_path: Path, end: str) -> None:
    import pyarrow
    import pyarrow.parquet as pq

    texts, labels = zip(*(row.split(",") for row in ROWS), strict=True)
    pq.write_table(pyarrow.table({"text": texts, "label": labels}), tmp_path / "rows.parquet")
    data = section(tmp_path / "rows.parquet", query=f"SELECT text, label FROM rows WHERE text != ''{end}")
    assert loaded(data).facts["rows_read"] == len(ROWS)


def test_labels_from_numbers_leave_out_what_is_near_the_cut(fresh_home: Path, tmp_path: Path) -> None:
    rows = [f"sentence {k},{k - 20}" for k in range(41)]
    rule = {"column": "rating", "cut": 0, "margin": 5}
    dataset = loaded(section(table(tmp_path, rows, "text,rating"), label=rule))
    assert dataset.facts["rows_without_label"] == 11
    for text, label in zip(*(load.rows(dataset, "train")[k] for k in ("text", "label")), strict=True):
        assert label == (int(text.split()[1]) > 20)


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        ([], {}, "is empty"),
        ([*ROWS, "a new one,awful"], {}, "unknown label 'awful'.*row 41.*bad, good"),
        ([*ROWS, ",good"], {}, "1 of 41 rows have no text.*row 41"),
        (ROWS, {"text": "sentence"}, "no column 'sentence'; it has text, label"),
        (ROWS, {"label": "class"}, "no column 'class'"),
        (ROWS, {"split": {"train": 35, "test": 10}}, r"asks for 35 \+ 10 rows, the data has 40"),
        (ROWS, {"split": {"train": 20, "test": 10, "calibration": 21}}, "more than train"),
        (ROWS, {"label": {"column": "label", "cut": 0}}, "no finite number in column 'label'"),
        (
            [f"sentence {k},good" for k in range(40)],
            {},
            "every training row is 'good'; give rows of other",
        ),
        (ROWS, {"read": {"seperator": ";"}}, "cannot be read as csv"),
        (ROWS, {"files": ["*.parquet"]}, "matches"),
    ],
)
def test_bad_data_is_named(
    fresh_home: Path, tmp_path: Path, rows: list[str], changes: dict[str, Any], words: str
) -> None:
    file = table(tmp_path, rows)
    if "files" in changes:
        changes = changes | {"source": f"path:{tmp_path}"}
    with pytest.raises(InputError, match=words):
        loaded(section(file, **changes))


def test_numbers_that_are_not_finite_are_named(fresh_home: Path, tmp_path: Path) -> None:
    file = table(tmp_path, [*(f"sentence {k},{k}" for k in range(40)), "last,nan"], "text,rating")
    with pytest.raises(InputError, match="no finite number.*row 41"):
        loaded(section(file, label={"column": "rating", "cut": 3}))


def test_images_with_nan_or_the_wrong_size_are_named(fresh_home: Path, tmp_path: Path) -> None:
    rows = [f"{k},{k},{k},{k},{'good' if k % 2 else 'bad'}" for k in range(40)]
    image = {"image": {"shape": (1, 2, 2)}, "text": None}
    assert (
        loaded(section(table(tmp_path, rows, "a,b,c,d,label"), **image), "image-classification").rows["test"]
        == 10
    )
    with pytest.raises(InputError, match="NaN or infinity.*row 41"):
        bad = table(tmp_path, [*rows, "1,2,nan,4,good"], "a,b,c,d,label")
        loaded(section(bad, **image), "image-classification")
    with pytest.raises(InputError, match="label column 'label' is among the first 5 columns"):
        five = section(table(tmp_path, rows, "a,b,c,d,label"), image={"shape": (1, 1, 5)}, text=None)
        loaded(five, "image-classification")
    with pytest.raises(InputError, match="needs 12 columns, there are 5"):
        large = section(table(tmp_path, rows, "a,b,c,d,label"), image={"shape": (3, 2, 2)}, text=None)
        loaded(large, "image-classification")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("path:/no/such/place", "no such file or folder"),
        ("package:no-such-package/x", "is not installed"),
        ("package:scikit-learn/no/such/file.csv", "holds no file that ends with"),
        ("python:no_such_module:f", "no module"),
    ],
)
def test_a_source_that_is_not_there(source: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load.fingerprint(source)


def test_a_package_s_file_and_folder_are_found_without_importing_it() -> None:
    assert load.locate("package:scikit-learn/datasets/data/digits.csv.gz").is_file()
    assert (load.locate("package:scikit-learn/sklearn/datasets/data") / "digits.csv.gz").is_file()


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    file = table(tmp_path, ROWS)
    before = load.fingerprint(f"path:{file}")
    table(tmp_path, ROWS[:-1])
    assert load.fingerprint(f"path:{file}") != before


def test_a_tokenizer_trained_again_in_its_place_is_another_network(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_text("{}")
    own = Model(
        name="m", source="python:recipes.tiny_llama:build", tokenizer=f"path:{tmp_path / 'tokenizer'}"
    )
    data = section(table(tmp_path, ROWS))

    def key() -> str:
        return load.load_model.key(own, data, "causal-lm", "content", 0, load.tokenizer(own))

    before = key()
    assert key() == before
    (tmp_path / "tokenizer/tokenizer.json").write_text('{"model": {}}')
    assert key() != before
    assert load.tokenizer(own.model_copy(update={"tokenizer": None})) == ""


OWN = {
    "mine/__init__.py": "",
    "mine/score.py": "import json, beside\nfrom recipes.loader import RecipeError\nfrom .parts import table",
    "mine/parts/__init__.py": "",
    "mine/parts/table.py": "from mine import deep",
    "mine/deep.py": "",
    "mine/apart.py": "",
    "beside.py": "",
}


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of the user's, and what lies beside it."""
    for name, text in OWN.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "mine"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("mine/score.py", True),
        ("mine/parts/__init__.py", True),
        ("mine/parts/table.py", True),
        ("mine/deep.py", True),
        ("beside.py", True),
        ("mine/apart.py", False),
    ],
)
def test_a_function_s_fingerprint_follows_what_its_module_imports(
    own_code: Path, file: str, counts: bool
) -> None:
    before = load.fingerprint("python:mine.score:f")
    assert load.fingerprint("python:mine.score:g") == before
    (own_code / file).write_text(f"{OWN[file]}\n# edited")
    assert (load.fingerprint("python:mine.score:f") != before) is counts


def test_a_module_that_cannot_be_read_or_found_is_told(own_code: Path) -> None:
    (own_code / "mine" / "deep.py").write_text("def broken(")
    with pytest.raises(InputError, match=r"deep\.py: not Python"):
        load.fingerprint("python:mine.score:f")
    for name in ("mine.none", "sys", ""):
        with pytest.raises(InputError, match="no module"):
            load.fingerprint(f"python:{name}:f")


def test_of_an_installed_module_its_own_file_counts() -> None:
    assert load.fingerprint("python:statistics:fmean") == load.fingerprint("python:statistics:mean")
    assert load.fingerprint("python:recipes.digits_cnn:build") != load.fingerprint("python:statistics:mean")


TEXTS = section(Path("rows.csv"), max_length=32)


def network(source: str, data: Data = TEXTS, **changes: Any) -> None:
    model = Model.model_validate({"name": "m", "source": source, **changes})
    load.load_model.fn(model, data, "text-classification", "content", 0)


def test_texts_longer_than_the_network_takes_are_told_before_training(
    fresh_home: Path, tmp_path: Path
) -> None:
    source = f"path:{bert_folder(tmp_path)}"  # with 32 positions
    network(source)
    longer = TEXTS.model_copy(update={"max_length": 128})
    with pytest.raises(InputError, match=r"data\.max_length is 128, the longest .* takes has 32 tokens"):
        network(source, longer)


def test_a_tokenizer_beyond_the_embedding_is_told_before_training(fresh_home: Path, tmp_path: Path) -> None:
    source = f"path:{bert_folder(tmp_path / 'bert')}"  # with 64 rows
    network(source)
    tokenizer(tmp_path / "large", [*WORDS, *(f"word{k}" for k in range(60))])
    words = r"model\.tokenizer: .* go up to 73, the network takes none above 63; .*embedding has 74 rows"
    with pytest.raises(InputError, match=words):
        network(source, tokenizer=f"path:{tmp_path / 'large'}")


def test_a_tokenizer_that_serving_cannot_read_is_told(fresh_home: Path, tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path / "bytes")
    words = r"bytes: its tokenizer \(ByT5Tokenizer\) has no tokenizer\.json.*set model\.tokenizer"
    with pytest.raises(InputError, match=words):
        network(f"path:{bert_folder(tmp_path / 'bert')}", tokenizer=f"path:{tmp_path / 'bytes'}")


def test_texts_are_tried_on_a_network_of_ones_own(
    fresh_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may keep its tables anywhere, or have none."""
    (tmp_path / "own_texts.py").write_text(OWN_NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_texts", raising=False)
    tokenizer(tmp_path, WORDS)
    own = {"tokenizer": f"path:{tmp_path}"}
    network("python:own_texts:Hashed", **own)
    with pytest.raises(InputError, match="go up to 13, the network takes none above 9;"):
        network("python:own_texts:Table", **own)


OWN_NETWORK = """
import torch
from torch import nn

class Table(nn.Module):
    def __init__(self, labels):
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(10, labels))

    def forward(self, ids, mask):
        return self.rows[ids].mean(dim=1)

class Hashed(Table):
    def forward(self, ids, mask):
        return super().forward(ids % 10, mask)
"""
