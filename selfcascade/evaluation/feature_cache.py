"""Features of sets that are compared by hand, kept in the user's cache folder: such a comparison writes to no store, and often there is none."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from numpy.typing import NDArray

from selfcascade.evaluation.sealed import Arrays, sealed, unsealed
from selfcascade.settings import digest_of


@dataclass(frozen=True, slots=True)
class FeatureCache:
    """Arrays by the digest of all that shapes them; the folder is safe to delete at any time."""

    folder: Path

    @classmethod
    def of_user(cls) -> Self:
        """``selfcascade/features`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``."""
        return cls(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "selfcascade", "features"))

    def get(self, what: Mapping[str, Any]) -> tuple[Arrays, Any] | None:
        """The arrays that were put under ``what``, and what was said beside them; None where nothing was, or it is damaged."""
        path = self._path(what)
        return unsealed(path.read_bytes()) if path.is_file() else None

    def put(self, what: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], beside: object) -> None:
        """Keep ``arrays`` and the JSON value ``beside`` under ``what``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # Another process reads the whole file or none.
        with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
            file.write(sealed(arrays, beside))
        Path(file.name).replace(self._path(what))

    def _path(self, what: Mapping[str, Any]) -> Path:
        return self.folder / digest_of(what)
