"""The `data` section: where the rows are, which columns hold inputs and labels, how they are split."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

PLACE = r"hub:[\w.-]+(/[\w.-]+)?|path:.+|package:[\w.-]+/.+"
Rows = Annotated[str, StringConstraints(pattern=rf"^({PLACE})$")]
Source = Annotated[str, StringConstraints(pattern=rf"^({PLACE}|modelopt:.+|python:[\w.]+:\w+)$")]


class Section(BaseModel):
    """Base of every section: frozen, and a key it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Label(Section):
    """A label from a number: below `cut` is the first class, above it the second, near it is left out."""

    column: str
    cut: float
    margin: float = Field(0.0, ge=0)


class Image(Section):
    """Images in `column` (files, their paths, or arrays), or in a table's first columns, row by row.

    Files are read in color or (one channel) grey and resized to `shape`: channels, height, width. A pixel
    becomes (pixel * scale - mean) / std, the latter two per channel.
    """

    shape: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    column: str | None = None
    scale: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[Annotated[float, Field(gt=0)], ...] = ()

    @model_validator(mode="after")
    def _per_channel(self) -> Image:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values and len(values) != self.shape[0]:
                raise ValueError(f"{name} has {len(values)} values, the images have {self.shape[0]} channels")
        return self


class Split(Section):
    """Rows in each part; they are disjoint, and drawn with `seed`. Calibration rows are training rows.

    `validation` rows are looked at while training, and by nothing else.
    """

    train: int = Field(ge=1)
    test: int = Field(ge=1)
    validation: int = Field(0, ge=0)
    calibration: int = Field(256, ge=1)
    seed: int = 0


class Data(Section):
    """Rows: a file, a folder, a package or a hub data set, and how to read it.

    `format: imagefolder` is a folder of images, a subfolder per label (columns `image` and `label`).
    `keep` names further columns, for the gate's floors, to which every value is a text. `query` is SQL
    (DuckDB's) over Parquet files, which it sees as the table `rows`; its result is the data, whatever else
    the files hold. `prompt` makes an image's text of its label: `a photo of a {label}`.
    """

    source: Rows
    revision: str | None = None
    files: tuple[str, ...] = ()
    format: Literal["csv", "json", "parquet", "imagefolder"] | None = None
    read: dict[str, Any] = Field(default_factory=dict)
    query: str | None = None
    keep: tuple[str, ...] = ()
    text: str | None = None
    image: Image | None = None
    label: str | Label | None = None
    labels: tuple[str, ...] = ()
    prompt: str | None = None
    split: Split
    max_length: int = Field(128, ge=2, le=8192)

    @model_validator(mode="after")
    def _labels_together(self) -> Data:
        if self.label is not None and len(self.labels) < 2:
            raise ValueError("labels: name the classes of `label`, at least two")
        if twice := sorted({name for name in self.labels if self.labels.count(name) > 1}):
            raise ValueError(f"labels: {', '.join(twice)} is named more than once")
        if self.label is None and self.labels:
            raise ValueError("labels are named and no `label` says where they are; add it")
        if self.prompt is not None and (self.label is None or "{label}" not in self.prompt):
            raise ValueError("prompt is a text around {label}, which `label` and `labels` are needed for")
        return self
