"""Increments: the next version of a dataset from what is new or changed in its source; shards whose inputs are as they were are shared."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from selfcascade.config import CurationSettings
from selfcascade.curation import scores, shards
from selfcascade.curation.index import read_table_of, tars_of
from selfcascade.curation.listing import Sorter
from selfcascade.curation.record import Entry, Picture, Rejected
from selfcascade.settings import SettingsError, canonical_json
from selfcascade.storage import Artifact, IntegrityError, NotFound, Store, resolve
from selfcascade.storage.manifest import plain_settings

_MAY_PASS = re.compile(r"download: .*\([0-9]+ tries\)")
"""Reason of a row that the next increment tries again: the network's fault, as far as anybody could tell."""


_LISTED = ("key", "listed", "reason")
"""Columns that tell whether a shard is as it would be made now."""


@dataclass(frozen=True)
class Slice:
    """The inputs of one shard."""

    index: int
    entries: list[Entry]
    shared: bool = False
    """They are as they were, and so is the shard."""


class Before:
    """The version that an increment starts from."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.units = len(tars_of(artifact))
        self._keys: IO[bytes] | None = None
        self._made_from: list[bytes | None] = []

    @classmethod
    def of(cls, settings: CurationSettings, store: Store) -> Before | None:
        """The newest version of the dataset that the settings name, where they ask for an increment and there is one.

        Raises:
            SettingsError: it was made with other settings, so that its shards are no part of what is asked for; names one of them.
        """
        if not settings.increment:
            return None
        try:
            found = resolve(store, f"datasets/{settings.name}")
        except NotFound:
            return None
        there, asked = found.manifest().settings, plain_settings(settings)
        if there != asked:
            name = next(name for name in sorted({*there, *asked}) if there.get(name) != asked.get(name))
            raise SettingsError(f"curation.increment: {found} was made with another curation.{name}; leave increment out, or give the dataset another name")
        return cls(found)

    @classmethod
    def at(cls, uri: str | None, store: Store) -> Before | None:
        """The version that was planned from."""
        return None if uri is None else cls(resolve(store, uri))

    def table(self, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of a shard as they are now; all columns unless some are named."""
        return read_table_of(self.artifact, shards.tar_name(index), columns)[0]

    def keys(self) -> Iterator[tuple[str, int]]:
        """Every key with the number of its shard, sorted by key, in bounded memory."""
        # Two readers may be at it at once, so each opens the file anew.
        with open(self._read().name, "rb") as file:
            for line in file:
                key, index = json.loads(line)
                yield key, index

    def is_same(self, index: int, entries: list[Entry]) -> bool:
        """Whether a shard was made from exactly these inputs, and none of them is worth another try."""
        self._read()
        return self._made_from[index] == _digest((entry.key, entry.listed) for entry in entries)

    def _read(self) -> IO[bytes]:
        """The sorted keys, in a temporary file that goes with this object. Every table is read once, the first time that one is asked for."""
        if self._keys is None:
            made_from: list[bytes | None] = []
            with Sorter() as sorter:
                for index in range(self.units):
                    table = self.table(index, _LISTED)
                    keys, listed, reasons = (table[name].to_pylist() for name in _LISTED)
                    again = any(reason is not None and _MAY_PASS.fullmatch(reason) for reason in reasons)
                    made_from.append(None if again else _digest(zip(keys, listed, strict=True)))
                    sorter.add(json.dumps([key, index]).encode() + b"\n" for key in keys)
                file = tempfile.NamedTemporaryFile(prefix="selfcascade-")  # noqa: SIM115 it lives as long as this object
                file.writelines(sorter.lines())
                file.flush()
            self._keys, self._made_from = file, made_from
        return self._keys

    @contextmanager
    def outcomes(self, index: int, entries: Iterable[Entry]) -> Iterator[Outcomes]:
        """What became of those of ``entries`` that the shard holds as they are, so that no picture is fetched or decoded twice."""
        rows = {row["key"]: row for row in self.table(index).to_pylist()} if index < self.units else {}
        same = {
            entry.key: rows[entry.key]
            for entry in entries
            if entry.key in rows and rows[entry.key]["listed"] == entry.listed and not _MAY_PASS.fullmatch(rows[entry.key]["reason"] or "")
        }
        with tempfile.TemporaryDirectory(prefix="selfcascade-") as folder:
            path = Path(folder, shards.tar_name(index))
            if same:
                self.artifact.download(path.name, path)
            yield Outcomes(same, shards.read_tar(path) if same else iter(()))


class Outcomes:
    """Kept pictures and rejections of a shard, asked for in the order of their keys."""

    def __init__(self, rows: dict[str, dict[str, Any]], stored: Iterator[shards.Stored]) -> None:
        self.rows = rows
        self._stored = stored

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def picture(self, key: str) -> Picture:
        """The picture as it is stored.

        Raises:
            Rejected: the input was left out.
        """
        row = self.rows[key]
        source = {name: row[name] for name in ("width", "height", "sha256") if row[name] is not None}
        if not row["kept"]:
            known = {name: row[name] for name in row.keys() - set(shards.SCHEMA.names) | set(scores.SCHEMA.names) if row.get(name) is not None}
            known.pop(shards.EXTRA.name, None)
            small = known.pop(shards.THUMBNAIL.name, None)
            raise Rejected(row["reason"], thumbnail=None if small is None else lambda: small, **source, **({"scores": known} if known else {}))
        stored = next((sample for sample in self._stored if sample.fields["key"] == key), None)
        if stored is None:
            raise IntegrityError(f"the shard that holds {key} lacks its picture")
        return Picture(stored.data, stored.extension, scores=stored.fields["scores"], **source)


def cut(marked: Iterable[Entry], settings: CurationSettings, before: Before | None) -> Iterator[Slice]:
    """The inputs of every shard. Those of the version before keep their shard, wherever they sort by now; new ones follow in shards of their own.

    Args:
        marked: every input, in the order of keys.
        settings: how many inputs a shard is made from.
        before: what the increment starts from; None: nothing.
    """
    if before is None:
        yield from _even(marked, settings.shard_inputs, first=0)
        return
    with Sorter() as known, tempfile.TemporaryFile(prefix="selfcascade-") as fresh:
        known.add(_split(placed(marked, before), fresh))
        found = groupby(known.lines(), key=lambda line: int(line[:8]))
        index, group = next(found, (before.units, iter(())))
        for unit in range(before.units):
            entries = [Entry.from_line(line[8:]) for line in group] if unit == index else []
            if unit == index:
                index, group = next(found, (before.units, iter(())))
            yield Slice(unit, entries, before.is_same(unit, entries))
        fresh.seek(0)
        yield from _even(map(Entry.from_line, fresh), settings.shard_inputs, first=before.units)


def placed(entries: Iterable[Entry], before: Before) -> Iterator[tuple[Entry, int | None]]:
    """Each of ``entries``, which come in the order of keys, with the shard that holds it in the version before, if one does."""
    keys = before.keys()
    key, index = next(keys, (None, 0))
    for entry in entries:
        while key is not None and key < entry.key:
            key, index = next(keys, (None, 0))
        yield entry, index if key == entry.key else None


def _split(pairs: Iterable[tuple[Entry, int | None]], fresh: Any) -> Iterator[bytes]:
    """Lines of the known entries, behind the number of their shard; those of the others go to ``fresh``."""
    for entry, index in pairs:
        if index is None:
            fresh.write(entry.to_line())
        else:
            yield b"%08d" % index + entry.to_line()


def _digest(listed: Iterable[tuple[str, str]]) -> bytes:
    """SHA-256 of keys and of what tells their inputs again, in their order."""
    digest = hashlib.sha256()
    for pair in listed:
        digest.update(canonical_json(pair) + b"\n")
    return digest.digest()


def _even(entries: Iterable[Entry], size: int, *, first: int) -> Iterator[Slice]:
    remaining = iter(entries)
    while part := list(islice(remaining, size)):
        yield Slice(first, part)
        first += 1
