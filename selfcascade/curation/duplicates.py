"""Duplicates: the same content under two names, and the same caption on many pictures."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from itertools import groupby, repeat

from selfcascade.config import FilterSettings
from selfcascade.curation import filters
from selfcascade.curation.decoding import format_of_name
from selfcascade.curation.record import Entry, Rejected
from selfcascade.curation.rows import Rows, matched


def mark_duplicates(entries: Iterable[Entry], settings: FilterSettings, late: Iterable[bool] | None = None) -> Iterator[Entry]:
    """Reject every entry whose content an earlier one has, or whose caption too many share.

    Of entries in order of their keys the first of each content survives, whatever the workers, unless it came late. Entries that are rejected already
    neither count nor survive. What a file claims to be belongs to its identity: JPEG bytes that are named ``.png`` will be rejected, and must not take the
    well-named copy with them.
    Memory stays flat: what is known of the inputs is sorted and matched on disk.

    Args:
        entries: in the order of their keys; each is looked at once.
        settings: how many may share a caption.
        late: of each entry, whether it gives way to one of its content that was there before; unset: none does.
    """
    with tempfile.TemporaryFile(prefix="selfcascade-") as kept, Rows() as contents, Rows() as captions, Rows() as found:
        for entry, is_late in zip(entries, repeat(False) if late is None else late, strict=late is not None):
            line = entry.to_line()
            kept.write(line)
            if entry.reason is None:
                contents.add(_identity(entry), f"{is_late:d}{entry.key}")
                captions.add(hashlib.sha256((entry.caption or "").casefold().encode()).hexdigest()[:32], entry.key)
        for _, group in groupby(contents, key=lambda row: row[0]):
            first = None
            for _, turn in group:
                if first is None:
                    first = turn[1:]
                else:
                    found.add(turn[1:], 1, f"duplicate of {first}")
        _boilerplate(captions, settings, found)
        kept.seek(0)
        for (_, entry), facts in matched(([entry.key, entry] for entry in map(Entry.from_line, kept)), found):
            reasons = sorted((rank, reason) for _, rank, reason in facts)
            yield entry.rejected(reasons[0][1]) if reasons else entry


def _boilerplate(captions: Rows, settings: FilterSettings, found: Rows) -> None:
    """Reasons of the inputs whose caption too many have; such captions are counted first, so that no group is held in memory."""
    reasons = {}
    for caption, group in groupby(captions, key=lambda row: row[0]):
        try:
            filters.check_copies(sum(1 for _ in group), settings)
        except Rejected as rejection:
            reasons[caption] = rejection.reason
    if reasons:
        for caption, key in captions:
            if caption in reasons:
                found.add(key, 0, reasons[caption])


def _identity(entry: Entry) -> str:
    return hashlib.sha256(repr((entry.digest, entry.size, format_of_name(entry.source))).encode()).hexdigest()[:32]
