"""The same pictures as files in folders, paths in a table, `datasets` images and arrays; and a tiny ViT."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recipes.build import Export
from recipes.compress import Finetune, Quantize, Sparsify
from recipes.data import Data
from recipes.schema import Model
from tasks import batches, checkpoints, load, store
from tasks.artifacts import Dataset
from tasks.calibrate import calibrate
from tasks.engines import onnxruntime
from tasks.errors import InputError
from tasks.export import export
from tasks.finetune import finetune
from tasks.sparsify import sparsify

TASK = "image-classification"
COUNT = 40


def drawn() -> list[tuple[np.ndarray, str]]:
    """Grey pictures of 8 x 8, bright on the left or on the right."""
    rng = np.random.default_rng(0)
    found = []
    for k in range(COUNT):
        picture = rng.integers(0, 100, (8, 8), dtype=np.uint8)
        side = slice(0, 4) if k % 2 else slice(4, 8)
        picture[:, side] += 120
        found.append((picture, "left" if k % 2 else "right"))
    return found


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PNG files in a folder per label, and tables about them beside."""
    import datasets
    import PIL.Image

    folder = tmp_path_factory.mktemp("pictures")
    rows = ["image,label"]
    for k, (pixels, label) in enumerate(drawn()):
        place = folder / "sides" / label / f"{k:03}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(pixels).save(place)
        rows.append(f"sides/{label}/{k:03}.png,{label}")
    (folder / "rows.csv").write_text("\n".join(rows) + "\n")
    labels = [label for _, label in drawn()]
    files = [str(folder / row.split(",")[0]) for row in rows[1:]]
    made = datasets.Dataset.from_dict({"image": files, "label": labels})
    made.cast_column("image", datasets.Image()).to_parquet(folder / "images.parquet")
    arrays = [pixels.tolist() for pixels, _ in drawn()]
    datasets.Dataset.from_dict({"image": arrays, "label": labels}).to_parquet(folder / "arrays.parquet")
    return folder


def section(folder: Path, **changes: Any) -> Data:
    base: dict[str, Any] = {
        "source": f"path:{folder}",
        "image": {"shape": (1, 8, 8), "column": "image", "scale": 1 / 255},
        "label": "label",
        "labels": ("left", "right"),
        "split": {"train": 24, "test": 16, "calibration": 8},
    }
    return Data.model_validate(base | changes)


def loaded(data: Data) -> Dataset:
    return load.load_data.fn(data, TASK, "content")


WAYS: dict[str, dict[str, Any]] = {
    "folder": {"format": "imagefolder"},
    "paths": {"files": ["rows.csv"]},
    "datasets": {"files": ["images.parquet"]},
    "arrays": {"files": ["arrays.parquet"]},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same_rows(pictures: Path, way: str) -> None:
    dataset = loaded(section(pictures, **WAYS[way]))
    found = {tuple(image): k for part in ("train", "test") for image, k in _rows(dataset, part)}
    assert found == {tuple(map(float, p.ravel())): int(label == "right") for p, label in drawn()}


def _rows(dataset: Dataset, part: str) -> list[tuple[list[float], int]]:
    rows = load.rows(dataset, part)
    return list(zip(rows["image"], rows["label"], strict=True))


def test_files_are_resized_and_coloured_as_the_recipe_says(pictures: Path) -> None:
    image = {"shape": (3, 4, 6), "column": "image"}
    dataset = loaded(section(pictures, format="imagefolder", image=image))
    picture = np.reshape(load.rows(dataset, "test")["image"][0], (3, 4, 6))
    assert np.array_equal(picture[0], picture[2])
    assert 0 < picture.max() <= 255


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "imagefolder", "source": "path:{0}/rows.csv"}, "is no folder"),
        ({"format": "imagefolder", "source": "path:{0}/none"}, "no such file or folder"),
        ({"format": "imagefolder", "files": ["*.gif"]}, "no image .*below"),
        ({"files": ["broken.csv"]}, "row 1 of column 'image' is not an image: cannot identify image file"),
        ({"files": ["missing.csv"]}, "row 1 of column 'image' is not an image: .*No such file"),
        ({"files": ["cut.csv"]}, r"row 1 of column 'image' is not an image \(.*/cut\.png\): .*truncated"),
        (
            {"files": ["deep.csv"]},
            r"not an image \(.*/deep\.png\): its pixels \(I;16\) have more than 8 bits",
        ),
        (
            {"files": ["huge.csv"]},
            r"row 1 .* not an image \(.*/huge\.png\): .*400000000 pixels.* exceeds limit",
        ),
        ({"files": ["rows.csv"], "image": {"shape": (1, 8, 8), "column": "picture"}}, "no column 'picture'"),
        ({"files": ["rows.csv"], "image": {"shape": (2, 8, 8), "column": "image"}}, "1 or 3 channels"),
        ({"files": ["arrays.parquet"], "image": {"shape": (1, 9, 9), "column": "image"}}, r"shape \(8, 8\)"),
        (
            {"files": ["last.json"], "image": {"shape": (3, 4, 5), "column": "image"}},
            r"row 1 .* expected an image of shape \(3, 4, 5\) \(channels, .*, got one of shape \(4, 5, 3\)",
        ),
    ],
)
def test_bad_images_are_named(pictures: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    (pictures / "broken.csv").write_text("image,label\nrows.csv,left\n")
    channels_last = [{"image": np.zeros((4, 5, 3)).tolist(), "label": "left"}]
    (pictures / "last.json").write_text(json.dumps(channels_last))
    (pictures / "missing.csv").write_text("image,label\nnone.png,left\n")
    contents = {"cut": _png(np.uint8)[:-24], "deep": _png(np.uint16), "huge": _claiming(20_000)}
    for name, content in contents.items():
        (tmp_path / f"{name}.png").write_bytes(content)
        (pictures / f"{name}.csv").write_text(f"image,label\n{tmp_path / name}.png,left\n")
    if "source" in changes:
        changes = changes | {"source": changes["source"].format(pictures)}
    with pytest.raises(InputError, match=words):
        loaded(section(pictures, **changes))


def test_images_that_a_table_in_an_archive_lists_are_refused(pictures: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        archive.add(pictures / "rows.csv", "rows.csv")
        archive.add(pictures / "sides", "sides")
        archive.add(pictures / "images.parquet", "images.parquet")
    data = {"source": f"path:{tmp_path / 'all.tar'}"}
    with pytest.raises(InputError, match=r"all\.tar is an archive, and rows\.csv in it lists .*unpack it"):
        loaded(section(pictures, files=["rows.csv"], **data))
    assert loaded(section(pictures, files=["images.parquet"], **data)).facts["rows_read"] == COUNT


def _png(kind: Any) -> bytes:
    import PIL.Image

    out = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 200, (64, 64)).astype(kind)).save(out, "PNG")
    return out.getvalue()


def _claiming(size: int) -> bytes:
    """A PNG without pixels, whose header says that it is so wide and so high."""
    header = struct.pack(">II", size, size) + bytes([8, 0, 0, 0, 0])
    chunks = [(b"IHDR", header), (b"IDAT", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def vit_folder(folder: Path) -> Path:
    """A ViT of two layers, as transformers saves it, with a head for three other classes."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64, num_labels=3,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    return folder


def test_a_vit_from_a_hugging_face_folder_goes_the_whole_way(pictures: Path, tmp_path: Path) -> None:
    """New head, 2:4, INT8, a few steps with both on, exported: the graph is sparse, integer and right."""
    import torch

    image = {"shape": (1, 8, 8), "column": "image", "scale": 1 / 255, "mean": [0.5], "std": [0.25]}
    data = section(pictures, image=image, **WAYS["folder"])
    dataset = loaded(data)
    model = Model(name="vit", source=f"path:{vit_folder(tmp_path / 'vit')}")
    start = load.load_model.fn(model, data, TASK, "content", 0)
    settings = json.loads((batches.preprocessor(start) / "settings.json").read_text())
    assert (settings["mean"], settings["std"], settings["shape"]) == ([0.5], [0.25], [1, 8, 8])

    left_out = ("classifier", "vit.embeddings.patch_embeddings.projection")
    pruned = sparsify.fn(start, dataset, Sparsify(exclude=left_out))
    quantized = calibrate.fn(pruned, dataset, Quantize(format="int8", exclude=("classifier",)))
    trained = finetune.fn(quantized, dataset, Finetune(epochs=1, batch_size=8, learning_rate=1e-3))
    assert trained.facts["sparsity"]["exact_modules"] == 12  # 6 in each of 2 layers
    assert trained.facts["quantizers"]["weights"] == 13  # and the patches' projection: none is left out

    made = export.fn(trained, dataset, Export(), "fp32")
    assert made.facts["sparse_weights"] == 12
    network, _ = checkpoints.restore(trained)
    for batch in batches.samples(dataset, batches.preprocessor(trained), count=2, size=5):
        with torch.no_grad():
            wanted = network(**batches.tensors(batch)).logits.numpy()
        with onnxruntime.open(store.path(made.blob), None, level="disabled") as session:
            np.testing.assert_allclose(session.run(batch)["logits"], wanted, atol=1e-4)
