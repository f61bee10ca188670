"""The rows that an earlier version was held to: kept beside it, and asked again of the next one."""

from __future__ import annotations

import shutil

from tasks import columns, load, store
from tasks.artifacts import Blob, Dataset
from tasks.errors import InputError
from tasks.stage import stage

PARTS = ("test", "calibration")


def held_out(dataset: Dataset) -> Blob:
    """The rows that a version must keep at hand wherever it is retrained or watched: test and calibration."""
    with store.staging() as folder:
        for part in PARTS:
            shutil.copy(store.path(dataset.blob) / f"{part}.parquet", folder / f"{part}.parquet")
        return store.commit(folder)


@stage(uses=("pyarrow",), name="previous rows", timeout_seconds=600)
def previous_rows(held: Dataset, dataset: Dataset) -> Dataset:
    """The earlier held-out rows but for those that the new training saw: those would hide forgetting."""
    import pyarrow
    import pyarrow.parquet as pq

    column = load.column(dataset.type)
    seen = load.rows(dataset, "train")[column] if "train" in dataset.rows else []
    trained = {columns.identity(value) for value in seen}
    table = pq.read_table(store.path(held.blob) / "test.parquet")
    rows = load.rows(held, "test")[column]
    kept = [k for k, value in enumerate(rows) if columns.identity(value) not in trained]
    if not kept:
        raise InputError(
            "gate.max_forgetting: every row that the champion was held to is now in the training rows; "
            "change data.split, or remove max_forgetting"
        )
    with store.staging() as folder:
        pq.write_table(table.take(pyarrow.array(kept)), folder / "test.parquet")
        facts = {"left_out_because_trained_on": len(table) - len(kept)}
        return Dataset(store.commit(folder), held.type, held.labels, {"test": len(kept)}, facts)
