"""Exact duplicates: the same content under two names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from selfcascade.curation.decoding import format_of_name
from selfcascade.curation.record import Entry


def mark_duplicates(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Reject every entry whose content an earlier one has: of entries in order of their keys the first survives, whatever the workers.

    Entries that are rejected already neither count nor survive. What a file claims to be belongs to its identity: JPEG bytes that are named ``.png`` will be
    rejected, and must not take the well-named copy with them.
    """
    first: dict[tuple[str, int, str | None], str] = {}
    for entry in entries:
        if entry.reason is not None:
            yield entry
            continue
        identity = (entry.digest, entry.size, format_of_name(entry.source))
        survivor = first.setdefault(identity, entry.key)
        yield entry if survivor == entry.key else entry.rejected(f"duplicate of {survivor}")
