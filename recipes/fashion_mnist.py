"""Fashion-MNIST's four files as Parquet files with images that `datasets` can show.

python -m recipes.fashion_mnist SOURCE TARGET     (behind `make fashion`)
"""

from __future__ import annotations

import gzip
import io
import struct
import sys
from pathlib import Path

LABELS = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"
)  # fmt: skip
SIDE = 28


def main(source: Path, target: Path) -> None:
    """Write `train.parquet` (60,000 rows) and `t10k.parquet` (10,000): `image` as PNG, `label` as a word."""
    target.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        images = content(source / f"{part}-images-idx3-ubyte.gz", 16)
        labels = content(source / f"{part}-labels-idx1-ubyte.gz", 8)
        write(images, labels, target / f"{part}.parquet")


def content(file: Path, header: int) -> bytes:
    """The numbers behind the header of a file in MNIST's format, as many as the header says."""
    if not file.is_file():
        raise SystemExit(
            f"{file} is not there: install Debian's package dataset-fashion-mnist, or name the folder with "
            "Fashion-MNIST's four .gz files: make fashion FASHION=FOLDER"
        )
    whole = gzip.decompress(file.read_bytes())
    count, *sides = struct.unpack(f">{header // 4 - 1}I", whole[4:header])
    assert len(whole) == header + count * (SIDE * SIDE if sides else 1), file
    return whole[header:]


def write(images: bytes, labels: bytes, file: Path) -> None:
    """One row per image."""
    import datasets
    import PIL.Image

    rows = []
    for start in range(0, len(images), SIDE * SIDE):
        png = io.BytesIO()
        picture = PIL.Image.frombytes("L", (SIDE, SIDE), images[start : start + SIDE * SIDE])
        picture.save(png, format="PNG", compress_level=1)
        rows.append({"bytes": png.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    words = [LABELS[k] for k in labels]
    datasets.Dataset.from_dict({"image": rows, "label": words}, features=features).to_parquet(file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
