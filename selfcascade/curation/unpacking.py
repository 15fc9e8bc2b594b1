"""Samples out of the bytes of a tar as they come in, grouped as WebDataset groups them.

Python's tarfile takes a third of a millisecond a sample of three members, as long as a fast network takes for a picture; of a shard whose bytes were
checked already, little of what it does is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from selfcascade.storage import IntegrityError

RECORD = 512
"""Bytes of a header, and what the data of a member are padded to."""
FILES = (0, ord("0"))
"""Types of members that are plain files."""
_NONE = memoryview(b"")


class Tape:
    """Bytes that come in blocks, read forwards. A block is not looked at once the next was asked for."""

    def __init__(self, blocks: Iterator[memoryview], start: int) -> None:
        """``start``: bytes of the first block to pass over."""
        self._blocks = blocks
        self._block = next(blocks, _NONE)
        self._at = start

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes, fewer at the end."""
        data = bytes(self._block[self._at : self._at + count])
        self._at += len(data)
        if len(data) == count:
            return data
        found = [data]
        missing = count - len(data)
        while missing and self._turn():
            found.append(bytes(self._block[:missing]))
            self._at = len(found[-1])
            missing -= self._at
        return b"".join(found)

    def skip(self, count: int) -> None:
        """Pass over ``count`` bytes."""
        self._at += count
        while self._at > len(self._block):
            over = self._at - len(self._block)
            if not self._turn():
                return
            self._at = over

    def _turn(self) -> bool:
        self._block = next(self._blocks, _NONE)
        self._at = 0
        return bool(self._block)


def unpack(blocks: Iterator[memoryview], places: Sequence[int], *, start: int, first: int, samples: int, where: str) -> Iterator[dict[str, bytes | str]]:
    """The samples of a tar at ``places``: ``__key__``, and the bytes of each member by its extension.

    Names are parted at the first dot after the last slash, as WebDataset does; members that follow one another under one key are a sample.

    Args:
        blocks: of the tar.
        places: numbers of the wanted samples, ascending.
        start: byte of the first block at which a sample begins.
        first: number of that sample.
        samples: that the whole tar holds, by its table.
        where: how messages name the tar.

    Raises:
        IntegrityError: it is not a tar of so many samples, or has members that are no plain files.
    """
    tape = Tape(blocks, start)
    wanted = iter(places)
    place = next(wanted, None)
    number, key = first - 1, None
    sample: dict[str, bytes] = {}
    while place is not None:
        header = tape.take(RECORD)
        ended = len(header) < RECORD or not header[0]
        name, size = ("", 0) if ended else _member(header, where)
        folder, slash, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        stem = folder + slash + stem
        if ended or stem != key:
            if number == samples - 1 and not ended:
                raise IntegrityError(f"{where} holds more samples than the {samples} of its table; take another version of the dataset")
            if number == place:
                yield {"__key__": str(key), **sample}
                place = next(wanted, None)
                if place is None:
                    return
            if ended:
                raise IntegrityError(f"{where} ends after {number + 1} samples, its table has {samples}; take another version of the dataset")
            number, key, sample = number + 1, stem, {}
        if number == place:
            sample[extension.lower()] = tape.take(size)
            if len(sample[extension.lower()]) < size:
                raise IntegrityError(f"{where} ends in the middle of {name}; take another version of the dataset")
        else:
            tape.skip(size)
        tape.skip(-size % RECORD)


def _member(header: bytes, where: str) -> tuple[str, int]:
    """Name and size of a member."""
    try:
        if header[156] not in FILES:
            raise ValueError
        size = int(header[124:136].strip(b" \0"), 8)
        name = header[:100].partition(b"\0")[0]
        folder = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
        return (folder + b"/" + name if folder else name).decode(), size
    except ValueError:
        raise IntegrityError(f"{where} is not a plain tar (USTAR) of files") from None
