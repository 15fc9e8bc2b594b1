"""Memory that the C library holds although nothing is in it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

EVERY = 64 << 20
"""Bytes of pictures between two returns: at 1024 px they add two percent to the time of a light network."""


class Heap:
    """Returns freed memory to the system as pictures come and go, so that a set may have any length. Does nothing where the C library is not glibc.

    Pictures of megabytes come from decoding threads and go between small results that stay, and glibc keeps the room around those: hundreds of MiB after some
    hundred pictures, without a bound. A lower threshold for ``mmap`` would hold it, too, but doubles the time of the network's passes.
    """

    def __init__(self) -> None:
        """Counts from zero."""
        self._passed = 0

    def passed(self, size: int) -> None:
        """Count a picture of ``size`` bytes that was looked at."""
        self._passed += size
        if self._passed >= EVERY:
            self._passed = 0
            trim = _malloc_trim()
            if trim is not None:
                trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        function: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl and macOS have none; Windows has no such library
        return None
    return function
