"""The order in which an epoch is read: shards permuted, samples shuffled within a window, and who reads which part of it.

An epoch is one stream: the samples of all shards in the epoch's order of shards. Ranks read contiguous parts of it, and so do the workers of a rank.
All of it follows from seed, epoch and counts alone, before any picture is read, and depends on no library's random numbers but the raw words of
PCG64, whose sequence numpy promises to keep.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Uneven = Literal["keep", "pad", "drop"]


def shard_order(names: Sequence[str], *, seed: int, epoch: int) -> list[int]:
    """Indices of ``names`` in the order of the epoch."""
    return sorted(range(len(names)), key=lambda index: hashlib.sha256(f"shards/{seed}/{epoch}/{names[index]}".encode()).digest())


def share_of_rank(samples: int, rank: int, world_size: int, uneven: Uneven) -> tuple[int, int]:
    """First and one after the last index of the stream that ``rank`` reads.

    ``keep`` gives every sample to one rank, so shares differ by one at most. ``pad`` and ``drop`` give all ranks equally many: indices of ``samples``
    and more are the stream's beginning again, or what is left over at its end is read by nobody.
    """
    if uneven == "keep":
        return rank * samples // world_size, (rank + 1) * samples // world_size
    each = -(-samples // world_size) if uneven == "pad" else samples // world_size
    return rank * each, (rank + 1) * each


def share_of_worker(start: int, stop: int, worker: int, workers: int) -> tuple[int, int]:
    """The part of ``start`` to ``stop`` that one of a rank's workers reads. Workers of equal number have equally many on ranks that have."""
    count = stop - start
    return start + worker * count // workers, start + (worker + 1) * count // workers


def shuffled(start: int, stop: int, *, window: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The indices ``start`` .. ``stop - 1`` in the order in which they are handed out, (stop - start,).

    Index i goes to the place of i + window * u_i, u_i uniform on [0, 1) and a function of seed, epoch and i alone. So a sample moves by less than
    ``window``, and what was read and not handed out yet is never more than ``window`` samples, nor older than that.
    """
    indices = np.arange(start, stop, dtype=np.int64)
    if window <= 1:
        return indices
    words = np.random.PCG64(int.from_bytes(hashlib.sha256(f"window/{seed}/{epoch}".encode()).digest(), "big"))
    words.advance(start)
    jitter = (words.random_raw(stop - start) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return indices[np.argsort(indices + window * jitter, kind="stable")]


def parts(counts: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Which samples of which shards the indices ``start`` .. ``stop - 1`` of a stream are: (shard, first, one after the last, index of the first).

    Args:
        counts: samples of each shard, in the order of the stream.
        start: an index; the stream repeats without end.
        stop: one after the last.
    """
    ends = list(accumulate(counts))
    total = ends[-1]
    while start < stop:
        lap, at = divmod(start, total)
        shard = int(np.searchsorted(ends, at, side="right"))
        begin = ends[shard] - counts[shard]
        until = min(ends[shard], stop - lap * total)
        yield shard, at - begin, until - begin, start
        start += until - at
