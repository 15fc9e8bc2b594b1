"""Duplicates: the same content under two names, and the same caption on many pictures."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from typing import IO

import duckdb
import pyarrow as pa

from selfcascade.config import FilterSettings
from selfcascade.curation import filters
from selfcascade.curation.decoding import format_of_name
from selfcascade.curation.record import Entry, Rejected

BATCH = 65_536
MEMORY = "1GB"
"""What the engine may hold before it goes to disk."""
SCHEMA = pa.schema([("key", pa.string()), ("identity", pa.binary()), ("caption", pa.binary())])
FACTS = """
    SELECT key, first, copies
    FROM inputs
    JOIN (SELECT identity, min(key) AS first FROM inputs GROUP BY identity) USING (identity)
    JOIN (SELECT caption, count(*) AS copies FROM inputs GROUP BY caption) USING (caption)
    ORDER BY key
"""


def mark_duplicates(entries: Iterable[Entry], settings: FilterSettings) -> Iterator[Entry]:
    """Reject every entry whose content an earlier one has, or whose caption too many share.

    Of entries in order of their keys the first of each content survives, whatever the workers. Entries that are rejected already neither count nor survive.
    What a file claims to be belongs to its identity: JPEG bytes that are named ``.png`` will be rejected, and must not take the well-named copy with them.
    Memory stays bounded: what does not fit goes to disk.

    Args:
        entries: in the order of their keys; each is looked at once.
        settings: how many may share a caption.
    """
    with tempfile.TemporaryFile(prefix="selfcascade-") as kept, database() as connection:
        fill(connection, "inputs", SCHEMA, _batches(_written(entries, kept)))
        found = _rows(connection.sql(FACTS).to_arrow_reader(BATCH))
        kept.seek(0)
        for entry in map(Entry.from_line, kept):
            if entry.reason is not None:
                yield entry
                continue
            key, first, copies = next(found)
            assert key == entry.key, (key, entry.key)
            try:
                filters.check_copies(copies, settings)
                yield entry if first == key else entry.rejected(f"duplicate of {first}")
            except Rejected as rejection:
                yield entry.rejected(rejection.reason)


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


def _written(entries: Iterable[Entry], file: IO[bytes]) -> Iterator[Entry]:
    for entry in entries:
        file.write(entry.to_line())
        yield entry


def _batches(entries: Iterable[Entry]) -> Iterator[pa.RecordBatch]:
    rows: list[tuple[str, bytes, bytes]] = []
    for entry in entries:
        if entry.reason is None:
            identity = repr((entry.digest, entry.size, format_of_name(entry.source))).encode()
            rows.append((entry.key, hashlib.sha256(identity).digest()[:16], hashlib.sha256((entry.caption or "").casefold().encode()).digest()[:16]))
        if len(rows) == BATCH:
            yield _batch(rows)
            rows.clear()
    yield _batch(rows)


def _batch(rows: list[tuple[str, bytes, bytes]]) -> pa.RecordBatch:
    columns = zip(*rows, strict=True) if rows else ((), (), ())
    return pa.RecordBatch.from_arrays([pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)


def _rows(reader: pa.RecordBatchReader) -> Iterator[tuple[str, str, int]]:
    for batch in reader:
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)
