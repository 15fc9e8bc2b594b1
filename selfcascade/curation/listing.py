"""A listing: every input of a source in the order of its keys, sorted on disk, so that memory stays flat however many there are."""

from __future__ import annotations

import hashlib
import heapq
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from typing import IO

from selfcascade.curation.record import Entry
from selfcascade.settings import SettingsError

RUN = 4_096
"""Entries that are sorted in memory at a time."""
FAN = 64
"""Runs that are merged into one."""


class Listing:
    """Entries sorted by key, in a temporary file that goes with this object. It can be read again and again.

    Where entries share a key, the one whose line of JSON sorts first keeps it, whatever the order of the source; the others are rejected and take a suffix.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        """Sort ``entries``.

        Args:
            entries: in any order; each is looked at once.
        """
        self._count = 0
        digest = hashlib.sha256()
        self._file = tempfile.NamedTemporaryFile(prefix="selfcascade-")  # noqa: SIM115 it lives as long as the listing
        for line in _settled(entries):
            digest.update(line)
            self._file.write(line)
            self._count += 1
        self._file.flush()
        self._version = digest.hexdigest()

    @property
    def version(self) -> str:
        """See :func:`selfcascade.curation.record.version_of_listing`."""
        return self._version

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Entry]:
        with open(self._file.name, "rb") as file:
            for line in file:
                yield Entry.from_line(line)


def _settled(entries: Iterable[Entry]) -> Iterator[bytes]:
    """Lines by key, each key once."""
    with ExitStack() as stack:
        again: list[bytes] = []
        late = stack.enter_context(Sorter())
        with Sorter() as sorter:
            sorter.add(entry.to_line() for entry in entries)
            once = stack.enter_context(tempfile.TemporaryFile(prefix="selfcascade-"))
            holder: Entry | None = None
            repeats = 0
            for line in sorter.lines():
                # Keys hold no character that sorts below the quote that ends them, so lines sort as their keys do; only equal starts are worth a parse.
                start = line[: line.index(b'"', 2) + 1]
                if holder is None or start != f'["{holder.key}"'.encode():
                    holder, repeats = Entry.from_line(line), 0
                    once.write(line)
                    continue
                repeats += 1
                again.append(_renamed(Entry.from_line(line), holder, repeats).to_line())
                if len(again) == RUN:
                    late.add(again)
                    again.clear()
        late.add(again)
        once.seek(0)
        last = b""
        for line in heapq.merge(once, late.lines()):
            start = line[: line.index(b'"', 2)]
            if start == last:
                raise SettingsError(f"source: two inputs would have the key {start[2:].decode()!r}; give them keys that differ")
            last = start
            yield line


def _renamed(entry: Entry, holder: Entry, repeats: int) -> Entry:
    # The number tells lines apart that are equal in everything; its order is that of the sorted lines.
    suffix = hashlib.sha256(entry.to_line() + b"%d" % repeats).hexdigest()[:12]  # with it a key of 80 characters still fits a tar
    reason = f"duplicate of {holder.key}" if entry.source == holder.source else f"key taken: {holder.key} is that of {holder.source} too"
    return replace(entry, key=f"{entry.key[:80]}-{suffix}", reason=entry.reason or reason)


class Sorter:
    """Lines sorted in runs, each in a temporary file, and merged: as many as the disk holds.

    A run of a higher level is :data:`FAN` of the level below, so each line is written once a level, and few files are open at a time.
    """

    def __init__(self) -> None:
        self._levels: list[list[IO[bytes]]] = [[]]

    def __enter__(self) -> Sorter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the temporary files go."""
        for level in self._levels:
            for file in level:
                file.close()
        self._levels = [[]]

    def add(self, lines: Iterable[bytes]) -> None:
        """Take ``lines`` in, each with its newline."""
        remaining = iter(lines)
        while run := sorted(islice(remaining, RUN)):
            self._keep(run, 0)

    def lines(self) -> Iterator[bytes]:
        """All lines, sorted; only one reader at a time."""
        return _merged(file for level in self._levels for file in level)

    def _keep(self, lines: Iterable[bytes], height: int) -> None:
        file = tempfile.TemporaryFile(prefix="selfcascade-")  # noqa: SIM115 it is closed with the sorter, or when it is merged
        if height == len(self._levels):
            self._levels.append([])
        level = self._levels[height]
        level.append(file)
        file.writelines(lines)
        if len(level) == FAN:
            self._keep(_merged(level), height + 1)
            for merged in level:
                merged.close()
            level.clear()


def _merged(files: Iterable[IO[bytes]]) -> Iterator[bytes]:
    files = list(files)
    for file in files:
        file.seek(0)
    return heapq.merge(*files)
