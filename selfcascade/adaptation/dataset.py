"""The order in which a run sees its samples: an endless sequence of batches, each out of one bucket, addressed by position."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import count as counting

from selfcascade.settings import SettingsError


class TrainingOrder:
    """Sample keys by position; positions ``i * batch`` .. ``(i + 1) * batch - 1`` are batch i, whose samples are all of one bucket.

    Each bucket is an endless sequence of passes, seeded permutations of its samples, cut into batches: a batch may straddle two passes, so every sample is in
    each pass of its bucket exactly once and every batch is full. In an epoch, which is a pass of every bucket, come the batches whose last sample is in
    that pass, those of the buckets mixed by the seed. What does not fill a batch, of each bucket less than one, is carried over to the next epoch. Where
    all samples are of one size, the order is that of the passes.

    A position is the whole state: the order depends on the keys, their buckets and the seed alone, never on shards, workers, library versions or what was read
    before.
    """

    def __init__(self, buckets: Iterable[Sequence[str]], *, seed: int, batch: int) -> None:
        """Order the keys of ``buckets``, in whatever order they come in each, for batches of ``batch``.

        Raises:
            SettingsError: there are fewer keys than a batch holds.
        """
        self.buckets = [_Passes(keys, seed=seed) for keys in buckets]
        self.keys = tuple(key for bucket in self.buckets for key in bucket.keys)
        if len(self.keys) < batch:
            raise SettingsError(f"adaptation.batch={batch} is more than the {len(self.keys)} training samples; lower it or curate more pictures")
        self.seed = seed
        self.size = batch
        self._epoch: int | None = None
        self._plan: list[tuple[int, int]] = []

    def batch(self, position: int, count: int) -> list[str]:
        """The keys at ``position`` .. ``position + count - 1``."""
        return [self._at(index) for index in range(position, position + count)]

    def _at(self, position: int) -> str:
        number, place = divmod(position, self.size)
        epoch = number * self.size // len(self.keys)  # none before has so many batches
        while self._batches(epoch + 1) <= number:
            epoch += 1
        if epoch != self._epoch:
            self._plan, self._epoch = self._mixed(epoch), epoch
        bucket, batch = self._plan[number - self._batches(epoch)]
        return self.buckets[bucket].at(batch * self.size + place)

    def _batches(self, epochs: int) -> int:
        """Batches in so many epochs."""
        return sum(epochs * len(bucket.keys) // self.size for bucket in self.buckets)

    def _mixed(self, epoch: int) -> list[tuple[int, int]]:
        """Bucket and number, within the bucket, of each batch of an epoch: buckets in random order, the batches of each as they come."""
        first = [epoch * len(bucket.keys) // self.size for bucket in self.buckets]
        last = [(epoch + 1) * len(bucket.keys) // self.size for bucket in self.buckets]
        turns = [index for index in range(len(self.buckets)) for _ in range(first[index], last[index])]
        mixed = sorted(range(len(turns)), key=lambda turn: _digest(f"buckets/{self.seed}/{epoch}/{turn}"))
        numbers = [counting(start) for start in first]
        return [(turns[turn], next(numbers[turns[turn]])) for turn in mixed]


class _Passes:
    """Keys by position: position p is the (p mod n)-th key of the permutation of pass p div n."""

    def __init__(self, keys: Sequence[str], *, seed: int) -> None:
        self.keys = tuple(keys)
        self.seed = seed
        self._pass: int | None = None
        self._permutation: list[str] = []

    def at(self, position: int) -> str:
        number, index = divmod(position, len(self.keys))
        if number != self._pass:
            self._permutation = sorted(self.keys, key=lambda key: _digest(f"order/{self.seed}/{number}/{key}"))
            self._pass = number
        return self._permutation[index]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
