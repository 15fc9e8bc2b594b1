"""A safetensors file that knows its own SHA-256: what caches and checkpoints are stored in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from selfcascade.settings import SettingsError, canonical_json
from selfcascade.storage import IntegrityError, Store


class TensorFile:
    """Named tensors and a JSON record in a local file. Tensors are mapped into memory when they are asked for, not loaded."""

    def __init__(self, path: Path, *, name: str) -> None:
        """Open ``path`` and compare its content with the SHA-256 that it carries. The file may be deleted afterwards.

        Args:
            path: local file.
            name: what messages call it, such as its address in the store.

        Raises:
            IntegrityError: the file is no tensor file, or its content is not what was written.
        """
        self.name = name
        try:
            file: Any = safetensors.safe_open(path, framework="pt")
            self._file = file
            sealed = json.loads(file.metadata()["record"])
            self.record: dict[str, Any] = sealed["record"]
            self.sha256: str = sealed["sha256"]
            self.names: frozenset[str] = frozenset(file.keys())
            found = _content_sha256(((key, self.tensor(key)) for key in sorted(self.names)), self.record)
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"{name} is no whole tensor file ({' '.join(str(error).split())[:100]}); delete it, it is made again") from None
        if found != self.sha256:
            raise IntegrityError(f"{name} holds content of SHA-256 {found[:12]}… but was written with {self.sha256[:12]}…; delete it, it is made again")

    def tensor(self, name: str) -> Tensor:
        """The tensor called ``name``; KeyError when there is none."""
        if name not in self.names:
            raise KeyError(f"{self.name} holds no tensor {name!r}")
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor called ``name``, which is not read."""
        return tuple(self._file.get_slice(name).get_shape())


def open_tensor_file(store: Store, key: str) -> TensorFile:
    """The tensor file stored under ``key``.

    Raises:
        NotFound: there is no such object.
        IntegrityError: it is damaged; names it.
    """
    with TemporaryDirectory(prefix="selfcascade-") as folder:
        path = Path(folder, "tensors.safetensors")
        store.download(key, path)
        return TensorFile(path, name=f"object {store.uri(key)}")  # mapped, so the name may go: nothing is left behind by a killed process


@contextmanager
def written_tensor_file(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> Iterator[Path]:
    """A file with ``tensors`` and ``record`` for as long as the block lasts, to be put into a store. Equal content gives equal bytes."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    sha256 = _content_sha256(((name, contiguous[name]) for name in sorted(contiguous)), record)
    # One metadata key only: safetensors writes several in no fixed order.
    metadata = {"record": canonical_json({"record": dict(record), "sha256": sha256}).decode()}
    with TemporaryDirectory(prefix="selfcascade-") as folder:
        path = Path(folder, "tensors.safetensors")
        try:
            save_file(contiguous, path, metadata=metadata)
        except (OSError, safetensors.SafetensorError) as error:
            reason = " ".join(str(error).split())[:100]
            raise SettingsError(f"temporary folder {gettempdir()} cannot be written ({reason}); free some room or set TMPDIR") from None
        yield path


def _content_sha256(tensors: Iterable[tuple[str, Tensor]], record: Mapping[str, Any]) -> str:
    """SHA-256 of the record, then of name, dtype, shape and bytes of each tensor in the order given."""
    digest = hashlib.sha256(canonical_json(dict(record)))
    for name, tensor in tensors:
        digest.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]))
        content: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        digest.update(content)
    return digest.hexdigest()
