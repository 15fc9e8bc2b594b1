"""Work by threads ahead of whoever asks, in order and in bounded memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

PICTURES = max(8, os.cpu_count() or 1)
"""Decoded pictures that are held ahead of whoever asks for them; one of 4096 px takes 48 MiB."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def mapped(function: Callable[[Item], Result], items: Iterable[Item], *, threads: int | None = None, ahead: int = 64) -> Iterator[Result]:
    """``map(function, items)`` by threads: results come in the order of ``items``, and at most ``ahead`` are finished or under way.

    Args:
        function: called in a thread; its error is raised where its result would come.
        items: drawn in the thread of the caller, no further than ``ahead``.
        threads: unset: one a CPU.
        ahead: items drawn before the first result is asked for.
    """
    remaining = iter(items)
    with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        queue: deque[Future[Result]] = deque(pool.submit(function, item) for item in islice(remaining, ahead))
        try:
            while queue:
                result = queue.popleft().result()
                queue.extend(pool.submit(function, item) for item in islice(remaining, 1))
                yield result
        finally:
            for future in queue:
                future.cancel()
