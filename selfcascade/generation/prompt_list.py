"""The prompts of a run in the order of their ids, sorted on disk, so that memory stays flat however many there are."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from selfcascade.curation.listing import Sorter
from selfcascade.settings import canonical_json


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt. ``negative_prompt`` and ``seed`` are the run's where they are unset."""

    id: str
    text: str
    negative_prompt: str | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where a prompt lies in its list."""

    id: str
    start: int
    """First byte of its line."""
    size: int
    """Bytes of its line."""


class TakenId(ValueError):
    """Two prompts have one id."""

    def __init__(self, identity: str, row: int, other: int) -> None:
        super().__init__(f"id {identity!r} of row {row} is taken by row {other}")
        self.identity, self.row, self.other = identity, row, other


class PromptList:
    """Prompts sorted by id, in a temporary file that goes with this object. It can be read again and again, by several threads at once."""

    def __init__(self, prompts: Iterable[tuple[int, Prompt]], *, count: int | None = None) -> None:
        """Sort ``prompts``.

        Args:
            prompts: in any order, each with the number of its row, which an error names; one whose id is not given but made has it below 0. Each is looked at
                once.
            count: how many are kept, the first ones; unset: all.

        Raises:
            TakenId: two have one id. Of several the earliest row is named, rows whose id is given before others.
        """
        self._file = tempfile.NamedTemporaryFile(prefix="selfcascade-")  # noqa: SIM115 it lives as long as the list
        self._kept = self._found = 0
        digest = hashlib.sha256(b"[")
        with Sorter() as sorter:
            sorter.add(canonical_json([prompt.id, prompt.text, prompt.negative_prompt, prompt.seed]) + b"\t%d\n" % row for row, prompt in prompts)
            taken: list[TakenId] = []
            last, rows = b"", [0]
            for line in sorter.lines():
                body, _, row = line.rpartition(b"\t")
                identity = _id(body)
                if identity == last:
                    rows.append(int(row))
                    first, second, *_ = sorted(rows, key=_precedence)
                    taken.append(TakenId(identity.decode(), second, first))
                    taken = [min(taken, key=lambda error: _precedence(error.row))]
                    continue
                last, rows = identity, [int(row)]
                self._found += 1
                if count is None or self._kept < count:
                    digest.update(b"," + body if self._kept else body)
                    self._file.write(body + b"\n")
                    self._kept += 1
        if taken:
            raise taken[0]
        digest.update(b"]")
        self._file.flush()
        self._version = digest.hexdigest()

    @property
    def version(self) -> str:
        """The version of the prompts as an input: SHA-256 of the canonical JSON of the sorted list, wherever they came from."""
        return self._version

    @property
    def found(self) -> int:
        """How many there were before the first ``count`` were kept."""
        return self._found

    def __len__(self) -> int:
        return self._kept

    def __iter__(self) -> Iterator[Prompt]:
        with open(self._file.name, "rb") as file:
            for line in file:
                yield _prompt(line)

    def places(self) -> Iterator[Place]:
        """Where each prompt lies, in order."""
        with open(self._file.name, "rb") as file:
            start = 0
            for line in file:
                yield Place(_id(line).decode(), start, len(line))
                start += len(line)

    def at(self, start: int, size: int) -> Prompt:
        """The prompt at a place."""
        return _prompt(os.pread(self._file.fileno(), size, start))


def _precedence(row: int) -> tuple[bool, int]:
    return row < 0, abs(row)


def _id(line: bytes) -> bytes:
    # Ids hold no quote, nor what sorts below it: lines sort as their ids do.
    return line[2 : line.index(b'"', 2)]


def _prompt(line: bytes) -> Prompt:
    return Prompt(*json.loads(line))
