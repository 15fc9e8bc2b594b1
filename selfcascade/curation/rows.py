"""Rows sorted by their first value on disk, and matched with other such rows, however many there are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from types import TracebackType
from typing import Any, Self

from selfcascade.curation.listing import RUN, Sorter


class Rows:
    """Lists of JSON values. They are added in any order and read sorted by their first value, a text, then by the others; again and again.

    The order is that of the lines of JSON: the same everywhere, but not that of the texts.
    """

    def __init__(self) -> None:
        self._sorter = Sorter()
        self._buffer: list[bytes] = []
        self._empty = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Let the temporary files go."""
        self._sorter.close()

    def __bool__(self) -> bool:
        """Whether there is a row."""
        return not self._empty

    def add(self, *row: Any) -> None:
        """Take a row in; its first value is a text."""
        self._empty = False
        self._buffer.append(json.dumps(row).encode() + b"\n")
        if len(self._buffer) == RUN:
            self._flush()

    def __iter__(self) -> Iterator[list[Any]]:
        self._flush()
        return map(json.loads, self._sorter.lines())

    def groups(self) -> Iterator[tuple[str, list[list[Any]]]]:
        """Rows that share their first value, with it."""
        for first, group in groupby(self, key=lambda row: row[0]):
            yield first, list(group)

    def _flush(self) -> None:
        if self._buffer:
            self._sorter.add(self._buffer)
            self._buffer.clear()


def matched(rows: Iterable[list[Any]], others: Rows) -> Iterator[tuple[list[Any], list[list[Any]]]]:
    """Each of ``rows``, which are sorted as :class:`Rows` are, with those of ``others`` that have its first value; several rows may share one."""
    groups = others.groups()
    first, group = next(groups, (None, []))
    for row in rows:
        while first is not None and _place(first) < _place(row[0]):
            first, group = next(groups, (None, []))
        yield row, group if first == row[0] else []


def _place(text: str) -> str:
    """What texts sort by: the quote that ends one is a part of the line."""
    return json.dumps(text)
