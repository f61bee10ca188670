"""SQL over Parquet files with DuckDB: the data is the query's result, whatever else the files hold."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.errors import InputError

if TYPE_CHECKING:
    import pyarrow


def result(sql: str, files: Sequence[Path]) -> pyarrow.Table:
    """The rows of `sql`, in an order of their own values; `rows` is the table of all files.

    The query sees these files and nothing else of the machine.
    """
    import duckdb

    allowed = [str(file.resolve()) for file in files]
    try:
        with duckdb.connect() as connection:
            connection.execute("SET allowed_paths = $1", [allowed])
            connection.execute("SET enable_external_access = false")
            connection.execute("SET lock_configuration = true")
            connection.read_parquet(allowed, union_by_name=True).create_view("rows")
            # Sorted by every column: the same rows are the same data, however the files are laid out.
            # A comment at the query's end goes to the end of its line.
            return connection.sql(
                f"SELECT * FROM ({sql.strip().rstrip(';')}\n) ORDER BY ALL"
            ).to_arrow_table()
    except duckdb.Error as error:
        raise InputError(f"data.query: {error} (the files are the table `rows`)") from error


def digest(table: pyarrow.Table) -> str:
    """sha256 over the result's columns and values."""
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return hashlib.sha256(sink.getvalue()).hexdigest()
