"""Tables with a row an input: parquet, csv, tsv and jsonl, read as a stream."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq

from selfcascade.settings import SettingsError

KINDS = ("parquet", "csv", "tsv", "jsonl", "csv.gz", "tsv.gz", "jsonl.gz")
LONGEST_LINE = 2**24
"""Bytes of a line of JSON above which it is none."""
BLOCK = 2**19
"""Bytes of a CSV that are parsed at a time, of which the reader holds a few; also the longest row that it surely reads."""
BATCH = 8192
STRETCH = 1024
"""Rows that are plain values at a time."""

# Arrow's own pool keeps what was freed, so that memory grows with the length of a table. Its readers take no other but the default.
pa.set_memory_pool(pa.system_memory_pool())


def kind_of_table(name: str) -> str | None:
    """Which of :data:`KINDS` the extension promises, without ``.gz``; None: no table."""
    lowered = name.lower()
    return next((kind.removesuffix(".gz") for kind in KINDS if lowered.endswith("." + kind)), None)


def rows(path: Path, kind: str, label: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The ``columns`` of every row, a batch of them in memory at a time. Text that is not UTF-8 comes with surrogates, so that it costs its row alone.

    Args:
        path: the file.
        kind: parquet, csv, tsv or jsonl.
        label: how messages name it.
        columns: names; a row of JSON may lack one, which then is None.

    Raises:
        SettingsError: the file cannot be read as what it should be, or has no such column; names both.
    """
    try:
        if kind == "jsonl":
            with gzip.open(path, "rb") if _is_gzip(path) else path.open("rb") as stream:
                yield from _rows_of_jsonl(stream, label, columns)
            return
        for batch in _batches(path, kind, label, columns):
            for start in range(0, batch.num_rows, STRETCH):
                values = [column_values(batch.column(name).slice(start, STRETCH)) for name in columns]
                for fields in zip(*values, strict=True):
                    yield dict(zip(columns, fields, strict=True))
    except (pa.ArrowException, OSError, EOFError) as error:
        raise SettingsError(f"table {label} cannot be read as {kind}: {' '.join(str(error).split())[:200]}; replace it") from None


def column_values(column: pa.Array) -> list[Any]:
    """Plain values of a column."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        # Arrow does not check what a file says is text.
        return [None if value is None else value.decode("utf-8", "surrogateescape") for value in column.cast(pa.large_binary()).to_pylist()]
    values: list[Any] = column.to_pylist()
    return values


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: what it has no form for as text, what is no number as nothing."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, float) and value - value != 0:
        return None
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return json.loads(json.dumps(str(value)))


def _batches(path: Path, kind: str, label: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    if kind == "parquet":
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
            _demand(columns, file.schema_arrow.names, label)
            yield from file.iter_batches(batch_size=BATCH, columns=list(columns), use_threads=False)
        return
    with pa.input_stream(str(path), compression="gzip" if _is_gzip(path) else None) as stream:
        parse = pc.ParseOptions(delimiter="\t" if kind == "tsv" else ",", newlines_in_values=True)
        # All columns as text: a key of digits keeps its zeros.
        convert = pc.ConvertOptions(column_types=dict.fromkeys(columns, pa.string()), check_utf8=False)
        read = pc.ReadOptions(use_threads=False, block_size=BLOCK)
        with pc.open_csv(stream, read_options=read, parse_options=parse, convert_options=convert) as file:
            _demand(columns, file.schema.names, label)
            for batch in file:
                yield batch.select(list(columns))


def _rows_of_jsonl(stream: io.BufferedIOBase, label: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    number = 0
    seen = False
    while line := stream.readline(LONGEST_LINE + 1):
        number += 1
        if not line.strip():
            continue
        try:
            row = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape"))
        except (ValueError, RecursionError):
            row = None
        if len(line) > LONGEST_LINE or not isinstance(row, dict):
            raise SettingsError(f"table {label} line {number} is not a JSON object; write one a line")
        if not seen:
            _demand(columns[:1], list(row), label)
            seen = True
        yield {name: row.get(name) for name in columns}


def _demand(columns: Sequence[str], there: Sequence[str], label: str) -> None:
    for name in columns:
        if name not in there:
            raise SettingsError(f"table {label} has no column {name!r}; it has {', '.join(there)[:300]}")


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(2) == b"\x1f\x8b"
