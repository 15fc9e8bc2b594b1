"""The ``huggingface`` source: pictures out of parquet files, as the Hugging Face hub serves datasets and ``datasets`` writes them."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from selfcascade.config import CurationSettings, HuggingFaceSource
from selfcascade.curation.captions import Caption, caption_of
from selfcascade.curation.folder import FolderTree
from selfcascade.curation.keys import key_from
from selfcascade.curation.picture import picture_of
from selfcascade.curation.record import Entry, Picture
from selfcascade.curation.s3prefix import PrefixTree
from selfcascade.curation.splits import Split
from selfcascade.curation.tables import column_values, plain
from selfcascade.curation.tree import LARGEST_FILE, File, SourceChanged, Tree
from selfcascade.settings import SettingsError
from selfcascade.storage import Store

ROWS = 64
"""Rows that are in memory at a time while a file is listed."""
CAPTIONS = ("caption", "text")
"""Columns with the caption, if the settings name none."""
SPLITS: dict[str, Split] = {"train": "train", "validation": "tune", "valid": "tune", "val": "tune", "dev": "tune", "test": "test"}
"""Split by the first word of a file's name or of a folder's above it."""


class ParquetPictures:
    """Rows of the parquet files of a folder or under a prefix. Of a file only the columns and row groups that are needed are read."""

    def __init__(self, source: HuggingFaceSource, store: Store) -> None:
        self.source = source
        remote = source.path.startswith("s3://")
        self.tree: FolderTree | PrefixTree = PrefixTree(source.path, store) if remote else FolderTree(Path(source.path))
        self._taken: Path | None = None

    @property
    def label(self) -> str:
        """The folder or the prefix."""
        return self.tree.label

    def listing(self) -> Iterator[Entry]:
        """An entry a row, by reading every picture once. Keys follow the rows, so that a shard needs few row groups.

        Raises:
            SettingsError: there is no parquet file, or one lacks a column; names it.
        """
        files = sorted((file for file in self.tree.files() if file.name.lower().endswith(".parquet")), key=lambda file: file.name)
        if not files:
            raise SettingsError(f"source.path: {self.label} holds no parquet file; give the folder of a dataset as the hub serves it")
        for file in files:
            yield from self._entries(file)

    @contextmanager
    def fetching(self, entries: Iterable[Entry]) -> Iterator[None]:
        """Within the block the pictures that :meth:`picture` needs lie on disk: every row group was read once, however many of its rows are wanted."""
        wanted: dict[str, dict[int, set[int]]] = {}
        for entry in entries:
            if entry.reason is None and entry.place is not None:
                name, group, row = _place(entry.place)
                wanted.setdefault(name, {}).setdefault(group, set()).add(row)
        with TemporaryDirectory(prefix="selfcascade-") as folder:
            self._taken = Path(folder)
            try:
                for name, groups in wanted.items():
                    self._take(name, groups)
                yield
            finally:
                self._taken = None

    def picture(self, entry: Entry, settings: CurationSettings) -> Picture:
        """See :class:`selfcascade.curation.sources.Source`. What the column says the file was called is not asked."""
        if self._taken is None:
            with self.fetching([entry]):
                return self.picture(entry, settings)
        path = self._taken / _taken_name(entry.place or "")
        data = path.read_bytes() if path.exists() else b""
        if f"sha256:{hashlib.sha256(data).hexdigest()}" != entry.digest:
            raise SourceChanged(self.label, entry.source)
        path.unlink()
        return picture_of(data, None, settings, entry.caption)

    def _take(self, name: str, groups: dict[int, set[int]]) -> None:
        try:
            file = self._opened(File(name, 0))
            column = self._image_column(file, name)
            for group, rows in groups.items():
                row = 0
                for batch in file.iter_batches(batch_size=ROWS, row_groups=[group], columns=[column]):
                    for value in batch.column(0):
                        if row in rows:
                            assert self._taken is not None
                            (self._taken / _taken_name(f"{name}@{group}:{row}")).write_bytes(_content(value.as_py()) or b"")
                        row += 1
        except (FileNotFoundError, pa.ArrowException, IndexError):
            raise SourceChanged(self.label, name) from None

    def _entries(self, file: File) -> Iterator[Entry]:
        try:
            opened = self._opened(file)
        except (pa.ArrowException, OSError):
            raise SettingsError(f"source.path: {self.label}/{file.name} is not a parquet file that can be read; replace it or remove it") from None
        columns = {"image": self._image_column(opened, file.name), "caption": self._caption_column(opened, file.name), "key": self.source.key}
        for name in (columns["key"], *self.source.carry):
            if name is not None and name not in opened.schema_arrow.names:
                raise _lacks(self.label, file.name, name, opened.schema_arrow.names)
        wanted = list(dict.fromkeys(name for name in (*columns.values(), *self.source.carry) if name is not None))
        number = 0
        for group in range(opened.num_row_groups):
            row = 0
            for batch in opened.iter_batches(batch_size=ROWS, row_groups=[group], columns=wanted):
                for fields in zip(*(column_values(column) for column in batch.columns), strict=True):
                    yield self._entry(file, number, f"{file.name}@{group}:{row}", columns, dict(zip(batch.schema.names, fields, strict=True)))
                    number, row = number + 1, row + 1

    def _entry(self, file: File, number: int, place: str, columns: dict[str, str | None], values: dict[str, Any]) -> Entry:
        data = _content(values[str(columns["image"])])
        source = f"{file.name}#{number}"
        caption = Caption() if columns["caption"] is None else _caption(values[columns["caption"]], source)
        key = str(values[columns["key"]]) if columns["key"] else f"{file.name.removesuffix('.parquet').replace('/', '-')}-{number:07d}"
        reason = caption.problem
        if data is None:
            reason = "no picture: the row holds none; files that it may name are not looked for"
        elif len(data) > LARGEST_FILE:
            reason = f"too large: {len(data)} bytes, more than {LARGEST_FILE}"
        digest = "" if data is None else f"sha256:{hashlib.sha256(data).hexdigest()}"
        extra = {name: plain(values[name]) for name in self.source.carry} or None
        shown = key_from(key, hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest())
        return Entry(shown, source, len(data or b""), digest, caption.text, reason, self._split(file.name), extra, place)

    def _split(self, name: str) -> Split | None:
        if not self.source.splits:
            return None
        for part in reversed(name.split("/")):
            word = part.partition(".")[0].partition("-")[0].lower()
            if word in SPLITS:
                return SPLITS[word]
        return None

    def _opened(self, file: File) -> pq.ParquetFile:
        return pq.ParquetFile(io.BufferedReader(_Ranges(self.tree, file.name), 2**16), pre_buffer=True)

    def _image_column(self, file: pq.ParquetFile, name: str) -> str:
        """The column that the settings name, else the first that the file declares to hold images, else the first that can hold them."""
        schema = file.schema_arrow
        if self.source.image is not None:
            if self.source.image not in schema.names:
                raise _lacks(self.label, name, self.source.image, schema.names)
            return self.source.image
        declared = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        found = [column for column, feature in declared.items() if isinstance(feature, dict) and feature.get("_type") == "Image" and column in schema.names]
        found += [field.name for field in schema if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0]
        if not found:
            raise SettingsError(f"source.image: {self.label}/{name} declares no column of images; name it. It has {', '.join(schema.names)}")
        return str(found[0])

    def _caption_column(self, file: pq.ParquetFile, name: str) -> str | None:
        names = file.schema_arrow.names
        if self.source.caption is not None and self.source.caption not in names:
            raise _lacks(self.label, name, self.source.caption, names)
        return self.source.caption or next((column for column in CAPTIONS if column in names), None)


class _Ranges(io.RawIOBase):
    """A file of a tree as a stream that reads what it is asked for."""

    def __init__(self, tree: Tree, name: str) -> None:
        self.tree, self.file = tree, name
        self.size = tree.size(name)
        self.at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self.size - self.at)
        data = self.tree.read_range(self.file, self.at, wanted) if wanted > 0 else b""
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


def _content(value: Any) -> bytes | None:
    """The bytes of a picture: the column holds them, or a struct that does."""
    if isinstance(value, dict):
        value = value.get("bytes")
    return value if isinstance(value, bytes) else None


def _caption(value: Any, place: str) -> Caption:
    """Of several captions the first."""
    return caption_of(next((text for text in value if text), None) if isinstance(value, list) else value, place)


def _place(place: str) -> tuple[str, int, int]:
    name, _, numbers = place.rpartition("@")
    group, _, row = numbers.partition(":")
    return name, int(group), int(row)


def _taken_name(place: str) -> str:
    return hashlib.sha256(place.encode("utf-8", "surrogatepass")).hexdigest()


def _lacks(label: str, name: str, column: str, names: Iterable[str]) -> SettingsError:
    return SettingsError(f"source: {label}/{name} lacks the column {column!r}; it has {', '.join(names)}")
