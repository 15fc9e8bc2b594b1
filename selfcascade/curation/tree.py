"""A tree of files, in a folder or under a prefix: what listing and reading need to know of either."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from selfcascade.settings import SettingsError

LARGEST_FILE = 2**30
"""Bytes of a picture file above which it is rejected unread."""


class SourceChanged(SettingsError):
    """A file is not the one that was listed: the version of the input no longer describes it."""

    def __init__(self, label: str, name: str) -> None:
        super().__init__(f"{label}/{name} changed after it was listed; let nothing write there meanwhile and run again")


@dataclass(frozen=True, slots=True)
class File:
    """One file of a tree."""

    name: str
    """Relative path with forward slashes."""
    size: int
    """Bytes."""
    etag: str | None = None
    """What the object store says of the content; None in a folder."""


class Tree(Protocol):
    """A folder or a prefix."""

    @property
    def label(self) -> str:
        """How messages name it."""

    def files(self) -> Iterator[File]:
        """Every file but hidden ones, in any order.

        Raises:
            SettingsError: the tree does not exist or cannot be listed.
        """

    def digest(self, file: File) -> str:
        """``sha256:…`` or ``etag:…`` of the content.

        Raises:
            OSError: the file cannot be read.
        """

    def read(self, file: File) -> bytes:
        """The content.

        Raises:
            OSError: the file cannot be read.
            SourceChanged: an ETag is given and the object has another one by now.
        """

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """``size`` bytes of a file from ``start``; fewer where it ends.

        Raises:
            OSError: the file cannot be read.
        """

    def size(self, name: str) -> int:
        """Bytes of a file.

        Raises:
            OSError: the file cannot be read.
            SourceChanged: the object is gone.
        """

    def local(self, file: File) -> AbstractContextManager[Path]:
        """The file on this machine, while the block lasts.

        Raises:
            SourceChanged: an ETag is given and the object has another one by now.
        """


def is_hidden(name: str) -> bool:
    """Whether a part of the path starts with a dot: editors, version control and file managers leave such things behind."""
    return any(part.startswith(".") for part in name.split("/"))
