"""The order in which a run sees its samples: an endless sequence of seeded permutations, addressed by position."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from selfcascade.settings import SettingsError


class TrainingOrder:
    """Sample keys by position: position p is the (p mod n)-th key of the permutation of epoch p div n.

    A position is the whole state: the order depends on the keys and the seed alone, never on shards, workers, library versions or what was read
    before. A batch may straddle two epochs, so every sample is seen exactly once in each.
    """

    def __init__(self, keys: Sequence[str], *, seed: int, batch: int) -> None:
        """Order ``keys``, in whatever order they come, for batches of ``batch``.

        Raises:
            SettingsError: there are fewer keys than a batch holds.
        """
        if len(keys) < batch:
            raise SettingsError(f"adaptation.batch={batch} is more than the {len(keys)} training samples; lower it or curate more pictures")
        self.keys = tuple(keys)
        self.seed = seed
        self._epoch: int | None = None
        self._permutation: list[str] = []

    def batch(self, position: int, count: int) -> list[str]:
        """The keys at ``position`` .. ``position + count - 1``."""
        return [self._at(index) for index in range(position, position + count)]

    def _at(self, position: int) -> str:
        epoch, index = divmod(position, len(self.keys))
        if epoch != self._epoch:
            self._permutation = sorted(self.keys, key=lambda key: hashlib.sha256(f"order/{self.seed}/{epoch}/{key}".encode()).digest())
            self._epoch = epoch
        return self._permutation[index]
