"""An object of an artifact as a file in a folder, fetched once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from selfcascade.storage.artifact import Artifact
from selfcascade.storage.entry import ObjectEntry
from selfcascade.storage.errors import StoreError


def pull(artifact: Artifact, entry: ObjectEntry, folder: Path, progress: Callable[[int], None] | None = None) -> bool:
    """Have ``folder/key`` hold the object. Returns whether it had to be fetched; a file that is right already stays.

    Raises:
        StoreError: the key would leave the folder, or the file cannot be written.
        IntegrityError: the stored bytes are not the committed ones.
    """
    path = folder / entry.key
    if not path.resolve().is_relative_to(folder.resolve()):
        raise StoreError(f"{artifact} lists an object {entry.key!r} that would lie outside {folder}; do not trust this artifact")
    fetch = not (path.is_file() and path.stat().st_size == entry.size and _digest(path) == entry.sha256)
    if fetch:
        artifact.download(entry.key, path)
    if progress is not None:
        progress(entry.size)
    return fetch


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
