"""The object store: a small class over boto3 that never overwrites and checks what it reads."""

from __future__ import annotations

import builtins
import hashlib
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from selfcascade import traffic
from selfcascade.config import StoreSettings
from selfcascade.storage import probe
from selfcascade.storage.connection import Connection
from selfcascade.storage.entry import BLOCK, ObjectEntry, ObjectInfo, entry_from_metadata, entry_of, recorded
from selfcascade.storage.errors import Conflict, IntegrityError, NotFound
from selfcascade.storage.objects import Objects
from selfcascade.storage.streaming import resumed, whole_file
from selfcascade.storage.upload import upload

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

OVERWRITABLE = ("cache/", "runs/", "leases/", "probe/", "purged/")
"""Prefixes of which nothing is part of an artifact."""

TRIES = 3
"""How often bytes are read that do not match their digest: they may have been damaged on the way."""

T = TypeVar("T")


class Store:
    """Objects under one prefix of one bucket. Keys are relative to the prefix.

    Picklable, and safe to use from threads. A worker that unpickles a store connects on its own.
    """

    def __init__(self, settings: StoreSettings, *, read_only: bool = False) -> None:
        """Use :meth:`open`, which also checks that the store can be used."""
        self._connection = Connection(settings, read_only=read_only)
        self._objects = Objects(self._connection)

    @classmethod
    def open(cls, settings: StoreSettings, *, read_only: bool = False) -> Self:
        """Attach to the store; without an endpoint, to the embedded one, which is started when it does not run.

        Args:
            settings: where the store is.
            read_only: write nothing, not even the bucket, and take an embedded store that was never made for an empty one (``--dry-run``).

        Raises:
            StoreError: unreachable, wrong keys, no such bucket, or a bucket that ignores conditional writes.
        """
        store = cls(settings, read_only=read_only)
        try:
            if not store._connection.absent:
                store._connection.check_bucket()
                if not read_only:
                    probe.check(store)
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Drop the client and stop being a user of the embedded server. The store may be used again: it connects again."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def settings(self) -> StoreSettings:
        """Settings with the endpoint and the folder resolved."""
        return self._connection.settings

    @property
    def bucket(self) -> str:
        """Name of the bucket."""
        return self.settings.bucket

    @property
    def is_embedded(self) -> bool:
        """Whether the store is the embedded one."""
        return self._connection.embedded

    @property
    def read_only(self) -> bool:
        """Whether the store was opened to look only."""
        return self._connection.read_only

    @property
    def absent(self) -> bool:
        """Whether this is a read-only view of an embedded store that was never made: everything in it is missing."""
        return self._connection.absent

    @property
    def client(self) -> S3Client:
        """The boto3 client of this process."""
        return self._connection.client

    def uri(self, key: str) -> str:
        """``s3://bucket/prefix/key``."""
        return self._objects.uri(key)

    # Reading

    def head(self, key: str) -> ObjectInfo | None:
        """What the store knows of an object, or None when there is none."""
        found = self._objects.head(key)
        return None if found is None else ObjectInfo(key, int(found["ContentLength"]), found["ETag"], found["LastModified"])

    def read(self, key: str, *, sha256: str | None = None) -> bytes:
        """All bytes of an object, checked against ``sha256``, or without it against what its writer recorded on it.

        Raises:
            NotFound: there is no such object.
            IntegrityError: the bytes are not the ones that ``sha256`` or the writer named.
        """
        return self.read_tagged(key, sha256=sha256)[0]

    def read_tagged(self, key: str, *, sha256: str | None = None) -> tuple[bytes, str]:
        """As :meth:`read`, with the ETag that a compare-and-swap needs."""

        def read() -> tuple[bytes, str]:
            found: builtins.list[dict[str, Any]] = []
            data = b"".join(self.stream(key, found=found))
            expected = sha256 or recorded(found[0])
            if expected is not None:
                self._compare(key, hashlib.sha256(data).hexdigest(), expected)
            return data, found[0]["ETag"]

        return _sound(read)

    def stream(self, key: str, *, found: builtins.list[dict[str, Any]] | None = None, span: tuple[int, int] | None = None) -> Iterator[bytes]:
        """The bytes of an object in chunks of at most 1 MiB, unchecked; a connection that breaks is taken up where it broke.

        ``found``, when given, receives what the store says of the object; ``span`` is the first byte wanted and the one after the last.
        """
        self._objects.must_exist(key)

        def get(more: dict[str, Any]) -> Any:
            reply = self._objects.get(key, more)
            if found is not None:
                found[:] = [reply]
            return reply

        return resumed(get, lambda: self._connection.reading(self._objects.named(key)), span)

    def download(self, key: str, path: Path, *, sha256: str | None = None) -> None:
        """Stream an object to ``path``, which appears whole and checked or not at all.

        Raises:
            NotFound, IntegrityError: as :meth:`read`.
        """

        def download() -> None:
            hasher = hashlib.sha256()
            found: builtins.list[dict[str, Any]] = []
            with whole_file(path) as file:
                for chunk in self.stream(key, found=found):
                    hasher.update(chunk)
                    file.write(chunk)
                expected = sha256 or recorded(found[0])
                if expected is not None:
                    self._compare(key, hasher.hexdigest(), expected)

        _sound(download)

    def read_range(self, entry: ObjectEntry, start: int, end: int, *, buffer: bytearray | None = None) -> memoryview:
        """Bytes ``start`` to ``end`` (exclusive) of an object, checked by the digests of the blocks that hold them; not to be written to.

        They lie in ``buffer`` where one is given that can hold these blocks, else in memory of their own: whoever reads much saves the time that the system
        takes for new memory, which may be more than that of the digest.

        Raises:
            IntegrityError: a block is not the one that was committed; names the block.
        """
        start, end = max(start, 0), min(end, entry.size)
        if start >= end:
            return memoryview(b"")
        first, last = start // BLOCK, (end - 1) // BLOCK
        begin, stop = first * BLOCK, min((last + 1) * BLOCK, entry.size)
        data = memoryview(buffer if buffer is not None and len(buffer) >= stop - begin else bytearray(stop - begin))[: stop - begin]

        def read() -> memoryview:
            filled = 0
            for chunk in self.stream(entry.key, span=(begin, stop)):  # put in place one by one, so that each takes the memory of the one before it
                taken = min(len(chunk), len(data) - filled)
                data[filled : filled + taken] = chunk[:taken]
                filled += taken
            whole = data[:filled].toreadonly()
            for number in range(first, last + 1):
                block = whole[(number - first) * BLOCK : (number - first + 1) * BLOCK]
                self._compare(entry.key, hashlib.sha256(block).hexdigest(), entry.blocks[number], part=f" in block {number}")
            return whole[start - begin : end - begin]

        return _sound(read)

    def entry(self, key: str) -> ObjectEntry:
        """Size and digests of a stored object: from what its writer left on it, else by reading it.

        Raises:
            NotFound: there is no such object.
        """
        found = self._objects.head(key)
        if found is None:
            raise NotFound(f"{self._objects.named(key)} does not exist")
        return entry_from_metadata(key, int(found["ContentLength"]), found.get("Metadata", {})) or entry_of(key, self.stream(key))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Objects under ``prefix``, in no order that may be relied on."""
        return self._objects.list(prefix)

    def presign(self, key: str, seconds: int = 3600) -> str:
        """A link that reads one object without keys, for ``seconds``."""
        return self.call(key, lambda: self.client.generate_presigned_url("get_object", Params=self._objects.address(key), ExpiresIn=seconds))

    def now(self) -> datetime:
        """The store's own clock, to the second."""
        reply = self.call("", lambda: self.client.head_bucket(Bucket=self.bucket))
        return parsedate_to_datetime(reply["ResponseMetadata"]["HTTPHeaders"]["date"])

    # Writing

    def put_new(self, key: str, data: bytes | Path) -> ObjectEntry:
        """Write an object that does not exist yet. When it exists, nothing is written and what is there is adopted.

        Returns:
            The entry of what the store holds now, ours or the earlier writer's.

        Raises:
            IntegrityError: what is there is not what its writer recorded.
        """
        entry = entry_of(key, data)
        for _ in range(5):
            try:
                self._objects.put(entry, data, {"IfNoneMatch": "*"})
                return entry
            except (Conflict, NotFound):  # the latter: the last request of an upload in parts was sent twice
                adopted = self._adopt(key)
                if adopted is not None:
                    return adopted
        raise Conflict(f"{self._objects.named(key)} comes and goes while it is written; is a gc or a purge at work? Run again")

    def put_cache(self, key: str, data: bytes | Path) -> None:
        """Write an object whatever is there; for caches and records of runs only, never for a part of an artifact."""
        if not key.startswith(OVERWRITABLE):
            raise ValueError(f"{key} is no cache or record ({', '.join(OVERWRITABLE)}): use put_new, which overwrites nothing")
        self.overwrite(key, data)

    def overwrite(self, key: str, data: bytes | Path) -> ObjectEntry:
        """Write an object whatever is there. For caches, and for a purge, which must be able to."""
        entry = entry_of(key, data)
        self._objects.put(entry, data, {})
        return entry

    def compare_and_swap(self, key: str, data: bytes, etag: str | None) -> str:
        """Replace the object that has ``etag``, or create it when ``etag`` is None.

        Returns:
            The new ETag.

        Raises:
            Conflict: the object is another one by now.
        """
        unsure: list[bool] = []
        try:
            return self._objects.put(entry_of(key, data), data, {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}, unsure)
        except (Conflict, NotFound):
            # A lost reply makes the client try again and meet its own write.
            if any(unsure) and self.head(key) is not None:
                found, tag = self.read_tagged(key)
                if found == data:
                    return tag
            raise Conflict(f"{self._objects.named(key)}: another writer was first") from None

    def put_parts_if_absent(self, key: str, data: bytes) -> str:
        """Write in parts, whatever the size, when there is nothing yet. For the probe.

        Raises:
            Conflict: the object exists.
        """
        return self.call(key, lambda: upload(self.client, entry_of(key, data), data, self._objects.address(key), {"IfNoneMatch": "*"}, in_parts=True))

    def delete(self, keys: Iterable[str]) -> int:
        """Delete objects; missing ones do not matter. Returns how many were named."""
        return self._objects.delete(keys)

    # Inside

    def call(self, key: str, request: Callable[[], T]) -> T:
        """Run a request of the client; what boto3 raises becomes one line that names ``key``."""
        return self._objects.call(key, request)

    def _adopt(self, key: str) -> ObjectEntry | None:
        """Entry of the object that was there first, by reading it; None when it is gone again."""
        found = self._objects.head(key)
        if found is None:
            return None
        try:
            read = entry_of(key, self.stream(key))
        except NotFound:
            return None
        expected = recorded(found)
        if expected is not None:
            self._compare(key, read.sha256, expected)
        return read

    def _compare(self, key: str, found: str, expected: str, *, part: str = "") -> None:
        if found != expected:
            raise IntegrityError(
                f"{self._objects.named(key)} does not match its digest{part}: stored bytes have SHA-256 {found[:12]}…, expected {expected[:12]}…; "
                "restore it from a copy, or delete it and run its stage again"
            )


def _sound(read: Callable[[], T]) -> T:
    """What ``read`` returns once it meets no damage: what was damaged on the way comes whole the next time, what was damaged in the store never does."""
    for _ in range(TRIES - 1):
        try:
            return read()
        except IntegrityError:
            traffic.count(damaged=1)
    return read()
