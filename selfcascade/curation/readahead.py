"""Read-ahead: blocks of objects in order, fetched by threads before they are asked for, each checked before it is given out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from selfcascade.storage import BLOCK, IntegrityError, ObjectEntry, Store, StoreError
from selfcascade.storage.tombstone import tombstone


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of one object that are wanted: ``start`` to ``stop`` (exclusive)."""

    entry: ObjectEntry
    start: int
    stop: int


class ReadAhead:
    """Blocks of 8 MiB of several spans, one span after another.

    A block is fetched by one request, which goes on at the byte it had reached when its connection breaks, and held against the manifest's digest of that
    block. At most ``ahead`` blocks are in memory or under way, beside the one that was given out last.
    """

    def __init__(self, store: Store, spans: Sequence[Span], *, threads: int, ahead: int) -> None:
        self.store = store
        self.spans = spans
        self.ahead = ahead
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="selfcascade-read")
        self._queue: deque[tuple[int, Future[memoryview]]] = deque()
        self._given: memoryview | None = None
        """The block that was given out last."""
        self._spare: deque[bytearray] = deque()
        """Memory of the blocks before it, and of those that nobody wanted."""
        self._at = 0
        """The span that is being read."""
        self._next = (0, spans[0].start // BLOCK) if spans else (0, 0)
        """Span and block that are asked for next."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Drop what was read ahead."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._queue.clear()

    def blocks(self, number: int) -> Iterator[memoryview]:
        """Blocks of span ``number``, from the one in which it starts to the one in which it stops; spans are read in their order, none twice.

        A block's memory serves another one as soon as the next is asked for.

        Raises:
            IntegrityError: a block is not the one that was committed; names the object. Nothing of it was given out.
            StoreError: the store cannot be read, after retries.
        """
        self._at = number
        while self._queue and self._queue[0][0] < number:  # what a reader left that had found all it looked for
            unwanted = self._queue.popleft()[1]
            if not unwanted.cancel():
                unwanted.add_done_callback(lambda done: None if done.exception() else self._free(done.result()))
        self._fill()
        while self._queue and self._queue[0][0] == number:
            future = self._queue.popleft()[1]
            self._fill()
            try:
                data = future.result()
            except StoreError as error:
                raise self._explained(error, self.spans[number].entry) from None
            del future
            self._given, before = data, self._given
            self._free(before)
            yield data

    def _fill(self) -> None:
        while len(self._queue) < self.ahead:
            number, block = self._next
            if number < self._at:
                number, block = self._at, self.spans[self._at].start // BLOCK
            if number == len(self.spans):
                return
            span = self.spans[number]
            begin = block * BLOCK
            end = min(begin + BLOCK, span.entry.size)
            self._queue.append((number, self._pool.submit(self._fetched, span.entry, begin, end)))
            if end < span.stop:
                self._next = number, block + 1
            else:
                self._next = number + 1, self.spans[number + 1].start // BLOCK if number + 1 < len(self.spans) else 0

    def _fetched(self, entry: ObjectEntry, begin: int, end: int) -> memoryview:
        try:
            buffer = self._spare.pop()
        except IndexError:
            buffer = bytearray(BLOCK)
        return self.store.read_range(entry, begin, end, buffer=buffer)

    def _free(self, block: memoryview | None) -> None:
        if block is not None and isinstance(block.obj, bytearray):
            self._spare.append(block.obj)

    def _explained(self, error: StoreError, entry: ObjectEntry) -> StoreError:
        """Damage, or a removal request since the dataset was opened?"""
        stone = None if error.transient else tombstone(self.store, entry.key)
        if stone is None or stone.entry.sha256 == entry.sha256:
            return error
        return IntegrityError(f"object {self.store.uri(entry.key)} was rewritten by a removal request after the dataset was opened; open it again")
