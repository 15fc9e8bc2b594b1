"""Leases: a planner says that it works under a prefix, so that nothing there is collected; a collector says that it deletes.

Both are objects that are written again and again; their age is read off the store's own clock. The two sides cannot miss each other: a
planner writes its lease and then looks for a collector; a collector announces itself and then looks for leases.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from selfcascade.storage.errors import Conflict, StoreUnreachable
from selfcascade.storage.store import Store

BEAT = 30.0
"""Seconds between two heartbeats of a lease."""
LIFE = timedelta(seconds=300)
"""Age at which a lease is taken for a dead process's."""
COLLECTOR = "leases/collector.json"
COLLECTOR_BEAT = 5.0
COLLECTOR_LIFE = timedelta(seconds=60)


class Heartbeat:
    """Calls ``beat`` every so many seconds from a thread of its own until :meth:`stop`."""

    def __init__(self, beat: Callable[[], None], seconds: float) -> None:
        self._beat = beat
        self._seconds = seconds
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No beat happens after this returns."""
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(self._seconds):
            try:
                self._beat()
            except StoreUnreachable:
                continue  # the next one may get through; a life is ten beats
            except Conflict:
                return


class Lease:
    """A lease on everything under ``prefix``; ends with :meth:`release`, or by age when its process dies."""

    def __init__(self, store: Store, prefix: str, *, beat: float = BEAT) -> None:
        self.store = store
        self.prefix = prefix.strip("/")
        self.key = f"leases/{self.prefix}/{secrets.token_hex(8)}.json"
        self._write()
        _wait_for_collector(store)
        self._heart = Heartbeat(self._write, beat)

    def release(self) -> None:
        """End the lease now."""
        self._heart.stop()
        with suppress(StoreUnreachable):  # then it ends by age
            self.store.delete([self.key])

    def _write(self) -> None:
        self.store.put_cache(self.key, json.dumps({"prefix": self.prefix}).encode())


@contextmanager
def lease(store: Store, prefix: str) -> Iterator[Lease]:
    """Hold a lease on ``prefix`` for the length of the block. Waits while a collector deletes."""
    held = Lease(store, prefix)
    try:
        yield held
    finally:
        held.release()


def leased(store: Store) -> set[str]:
    """Prefixes that somebody alive works under."""
    now = store.now()
    return {_prefix_of(info.key) for info in store.list("leases/") if info.key != COLLECTOR and now - info.modified < LIFE}


def expired(store: Store) -> list[str]:
    """Keys of leases whose process is gone."""
    now = store.now()
    return sorted(info.key for info in store.list("leases/") if info.key != COLLECTOR and now - info.modified >= LIFE)


class Collector:
    """The only process that may delete from artifacts, for as long as it can keep its announcement alive."""

    def __init__(self, store: Store, tag: str) -> None:
        self._store = store
        self._tag = tag
        self._lost = False
        self._heart = Heartbeat(self._beat, COLLECTOR_BEAT)

    def assert_held(self) -> None:
        """Called before every deletion.

        Raises:
            Conflict: this process was away for so long that planners no longer wait for it.
        """
        if self._lost:
            raise Conflict("this process was stopped for too long and may no longer delete; nothing is broken, run again")

    def _beat(self) -> None:
        try:
            self._tag = self._store.compare_and_swap(COLLECTOR, _unique(), self._tag)
        except Conflict:
            self._lost = True
            raise

    def end(self) -> None:
        """Let planners go on."""
        self._heart.stop()
        if not self._lost:
            self._store.delete([COLLECTOR])


@contextmanager
def collecting(store: Store) -> Iterator[Collector]:
    """Announce that objects are about to be deleted; new planners wait until the block ends.

    Raises:
        Conflict: another collector is at work.
    """
    found = store.head(COLLECTOR)
    if found is not None and store.now() - found.modified < COLLECTOR_LIFE:
        raise Conflict("another gc or purge is at work in this store; wait for it, or a minute if it was killed")
    held = Collector(store, store.compare_and_swap(COLLECTOR, _unique(), None if found is None else found.etag))
    try:
        yield held
    finally:
        held.end()


def _wait_for_collector(store: Store) -> None:
    pause = 0.05
    while (found := store.head(COLLECTOR)) is not None and store.now() - found.modified < COLLECTOR_LIFE:
        time.sleep(pause)
        pause = min(pause * 1.5, 2.0)


def _prefix_of(key: str) -> str:
    return key.removeprefix("leases/").rpartition("/")[0]


def _unique() -> bytes:
    return secrets.token_hex(16).encode()
