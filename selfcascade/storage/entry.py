"""One stored object as a manifest lists it: key, size, SHA-256, and a SHA-256 for each 8 MiB block."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

BLOCK = 8 * 2**20
"""Bytes of a block: a range of an object is checked by the digests of the blocks that it touches."""

HEX = r"^[0-9a-f]{64}$"
METADATA_BLOCKS = 32
"""Objects of more blocks leave their block digests out of the object's metadata, which S3 limits to 2 KB."""


class ObjectEntry(BaseModel):
    """An object that was written: what a reader may hold its bytes against."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str = Field(min_length=1, description="key, relative to the artifact in a manifest, else to the store's prefix")
    size: int = Field(ge=0, description="bytes")
    sha256: str = Field(pattern=HEX, description="SHA-256 of the whole object")
    blocks: tuple[str, ...] = Field(description="SHA-256 of each 8 MiB block, the last one shorter")
    source: str | None = Field(None, description="prefix of the artifact that holds the object, for one shared by reference")

    def renamed(self, key: str, source: str | None = None) -> ObjectEntry:
        """The same bytes under another key."""
        return self.model_copy(update={"key": key, "source": source})

    def same_bytes(self, other: ObjectEntry) -> bool:
        """Whether both describe equal bytes."""
        return (self.size, self.sha256, self.blocks) == (other.size, other.sha256, other.blocks)

    def metadata(self) -> dict[str, str]:
        """What the writer leaves on the object itself, so that publishing need not read it back."""
        found = {"sha256": self.sha256}
        if 1 < len(self.blocks) <= METADATA_BLOCKS:
            found["blocks"] = base64.b64encode(b"".join(bytes.fromhex(block) for block in self.blocks)).decode()
        return found


@dataclass(frozen=True)
class ObjectInfo:
    """One listed object; ``modified`` is by the store's clock."""

    key: str
    size: int
    etag: str
    modified: datetime


class BlockHasher:
    """Running SHA-256 of a stream and of its blocks."""

    def __init__(self) -> None:
        self.size = 0
        self._whole = hashlib.sha256()
        self._block = self._whole  # the first block is the whole so far: small objects are hashed once
        self._blocks: list[str] = []

    def update(self, data: bytes | memoryview) -> None:
        """Take the next bytes, any number of them."""
        view = memoryview(data)
        while view:
            room = BLOCK - self.size % BLOCK
            part, view = view[:room], view[room:]
            self._whole.update(part)
            if self._block is not self._whole:
                self._block.update(part)
            self.size += len(part)
            if self.size % BLOCK == 0:
                self._close_block()

    def entry(self, key: str) -> ObjectEntry:
        """The entry of everything that was taken; ends the stream."""
        if self.size % BLOCK:
            self._close_block()
        return ObjectEntry(key=key, size=self.size, sha256=self._whole.hexdigest(), blocks=tuple(self._blocks))

    def _close_block(self) -> None:
        self._blocks.append(self._block.hexdigest())
        self._block = hashlib.sha256()


def entry_of(key: str, data: bytes | Path | Iterable[bytes]) -> ObjectEntry:
    """Entry of bytes, of a file (streamed), or of a stream."""
    hasher = BlockHasher()
    for chunk in _chunks(data):
        hasher.update(chunk)
    return hasher.entry(key)


def entry_from_metadata(key: str, size: int, metadata: dict[str, str]) -> ObjectEntry | None:
    """Entry from what the writer left on the object; None when it left too little."""
    sha256 = metadata.get("sha256", "")
    count = -(-size // BLOCK)
    if len(sha256) != 64:
        return None
    if count <= 1:
        return ObjectEntry(key=key, size=size, sha256=sha256, blocks=(sha256,) * count)
    packed = base64.b64decode(metadata.get("blocks", ""))
    if len(packed) != 32 * count:
        return None
    return ObjectEntry(key=key, size=size, sha256=sha256, blocks=tuple(packed[i : i + 32].hex() for i in range(0, len(packed), 32)))


def recorded(found: dict[str, Any]) -> str | None:
    """SHA-256 that the writer left on an object, out of the store's reply; None on objects of other tools."""
    sha256 = found.get("Metadata", {}).get("sha256")
    return sha256 if sha256 is None else str(sha256)


def _chunks(data: bytes | Path | Iterable[bytes]) -> Iterator[bytes | memoryview]:
    if isinstance(data, (bytes, bytearray, memoryview)):
        yield memoryview(data)
    elif isinstance(data, Path):
        with data.open("rb") as file:
            while chunk := file.read(2**20):
                yield chunk
    else:
        yield from data
