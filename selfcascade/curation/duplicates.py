"""Duplicates: the same content under two names, and the same caption on many pictures."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice, repeat
from typing import IO

import pyarrow as pa

from selfcascade.config import FilterSettings
from selfcascade.curation import filters
from selfcascade.curation.database import BATCH, database, fill, rows_of
from selfcascade.curation.decoding import format_of_name
from selfcascade.curation.record import Entry, Rejected

SCHEMA = pa.schema([("key", pa.string()), ("turn", pa.string()), ("identity", pa.binary()), ("caption", pa.binary())])
FACTS = """
    SELECT key, first, copies
    FROM inputs
    JOIN (SELECT identity, substr(min(turn), 2) AS first FROM inputs GROUP BY identity) USING (identity)
    JOIN (SELECT caption, count(*) AS copies FROM inputs GROUP BY caption) USING (caption)
    ORDER BY key
"""


def mark_duplicates(entries: Iterable[Entry], settings: FilterSettings, late: Iterable[bool] | None = None) -> Iterator[Entry]:
    """Reject every entry whose content an earlier one has, or whose caption too many share.

    Of entries in order of their keys the first of each content survives, whatever the workers, unless it came late. Entries that are rejected already
    neither count nor survive. What a file claims to be belongs to its identity: JPEG bytes that are named ``.png`` will be rejected, and must not take the
    well-named copy with them.
    Memory stays bounded: what does not fit goes to disk.

    Args:
        entries: in the order of their keys; each is looked at once.
        settings: how many may share a caption.
        late: of each entry, whether it gives way to one of its content that was there before; unset: none does.
    """
    with tempfile.TemporaryFile(prefix="selfcascade-") as kept, database() as connection:
        fill(connection, "inputs", SCHEMA, _batches(zip(_written(entries, kept), repeat(False) if late is None else late, strict=late is not None)))
        found = rows_of(connection.sql(FACTS))
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


def _written(entries: Iterable[Entry], file: IO[bytes]) -> Iterator[Entry]:
    for entry in entries:
        file.write(entry.to_line())
        yield entry


def _batches(entries: Iterable[tuple[Entry, bool]]) -> Iterator[pa.RecordBatch]:
    rows = (
        (
            entry.key,
            f"{late:d}{entry.key}",
            hashlib.sha256(repr((entry.digest, entry.size, format_of_name(entry.source))).encode()).digest()[:16],
            hashlib.sha256((entry.caption or "").casefold().encode()).digest()[:16],
        )
        for entry, late in entries
        if entry.reason is None
    )
    while part := list(islice(rows, BATCH)):
        yield pa.RecordBatch.from_arrays([pa.array(column, field.type) for column, field in zip(zip(*part, strict=True), SCHEMA, strict=True)], schema=SCHEMA)
