"""The way to a bucket: which store, one client a process, errors in one line, an embedded server that is brought back when it went."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

from selfcascade.config import StoreSettings
from selfcascade.storage import embedded
from selfcascade.storage.client import Target, endpoint_of, keys_of, make_client
from selfcascade.storage.errors import BucketMissing, NotFound, StoreError, StoreUnreachable, one_line

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

T = TypeVar("T")


class Connection:
    """A client for one bucket, made on first use in each process. Pickling keeps the address and drops the client.

    Which store is meant is settled once, here: a worker elsewhere, with other variables, does not end in another store.
    """

    def __init__(self, settings: StoreSettings, *, read_only: bool = False) -> None:
        """``read_only``: nothing is written, not even the bucket, and an embedded store that was never made is empty."""
        endpoint = endpoint_of(settings)
        self.embedded = endpoint is None
        self.settings = settings.model_copy(update={"folder": settings.folder.resolve(), "endpoint": endpoint})
        self.read_only = read_only
        self._travelled = False
        self._reset()

    def _reset(self) -> None:
        self._guard = threading.RLock()
        self._client: S3Client | None = None
        self._attached = False
        self._process = os.getpid()
        self._url = self.settings.endpoint or "AWS"

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings, "read_only": self.read_only, "embedded": self.embedded}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._travelled = True
        self._reset()

    def close(self) -> None:
        """Drop the client and stop being a user of the embedded server."""
        with self._guard:
            if self._client is not None and self._process == os.getpid():
                self._client.close()
            if self._attached:
                embedded.release(self.settings.folder)
            self._client, self._attached = None, False

    @property
    def absent(self) -> bool:
        """A read-only view of an embedded store that was never made: everything in it is missing."""
        return self.read_only and self.embedded and not embedded.exists(self.settings.folder)

    @property
    def client(self) -> S3Client:
        """The boto3 client of this process; safe to share between threads."""
        with self._guard:
            if self._process != os.getpid():  # forked: the parent's sockets are not ours
                self._client, self._process = None, os.getpid()
            if self._client is None:
                target = self._target()
                self._url = target.url or "AWS"
                self._client = make_client(self.settings, target)
            return self._client

    def _target(self) -> Target:
        if not self.embedded:
            return Target(self.settings.endpoint, *keys_of(self.settings), embedded=False)
        folder, bucket = self.settings.folder, None if self.read_only else self.settings.bucket
        if self._travelled and not embedded.exists(folder):
            raise StoreError(f"the embedded store {folder} is not on this machine; workers elsewhere need a store that they can reach: set store.endpoint")
        if self._attached:
            found = embedded.ensure(folder, bucket)
        else:
            found = embedded.attach(folder, bucket)
            self._attached = True
        return Target(found.url, found.access_key, found.secret_key, embedded=True)

    def check_bucket(self) -> None:
        """Say at once, not after minutes of patience, when the address or the keys are wrong.

        Raises:
            StoreUnreachable, StoreDenied, BucketMissing: one line each.
        """
        if self.embedded:
            _ = self.client  # starts the server and makes the bucket
            return
        bucket = self.settings.bucket
        client = make_client(self.settings, self._target(), attempts=2)
        try:
            with self._one_line(f"bucket {bucket!r}"):
                client.head_bucket(Bucket=bucket)
        except NotFound:
            raise BucketMissing(
                f"bucket {bucket!r} does not exist at {self._url}; create it (aws s3api create-bucket --bucket {bucket}) or set store.bucket"
            ) from None
        finally:
            client.close()

    def call(self, what: str, request: Callable[[], T]) -> T:
        """Run a request; what boto3 raises becomes a :class:`StoreError` that names ``what``."""
        try:
            with self._one_line(what):
                return request()
        except StoreUnreachable:
            if not self.embedded:
                raise
            embedded.check_room(self.settings.folder)
        with self._guard:
            self._client = None  # the next one brings the server back, maybe on other ports
        with self._one_line(what):
            return request()

    def _one_line(self, what: str) -> AbstractContextManager[None]:
        return one_line(what, endpoint=self._url, bucket=self.settings.bucket, embedded=self.embedded)

    reading = _one_line
    """For a body that is read after its request: the same errors, without another try."""
