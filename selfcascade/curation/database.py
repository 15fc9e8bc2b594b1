"""A database in memory that goes to disk where memory is short: what compares all rows of a listing with each other does it there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import duckdb
import pyarrow as pa

BATCH = 65_536
"""Rows that go in or come out at a time."""
MEMORY = "1GB"
"""What the engine may hold before it goes to disk."""


def database() -> duckdb.DuckDBPyConnection:
    """An empty database in memory, which spills into a folder of its own."""
    connection = duckdb.connect()
    connection.execute(f"SET memory_limit = '{MEMORY}'")
    connection.execute("SET preserve_insertion_order = false")
    connection.execute(f"SET temp_directory = '{tempfile.gettempdir()}/selfcascade-duckdb'")
    connection.execute("SET enable_progress_bar = false")
    return connection


def fill(connection: duckdb.DuckDBPyConnection, table: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """A new table of ``batches``, one after another: what making them raises comes through as it is."""
    connection.register("arriving", schema.empty_table())
    connection.execute(f"CREATE TABLE {table} AS SELECT * FROM arriving")
    for batch in batches:
        connection.register("arriving", batch)
        connection.execute(f"INSERT INTO {table} SELECT * FROM arriving")
    connection.unregister("arriving")


def rows_of(found: duckdb.DuckDBPyRelation) -> Iterator[tuple[Any, ...]]:
    """Rows of a query, a batch of them in memory."""
    for batch in found.to_arrow_reader(BATCH):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)
