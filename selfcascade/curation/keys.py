"""Keys: the name of a sample inside a shard, made from the name of its file."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable

LONGEST = 80
"""Characters of a key without suffix: with suffix and extension it fits the 100 bytes that every tar reader knows."""


def keys_of(names: Iterable[str]) -> dict[str, str]:
    """A unique key for each of ``names`` (relative paths), whatever their order.

    The natural key is the path without extension, everything but ASCII letters, digits, ``_`` and ``-`` replaced. Names whose natural keys agree, be it but for
    the case of letters (not every file system tells ``A.png`` from ``a.png``), all take a suffix out of the SHA-256 of their name.
    """
    groups = defaultdict(list)
    for name in set(names):
        groups[_natural(name).lower()].append(name)
    keys: dict[str, str] = {}
    taken = {folded for folded, members in groups.items() if len(members) == 1}
    for folded, members in sorted(groups.items()):
        if len(members) == 1:
            keys[members[0]] = _natural(members[0])
            continue
        for name in sorted(members):
            digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
            length = next(length for length in (8, 12, 64) if length == 64 or f"{folded}-{digest[:length]}" not in taken)
            # 64 digits leave room for no more than the start of the name, and need none.
            keys[name] = f"{_natural(name)}-{digest[:length]}" if length < 64 else digest
            taken.add(keys[name].lower())
    return keys


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
