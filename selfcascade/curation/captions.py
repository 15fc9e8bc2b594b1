"""Captions: found beside the pictures or in a table, decoded strictly, cleaned."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from selfcascade.config import Captions
from selfcascade.curation.ahead import mapped
from selfcascade.curation.rows import Rows, matched
from selfcascade.curation.tables import column_values
from selfcascade.curation.tree import LARGEST_FILE, File, Tree
from selfcascade.settings import SettingsError

JSONL, CSV = "metadata.jsonl", "metadata.csv"
LARGEST_TXT = 2**20
"""Bytes of a caption file above which it is none."""
NAME_COLUMNS = ("file_name", "path")
TEXT_COLUMNS = ("text", "caption")


@dataclass(frozen=True, slots=True)
class Caption:
    """What was found for one picture: a text, nothing, or a problem that names the file."""

    text: str | None = None
    problem: str | None = None


def clean_caption(text: str) -> str:
    """One line of composed Unicode (NFC): runs of white space are one space, control and invisible format characters are gone, joiners excepted.

    Raises:
        ValueError: the text holds half a surrogate pair, so it is no text.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("lone surrogate")
    text = re.sub(r"\s+", " ", unicodedata.normalize("NFC", text))
    kept = (character for character in text if character in "\u200c\u200d" or unicodedata.category(character) not in ("Cc", "Cf"))
    # What was removed may have stood between two spaces.
    return re.sub(r" +", " ", "".join(kept)).strip()


@dataclass(frozen=True)
class Tables:
    """The files of a tree that may hold captions of the pictures beside them."""

    jsonl: list[File] = field(default_factory=list)
    csv: list[File] = field(default_factory=list)
    parquet: list[File] = field(default_factory=list)

    def take(self, file: File) -> None:
        """Keep ``file`` if it is such a table."""
        base = file.name.rpartition("/")[2]
        if base in (JSONL, CSV):
            (self.jsonl if base == JSONL else self.csv).append(file)
        elif base.lower().endswith(".parquet"):
            self.parquet.append(file)


def captioned(tree: Tree, pictures: Rows, texts: Rows, tables: Tables, kind: Captions) -> Iterator[tuple[list[Any], Caption]]:
    """Each of ``pictures`` with its caption, in bounded memory.

    Args:
        tree: where the files are.
        pictures: name, size and ETag of each, and whatever else.
        texts: name without extension, then name, size and ETag, of every file that ends in ``.txt``.
        tables: what other files may hold captions.
        kind: where captions are; ``auto`` takes ``metadata.jsonl``, ``metadata.csv``, ``*.parquet``, then ``.txt``, whichever exists first.

    Raises:
        SettingsError: a caption table is missing, damaged or lacks its columns; names the file and the line.
    """
    if kind == "auto":
        kind = "jsonl" if tables.jsonl else "csv" if tables.csv else "parquet" if tables.parquet else "txt"
    if kind == "file-name":
        yield from ((row, caption_of(words_of(row[0]), row[0])) for row in pictures)
    elif kind == "embedded":
        yield from mapped(lambda row: (row, _within(tree, File(*row[:3]))), pictures, threads=8)
    elif kind == "txt":
        with Rows() as by_stem:
            for row in pictures:
                by_stem.add(row[0].rpartition(".")[0], *row)
            pairs = ((row[1:], File(*found[0][1:4]) if found else None) for row, found in matched(by_stem, texts))
            yield from mapped(lambda pair: (pair[0], _beside(tree, pair[1])), pairs, threads=8, ahead=1024)
    else:
        with Rows() as captions:
            _collect(tree, tables, kind, captions)
            yield from ((row, _agreed(found)) for row, found in matched(pictures, captions))


def _collect(tree: Tree, tables: Tables, kind: str, captions: Rows) -> None:
    """Name of the picture, number of the row, caption and table of every row of every table."""
    files, wanted, rows_of = {
        "jsonl": (tables.jsonl, JSONL, _rows_of_jsonl),
        "csv": (tables.csv, CSV, _rows_of_csv),
        "parquet": (tables.parquet, "*.parquet", _rows_of_parquet),
    }[kind]
    if not files:
        raise SettingsError(f"source.captions is {kind!r} but {tree.label} holds no {wanted}; add one, or use 'auto' or 'txt'")
    number = 0
    for table in sorted(files, key=lambda file: file.name):
        folder = table.name.rpartition("/")[0]
        for name, caption in rows_of(tree, table):
            captions.add(f"{folder}/{name}" if folder else name, f"{number:012d}", caption.text, caption.problem, table.name)
            number += 1


def _agreed(rows: list[list[Any]]) -> Caption:
    """The caption on which all rows of a picture agree."""
    if not rows:
        return Caption()
    found = {Caption(text, problem) for _, _, text, problem, _ in rows}
    if len(found) == 1:
        return found.pop()
    return Caption(problem=f"caption ambiguous: {rows[-1][4]} and the rows before it caption the picture differently")


def _beside(tree: Tree, file: File | None) -> Caption:
    if file is None:
        return Caption()
    if file.size > LARGEST_TXT:
        return Caption(problem=f"caption unreadable: {file.name} has more than {LARGEST_TXT} bytes")
    try:
        return caption_of(tree.read(file).decode("utf-8-sig"), file.name)
    except UnicodeDecodeError:
        return Caption(problem=f"caption encoding: {file.name} is not UTF-8")
    except OSError:
        return Caption(problem=f"caption unreadable: {file.name} cannot be opened")


def words_of(name: str) -> str:
    """A file's name without folder, extension, separators and trailing numbers: ``birds/grey_heron-012.jpg`` gives ``grey heron``."""
    stem = name.rpartition("/")[2].rpartition(".")[0]
    return re.sub(r"(?:\s+\d+)+\s*$", "", re.sub(r"[\W_]+", " ", stem)).strip()


def _within(tree: Tree, picture: File) -> Caption:
    from selfcascade.curation.embedded import embedded_caption

    try:
        return embedded_caption(tree.read(picture), picture.name) if picture.size <= LARGEST_FILE else Caption()
    except OSError:
        return Caption()


def _rows_of_jsonl(tree: Tree, table: File) -> Iterator[tuple[str, Caption]]:
    for number, line in enumerate(_lines(tree, table), start=1):
        if not line.strip():
            continue
        place = f"{table.name} line {number}"
        try:
            # Wrong bytes survive as surrogates: the row can still be told apart, and only its picture is rejected.
            row = json.loads(line.decode("utf-8", "surrogateescape"))
        except ValueError:
            raise SettingsError(f"caption file {tree.label}/{place} is not UTF-8 JSON; write one JSON object a line") from None
        name = next((row[column] for column in NAME_COLUMNS if column in row), None) if isinstance(row, dict) else None
        if not isinstance(name, str):
            raise SettingsError(f"caption file {tree.label}/{place} names no picture; give it a {NAME_COLUMNS[0]!r}")
        yield _relative(name), caption_of(next((row[column] for column in TEXT_COLUMNS if column in row), None), place)


def _rows_of_csv(tree: Tree, table: File) -> Iterator[tuple[str, Caption]]:
    # Wrong bytes survive as surrogates, as those of JSON do.
    text = _read(tree, table).decode("utf-8-sig", "surrogateescape")
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = list(reader.fieldnames or ())
        name_column, text_column = (next((name for name in choices if name in columns), None) for choices in (NAME_COLUMNS, TEXT_COLUMNS))
        if name_column is None or text_column is None:
            raise _lacks(tree, table, columns)
        for row in reader:
            place = f"{table.name} line {reader.line_num}"
            if not row[name_column]:
                raise SettingsError(f"caption file {tree.label}/{place} names no picture; fill the column {name_column!r}")
            yield _relative(row[name_column]), caption_of(row[text_column], place)
    except csv.Error as error:
        raise SettingsError(f"caption file {tree.label}/{table.name} is no CSV after line {reader.line_num} ({error}); mend it or remove the file") from None


def _lacks(tree: Tree, table: File, columns: Sequence[str]) -> SettingsError:
    return SettingsError(
        f"caption file {tree.label}/{table.name} lacks a column {' or '.join(NAME_COLUMNS)}, or {' or '.join(TEXT_COLUMNS)}; it has {', '.join(columns)}"
    )


def _rows_of_parquet(tree: Tree, table: File) -> Iterator[tuple[str, Caption]]:
    try:
        file = pq.ParquetFile(io.BytesIO(_read(tree, table)))
    except (pa.ArrowException, OSError):
        raise SettingsError(f"caption file {tree.label}/{table.name} is not a parquet file that can be read; replace it or remove it") from None
    columns = file.schema_arrow.names
    name_column, text_column = (next((name for name in choices if name in columns), None) for choices in (NAME_COLUMNS, TEXT_COLUMNS))
    if name_column is None or text_column is None:
        raise _lacks(tree, table, columns)
    number = 0
    for batch in file.iter_batches(batch_size=8192, columns=[name_column, text_column]):
        for name, text in zip(column_values(batch.column(name_column)), column_values(batch.column(text_column)), strict=True):
            place = f"{table.name} row {number}"
            number += 1
            if not isinstance(name, str):
                raise SettingsError(f"caption file {tree.label}/{place} names no picture; fill the column {name_column!r} with text")
            yield _relative(name), caption_of(text, place)


def caption_of(text: Any, place: str) -> Caption:
    """The caption that a table holds at ``place``."""
    if text is None:
        return Caption()
    if not isinstance(text, str):
        return Caption(problem=f"caption unreadable: {place} holds no text")
    try:
        return Caption(clean_caption(text))
    except ValueError:
        return Caption(problem=f"caption encoding: {place} is not UTF-8")


def _lines(tree: Tree, file: File) -> Iterator[bytes]:
    """The lines of a table, one in memory at a time, without a byte order mark."""
    try:
        with tree.local(file) as path, path.open("rb") as stream:
            yield stream.readline().removeprefix(b"\xef\xbb\xbf")
            yield from stream
    except OSError as error:
        raise _unreadable(tree, file, error) from None


def _read(tree: Tree, file: File) -> bytes:
    try:
        return tree.read(file)
    except OSError as error:
        raise _unreadable(tree, file, error) from None


def _unreadable(tree: Tree, file: File, error: OSError) -> SettingsError:
    return SettingsError(f"caption file {tree.label}/{file.name} cannot be read ({error.strerror}); check its permissions")


def _relative(name: str) -> str:
    return name.replace("\\", "/").removeprefix("./")
