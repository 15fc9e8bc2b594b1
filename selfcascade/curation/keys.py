"""Keys: the name of a sample inside a shard, made from the name of its file."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from selfcascade.curation.rows import Rows

LONGEST = 80
"""Characters of a key without suffix: with suffix and extension it fits the 100 bytes that every tar reader knows."""


def keys_of(rows: Rows) -> Iterator[tuple[list[Any], str]]:
    """A unique key for each name (a relative path), in bounded memory as long as few names meet in one.

    The natural key is the path without extension, everything but ASCII letters, digits, ``_`` and ``-`` replaced. Names whose natural keys agree, be it but for
    the case of letters (not every file system tells ``A.png`` from ``a.png``), all take a suffix out of the SHA-256 of their name.

    Args:
        rows: :func:`folded` of each name, the name, and whatever else; no name twice.

    Yields:
        the rows with their keys.
    """
    suffixed = Counter(_suffixed(meeting, row[1], 8) for meeting, group in rows.groups() if len(group) > 1 for row in group)
    taken = {meeting for meeting, group in rows.groups() if len(group) == 1 and meeting in suffixed} if suffixed else set()
    for meeting, group in rows.groups():
        if len(group) == 1:
            yield group[0], _natural(group[0][1])
            continue
        for row in group:
            short = _suffixed(meeting, row[1], 8)
            length = 8 if suffixed[short] == 1 and short not in taken else 12
            yield row, _suffixed(_natural(row[1]), row[1], length)


def folded(name: str) -> str:
    """What names must not share: the natural key without the case of its letters."""
    return _natural(name).lower()


def _suffixed(start: str, name: str, digits: int) -> str:
    return f"{start}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:digits]}"


def key_from(text: str, digest: str) -> str:
    """``text`` where it may be a key as it is, else what is left of it with the first digits of ``digest``, the hex of something that tells it apart."""
    if re.fullmatch(rf"[A-Za-z0-9_-]{{1,{LONGEST}}}", text):
        return text
    return f"{re.sub(r'[^A-Za-z0-9_]+', '-', text).strip('-')[:60]}-{digest[:12]}".lstrip("-")


def _natural(name: str) -> str:
    folder, _, file = name.rpartition("/")
    stem = file.rpartition(".")[0] or file
    text = re.sub(r"[^A-Za-z0-9_]+", "-", f"{folder}/{stem}" if folder else stem).strip("-")
    if len(text) > LONGEST:
        text = f"{text[: LONGEST - 9]}-{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"
    return text or "picture"
