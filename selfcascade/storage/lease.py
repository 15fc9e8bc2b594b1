"""Leases: a planner says that it is at work under a prefix, so that nothing there is collected; gc says that it deletes.

A lease is an object that is written again and again; its age is read off the store's own clock. The two sides cannot miss each other: a
planner writes its lease and then looks for a collector; a collector announces itself and then looks for leases.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from selfcascade.storage.errors import Conflict, StoreError, StoreUnreachable
from selfcascade.storage.store import Store

BEAT = 30.0
"""Seconds between two heartbeats."""
LIFE = timedelta(seconds=300)
"""Age at which a lease is taken for a dead process's."""
COLLECTOR = "leases/collector.json"


class Lease:
    """A lease with its heartbeat thread; ends with :meth:`release`, or by age when its process dies."""

    def __init__(self, store: Store, prefix: str, *, beat: float = BEAT) -> None:
        self.store = store
        self.prefix = prefix.strip("/")
        self.key = f"leases/{self.prefix}/{secrets.token_hex(8)}.json"
        self.beat = beat
        self._stop = threading.Event()
        self._write()
        _wait_for_collector(store)
        self._thread = threading.Thread(target=self._run, name=f"lease {self.prefix}", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """End the lease now."""
        self._stop.set()
        self._thread.join()
        self.store.delete([self.key])

    def _write(self) -> None:
        self.store.put_cache(self.key, json.dumps({"prefix": self.prefix}).encode())

    def _run(self) -> None:
        while not self._stop.wait(self.beat):
            try:
                self._write()
            except StoreUnreachable:
                continue  # the next beat may get through; the lease lives for ten of them


@contextmanager
def lease(store: Store, prefix: str) -> Iterator[Lease]:
    """Hold a lease on ``prefix`` for the length of the block."""
    held = Lease(store, prefix)
    try:
        yield held
    finally:
        held.release()


def leased(store: Store) -> set[str]:
    """Prefixes that somebody alive works under."""
    now = store.now()
    return {info.key.removeprefix("leases/").rpartition("/")[0] for info in store.list("leases/") if info.key != COLLECTOR and now - info.modified < LIFE}


def expired(store: Store) -> list[str]:
    """Keys of leases whose process is gone."""
    now = store.now()
    return [info.key for info in store.list("leases/") if now - info.modified >= LIFE]


@contextmanager
def collecting(store: Store) -> Iterator[None]:
    """Announce that objects are about to be deleted; new planners wait until the block ends.

    Raises:
        Conflict: another collector is at work.
    """
    while True:
        try:
            tag = store.compare_and_swap(COLLECTOR, secrets.token_bytes(16).hex().encode(), None)
            break
        except Conflict:
            found = store.head(COLLECTOR)
            if found is not None and store.now() - found.modified < LIFE:
                raise Conflict("another gc or purge is at work in this store; wait for it, or five minutes if it was killed") from None
            if found is not None:
                store.delete([COLLECTOR])
    del tag
    try:
        yield
    finally:
        store.delete([COLLECTOR])


def _wait_for_collector(store: Store) -> None:
    pause = 0.05
    while True:
        found = store.head(COLLECTOR)
        if found is None or store.now() - found.modified >= LIFE:
            return
        if pause > 1000:
            raise StoreError("gc does not end")
        time.sleep(pause)
        pause = min(pause * 1.5, 2.0)
