"""A folder of pictures."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from selfcascade.curation.tree import File, is_hidden
from selfcascade.settings import SettingsError


class FolderTree:
    """Files under a folder, recursively; links to files are followed, links to folders are not (they may lead in circles)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def label(self) -> str:
        """The folder as the user named it."""
        return str(self.path)

    def files(self) -> Iterator[File]:
        """Every file but hidden ones. A dangling link counts as a file of size 0 that cannot be read."""
        if not self.path.exists():
            raise SettingsError(f"source.path: {self.path} does not exist; give the folder that holds the pictures")
        if not self.path.is_dir():
            raise SettingsError(f"source.path: {self.path} is not a folder; give the folder that holds the pictures")
        for folder, folders, names in os.walk(self.path, onerror=_refuse):
            folders[:] = [name for name in folders if not is_hidden(name)]
            for name in names:
                relative = (Path(folder) / name).relative_to(self.path).as_posix()
                if is_hidden(name):
                    continue
                try:
                    size = os.stat(os.path.join(folder, name)).st_size
                except OSError:
                    size = 0
                yield File(relative, size)

    def digest(self, file: File) -> str:
        """SHA-256 of the content."""
        with self._regular(file.name).open("rb") as stream:
            return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"

    def read(self, file: File) -> bytes:
        """The content."""
        return self._regular(file.name).read_bytes()

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """``size`` bytes from ``start``."""
        with self._regular(name).open("rb") as stream:
            stream.seek(start)
            return stream.read(size)

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return self._regular(name).stat().st_size

    def local(self, file: File) -> AbstractContextManager[Path]:
        """The file itself."""
        return nullcontext(self._regular(file.name))

    def _regular(self, name: str) -> Path:
        """The file's path, if reading it ends: a pipe or a device may never."""
        path = self.path / name
        if path.exists() and not path.is_file():
            raise OSError(22, "not a regular file")
        return path


def _refuse(error: OSError) -> None:
    raise SettingsError(f"source.path: {error.filename} cannot be listed ({error.strerror}); check its permissions") from None
