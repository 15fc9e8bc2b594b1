"""The object store: one small class over boto3 that never overwrites and checks what it reads."""

from __future__ import annotations

import mimetypes
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from botocore.exceptions import BotoCoreError, ClientError

from selfcascade.config import StoreSettings
from selfcascade.storage import embedded, probe
from selfcascade.storage.client import Target, make_client, remote_target
from selfcascade.storage.entry import BLOCK, BlockHasher, ObjectEntry, entry_from_metadata, entry_of
from selfcascade.storage.errors import BucketMissing, Conflict, IntegrityError, NotFound, StoreError, StoreUnreachable, one_line
from selfcascade.storage.multipart import put_parts

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

CHUNK = 2**20
BREAKS = 3
"""Broken connections that one download survives."""
MIB = 2**20
CACHE_PREFIXES = ("cache/", "runs/", "leases/", "probe/", "purged/")
"""What may be overwritten: nothing under it is part of an artifact."""

T = TypeVar("T")
mimetypes.add_type("application/vnd.apache.parquet", ".parquet")


@dataclass(frozen=True)
class ObjectInfo:
    """One listed object; ``modified`` is by the store's clock."""

    key: str
    size: int
    etag: str
    modified: datetime


class Store:
    """Objects under one prefix of one bucket. Keys are relative to the prefix.

    Picklable and safe to use from threads: the client is made on first use in each process and never travels. A worker that unpickles
    a store becomes a user of the embedded server on its own.
    """

    def __init__(self, settings: StoreSettings, *, read_only: bool = False) -> None:
        """Use :meth:`open`, which also checks that the store can be used."""
        if remote_target(settings) is None:
            settings = settings.model_copy(update={"folder": settings.folder.resolve()})
        self.settings = settings
        self.read_only = read_only
        self._reset()

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
            if not store.absent:
                store._check_bucket()
                if not read_only:
                    probe.check(store)
        except BaseException:
            store.close()
            raise
        return store

    # Life

    def close(self) -> None:
        """Drop the client and stop being a user of the embedded server."""
        with self._guard:
            if self._client is not None:
                self._client.close()
            if self._attached:
                embedded.release(self.settings.folder)
            self._client, self._attached = None, False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings, "read_only": self.read_only}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.settings, self.read_only = state["settings"], state["read_only"]
        self._reset()

    def _reset(self) -> None:
        self._guard = threading.RLock()
        self._client: S3Client | None = None
        self._attached = False
        self._process = os.getpid()
        self._target: Target | None = None

    @property
    def bucket(self) -> str:
        """Name of the bucket."""
        return self.settings.bucket

    @property
    def is_embedded(self) -> bool:
        """Whether the store is the embedded one."""
        return remote_target(self.settings) is None

    @property
    def absent(self) -> bool:
        """A read-only view of an embedded store that was never made: everything in it is missing."""
        return self.read_only and self.is_embedded and not embedded.exists(self.settings.folder)

    @property
    def client(self) -> S3Client:
        """The boto3 client of this process."""
        with self._guard:
            if self._process != os.getpid():  # forked: the parent's connections are not ours
                self._client, self._attached, self._process = None, False, os.getpid()
            if self._client is None:
                self._target = self._find()
                self._client = make_client(self.settings, self._target)
            return self._client

    def _find(self) -> Target:
        remote = remote_target(self.settings)
        if remote is not None:
            return remote
        bucket = None if self.read_only else self.bucket
        if self._attached:
            found = embedded.ensure(self.settings.folder, bucket)
        else:
            found = embedded.attach(self.settings.folder, bucket)
            self._attached = True
        return Target(found.url, found.access_key, found.secret_key, embedded=True)

    def _check_bucket(self) -> None:
        target = self._target or remote_target(self.settings)
        if target is None:
            return  # made by the attachment
        # A wrong address shall be said at once, not after minutes of patience.
        client = make_client(self.settings, target, attempts=2)
        url = target.url or "AWS"
        try:
            with one_line(f"bucket {self.bucket!r}", endpoint=url, bucket=self.bucket, embedded=False):
                client.head_bucket(Bucket=self.bucket)
        except NotFound:
            raise BucketMissing(
                f"bucket {self.bucket!r} does not exist at {url}; create it (aws s3api create-bucket --bucket {self.bucket}) or set store.bucket"
            ) from None
        finally:
            client.close()

    # Names

    def uri(self, key: str) -> str:
        """``s3://bucket/prefix/key``."""
        return f"s3://{self.bucket}/{self._full(key)}"

    def _full(self, key: str) -> str:
        prefix = self.settings.prefix.strip("/")
        return f"{prefix}/{key}" if prefix else key

    def _relative(self, full: str) -> str:
        prefix = self.settings.prefix.strip("/")
        return full[len(prefix) + 1 :] if prefix else full

    # Reading

    def head(self, key: str) -> ObjectInfo | None:
        """What the store knows of an object, or None when there is none."""
        found = self._head(key)
        return None if found is None else ObjectInfo(key, int(found["ContentLength"]), found["ETag"], found["LastModified"])

    def read(self, key: str, *, sha256: str | None = None) -> bytes:
        """All bytes of an object, checked against ``sha256`` when it is given.

        Raises:
            NotFound: there is no such object.
            IntegrityError: the bytes are not the ones that ``sha256`` names.
        """
        return self.read_tagged(key, sha256=sha256)[0]

    def read_tagged(self, key: str, *, sha256: str | None = None) -> tuple[bytes, str]:
        """As :meth:`read`, with the ETag that a compare-and-swap needs."""
        tag: list[str] = []
        data = b"".join(self.stream(key, tag=tag))
        if sha256 is not None:
            self._compare(key, entry_of(key, data).sha256, sha256)
        return data, tag[0]

    def stream(self, key: str, *, tag: list[str] | None = None) -> Iterator[bytes]:
        """The bytes of an object in chunks of at most 1 MiB, unchecked; a connection that breaks is taken up where it broke.

        ``tag``, when given, receives the ETag.
        """
        self._must_exist(key)
        done, breaks, resume = 0, 0, {}
        while True:
            found = self._call(key, lambda resume=resume: self.client.get_object(Bucket=self.bucket, Key=self._full(key), **resume))  # type: ignore[misc]
            if tag is not None:
                tag[:] = [found["ETag"]]
            try:
                with self._one_line(key), closing(found["Body"]) as body:
                    for chunk in body.iter_chunks(CHUNK):
                        done += len(chunk)
                        yield chunk
                return
            except StoreUnreachable:
                breaks += 1
                if breaks > BREAKS:
                    raise
                resume = {"Range": f"bytes={done}-", "IfMatch": found["ETag"]}

    def download(self, key: str, path: Path, *, sha256: str | None = None) -> None:
        """Stream an object to ``path``, which appears whole and checked or not at all.

        Raises:
            NotFound, IntegrityError: as :meth:`read`.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
        hasher = BlockHasher()
        try:
            with part.open("wb") as file:
                for chunk in self.stream(key):
                    hasher.update(chunk)
                    file.write(chunk)
            if sha256 is not None:
                self._compare(key, hasher.entry(key).sha256, sha256)
            part.replace(path)
        except OSError as error:
            raise StoreError(f"cannot write {path} ({error.strerror}); free space or choose another folder") from None
        finally:
            part.unlink(missing_ok=True)

    def read_range(self, entry: ObjectEntry, start: int, end: int) -> bytes:
        """Bytes ``start`` to ``end`` (exclusive) of an object, checked by the digests of the blocks that hold them.

        Raises:
            IntegrityError: a block is not the one that was committed.
        """
        start, end = max(start, 0), min(end, entry.size)
        if start >= end:
            return b""
        first, last = start // BLOCK, (end - 1) // BLOCK
        span = f"bytes={first * BLOCK}-{min((last + 1) * BLOCK, entry.size) - 1}"

        def get() -> bytes:
            with closing(self.client.get_object(Bucket=self.bucket, Key=self._full(entry.key), Range=span)["Body"]) as body:
                return body.read()

        self._must_exist(entry.key)
        data = self._call(entry.key, get)
        for number in range(first, last + 1):
            block = data[(number - first) * BLOCK : (number - first + 1) * BLOCK]
            self._compare(f"{entry.key} (block {number})", entry_of(entry.key, block).sha256, entry.blocks[number])
        return data[start - first * BLOCK : end - first * BLOCK]

    def entry(self, key: str) -> ObjectEntry:
        """Size and digests of a stored object: from what its writer left on it, else by reading it.

        Raises:
            NotFound: there is no such object.
        """
        found = self._head(key)
        if found is None:
            raise NotFound(f"object {self.uri(key)} does not exist")
        return entry_from_metadata(key, int(found["ContentLength"]), found.get("Metadata", {})) or entry_of(key, self.stream(key))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Objects under ``prefix``, in no order that may be relied on."""
        if self.absent:
            return
        token: dict[str, str] = {}
        while True:
            arguments = {"Bucket": self.bucket, "Prefix": self._full(prefix), **token}
            try:
                page = self._call(prefix, lambda arguments=arguments: self.client.list_objects_v2(**arguments))  # type: ignore[misc]
            except BucketMissing:
                if self.read_only and self.is_embedded:
                    return
                raise
            for found in page.get("Contents", []):
                yield ObjectInfo(self._relative(found["Key"]), found["Size"], found["ETag"], found["LastModified"])
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def presign(self, key: str, seconds: int = 3600) -> str:
        """A link that reads one object without keys, for at most ``seconds``."""
        arguments = {"Bucket": self.bucket, "Key": self._full(key)}
        return self._call(key, lambda: self.client.generate_presigned_url("get_object", Params=arguments, ExpiresIn=seconds))

    def now(self) -> datetime:
        """The store's own clock, to the second."""
        reply = self._call("the clock", lambda: self.client.head_bucket(Bucket=self.bucket))
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
                self._put(entry, data)
                return entry
            except Conflict:
                adopted = self._adopt(key)
                if adopted is not None:
                    return adopted
        raise Conflict(f"object {self.uri(key)} comes and goes while it is written; is a purge under way? Run again")

    def put_cache(self, key: str, data: bytes | Path) -> None:
        """Write an object whatever is there; for caches and records of runs only, never for a part of an artifact."""
        if not key.startswith(CACHE_PREFIXES):
            raise ValueError(f"{key} is no cache or record ({', '.join(CACHE_PREFIXES)}): use put_new, which overwrites nothing")
        self.overwrite(key, data)

    def overwrite(self, key: str, data: bytes | Path) -> ObjectEntry:
        """Write an object whatever is there. Storage's own: a purge must be able to."""
        entry = entry_of(key, data)
        self._put(entry, data, condition={})
        return entry

    def compare_and_swap(self, key: str, data: bytes, etag: str | None) -> str:
        """Replace the object that has ``etag``, or create it when ``etag`` is None.

        Returns:
            The new ETag.

        Raises:
            Conflict: the object is another one by now.
        """
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
        retried = [False]
        try:
            return self._put(entry_of(key, data), data, condition=condition, retried=retried)
        except (Conflict, NotFound):
            # A lost reply makes the client try again and meet its own write.
            if retried[0] and self.head(key) is not None:
                found, tag = self.read_tagged(key)
                if found == data:
                    return tag
            raise Conflict(f"object {self.uri(key)}: another writer was first") from None

    def put_parts_if_absent(self, key: str, data: bytes) -> str:
        """Write in parts whatever the size, when there is nothing yet. For the probe.

        Raises:
            Conflict: the object exists.
        """
        target = {"Bucket": self.bucket, "Key": self._full(key)}
        return self._call(key, lambda: put_parts(self.client, data, len(data), target, {}, {"IfNoneMatch": "*"}))

    def delete(self, keys: Iterable[str]) -> int:
        """Delete objects; missing ones do not matter. Returns how many were named."""
        names = [self._full(key) for key in keys]
        self._refuse_if_read_only()
        for first in range(0, len(names), 1000):
            batch = [{"Key": name} for name in names[first : first + 1000]]
            reply = self._call("delete", lambda batch=batch: self.client.delete_objects(Bucket=self.bucket, Delete={"Objects": batch, "Quiet": True}))  # type: ignore[misc]
            errors = reply.get("Errors", [])
            if errors:
                raise StoreError(f"object s3://{self.bucket}/{errors[0].get('Key')} cannot be deleted: {errors[0].get('Code')} {errors[0].get('Message', '')}")
        return len(names)

    # Inside

    def _put(self, entry: ObjectEntry, data: bytes | Path, *, condition: dict[str, str] | None = None, retried: list[bool] | None = None) -> str:
        """One conditional write (by default: only when there is nothing); in parts above the threshold. Returns the ETag."""
        self._refuse_if_read_only()
        condition = {"IfNoneMatch": "*"} if condition is None else condition
        arguments: dict[str, Any] = {"Bucket": self.bucket, "Key": self._full(entry.key)}
        described: dict[str, Any] = {"Metadata": entry.metadata(), "ContentType": mimetypes.guess_type(entry.key)[0] or "application/octet-stream"}

        def put() -> str:
            try:
                if entry.size > self.settings.multipart_mb * MIB:
                    if condition.get("IfNoneMatch") and self._head(entry.key) is not None:
                        raise Conflict(f"object {self.uri(entry.key)} exists")  # spares sending what would be refused
                    return put_parts(self.client, data, entry.size, arguments, described, condition)
                if isinstance(data, Path):
                    with data.open("rb") as body:
                        return self.client.put_object(**arguments, **described, **condition, Body=body)["ETag"]
                return self.client.put_object(**arguments, **described, **condition, Body=bytes(data))["ETag"]
            except (ClientError, BotoCoreError) as error:
                if retried is not None:
                    refused = isinstance(error, ClientError) and error.response.get("ResponseMetadata", {}).get("RetryAttempts") == 0
                    retried[0] |= not refused
                raise

        return self._call(entry.key, put)

    def _adopt(self, key: str) -> ObjectEntry | None:
        """Entry of the object that was there first, by reading it; None when it is gone again."""
        found = self._head(key)
        if found is None:
            return None
        try:
            read = entry_of(key, self.stream(key))
        except NotFound:
            return None
        recorded = found.get("Metadata", {}).get("sha256")
        if recorded is not None:
            self._compare(key, read.sha256, recorded)
        return read

    def _head(self, key: str) -> Any:
        if self.absent:
            return None
        try:
            return self._call(key, lambda: self.client.head_object(Bucket=self.bucket, Key=self._full(key)))
        except NotFound:
            return None
        except BucketMissing:
            if self.read_only and self.is_embedded:
                return None
            raise

    def _must_exist(self, key: str) -> None:
        if self.absent:
            raise NotFound(f"object {self.uri(key)} does not exist: there is no store in {self.settings.folder} yet")

    def _refuse_if_read_only(self) -> None:
        if self.read_only:
            raise StoreError("the store was opened to look, not to write (--dry-run)")

    def _compare(self, key: str, found: str, expected: str) -> None:
        if found != expected:
            raise IntegrityError(
                f"object {self.uri(key)} does not match its digest: stored bytes have SHA-256 {found[:12]}…, committed were {expected[:12]}…; "
                "restore it from a copy, or delete it and run its stage again"
            )

    @property
    def _url(self) -> str:
        return (self._target.url if self._target else None) or self.settings.endpoint or "AWS"

    def _one_line(self, key: str) -> AbstractContextManager[None]:
        return one_line(f"object {self.uri(key)}", endpoint=self._url, bucket=self.bucket, embedded=self.is_embedded)

    def _call(self, key: str, request: Callable[[], T]) -> T:
        """Run a request; an embedded server that went away is brought back once."""
        try:
            with self._one_line(key):
                return request()
        except StoreUnreachable:
            if not self.is_embedded:
                raise
            embedded.check_room(self.settings.folder)
        with self._guard:
            self._client = None
        with self._one_line(key):
            return request()
