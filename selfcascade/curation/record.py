"""Entries of a listing and reasons of a rejection: what passes between the sources and the shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from selfcascade.curation.splits import Split
from selfcascade.settings import canonical_json


class Rejected(Exception):
    """One input does not make it into the dataset; the run goes on. The message is the reason: its kind, a colon, and what was found."""

    def __init__(self, reason: str, *, thumbnail: Callable[[], bytes | None] | None = None, **found: Any) -> None:
        """Keep what is known of the input.

        Args:
            reason: why it is left out.
            thumbnail: makes a small copy as WebP, or nothing where it cannot; unset: none may be kept.
            found: columns of the table that are known nevertheless.
        """
        super().__init__(reason)
        self.thumbnail = thumbnail
        self.found = found

    @property
    def reason(self) -> str:
        """The reason as the table of the shard keeps it."""
        return str(self)


def kind_of(reason: str) -> str:
    """The countable part of a reason: ``too narrow: aspect 5.00 …`` is a ``too narrow``, ``duplicate of cats-1`` a ``duplicate``."""
    return "duplicate" if reason.startswith("duplicate of ") else reason.partition(":")[0]


@dataclass(frozen=True, slots=True)
class Entry:
    """One input as the listing knows it, before any pixel is read."""

    key: str
    """Unique in the dataset, without dots."""
    source: str
    """Name inside the source: a relative path, never an absolute one."""
    size: int
    """Bytes of the input."""
    digest: str
    """``sha256:…`` of the content, or ``etag:…`` of an object; empty where the content could not be read."""
    caption: str | None
    reason: str | None = None
    """Why it is rejected already, if it is."""
    split: Split | None = None
    """The split that the source puts it in; None: drawn from the key."""
    extra: dict[str, Any] | None = None
    """What the source says of it beside the caption, as plain JSON values by name."""
    place: str | None = None
    """Where in the source it lies, if ``source`` alone does not say."""

    def rejected(self, reason: str) -> Entry:
        """The same input with a reason."""
        return replace(self, reason=reason)

    @property
    def listed(self) -> str:
        """First digits of the SHA-256 of :meth:`to_line`: another input, caption or reason gives other ones."""
        return hashlib.sha256(self.to_line()).hexdigest()[:16]

    def to_line(self) -> bytes:
        """One line of JSON, equal for equal entries."""
        fields = [self.key, self.source, self.size, self.digest, self.caption, self.reason]
        more = [self.split, self.extra, self.place]
        while more and more[-1] is None:
            more.pop()
        # A listing keeps the version that it had before any of these was known.
        return canonical_json(fields + (more if len(more) != 1 else [*more, None])) + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Entry:
        """Inverse of :meth:`to_line`."""
        return cls(*json.loads(line))


def version_of_listing(entries: Iterable[Entry]) -> str:
    """Version of a source: SHA-256, in hex, of its listing sorted by key. It holds no absolute path, so a copy elsewhere has the same version."""
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(entry.to_line())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """An input as a shard stores it."""

    data: bytes
    """The encoded picture: RGB, sRGB, without metadata."""
    extension: str
    """png, webp or jpg."""
    width: int
    height: int
    """Pixels of the source, upright."""
    sha256: str
    """Of the source's content."""
    scores: dict[str, float | str]
    """See :mod:`selfcascade.curation.scores`."""
