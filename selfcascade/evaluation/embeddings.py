"""What a further network says of a set of pictures: a vector a picture, how well each fits its prompt, where the network can read, and what class it is of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cosine_similarity

from selfcascade.evaluation.features import as_batch
from selfcascade.evaluation.heap import Heap
from selfcascade.evaluation.networks.network import FeatureNetwork
from selfcascade.evaluation.sealed import sealed, unsealed
from selfcascade.evaluation.tables import Batches, FeatureTable, Picture
from selfcascade.settings import SettingsError


@dataclass(frozen=True, slots=True, eq=False)
class Embeddings:
    """A set of n pictures, sorted by prompt and key."""

    keys: tuple[str, ...]
    features: NDArray[np.float32]
    """(n, d)"""
    agreement: NDArray[np.float32] | None
    """(n,), cosine of picture and prompt; None for a network that cannot read."""
    logits: NDArray[np.float32] | None = None
    """(n, classes), without bias; None for a network that does not classify."""

    def __len__(self) -> int:
        return len(self.keys)

    def to_bytes(self) -> bytes:
        """The form in the cache."""
        beside = {"agreement": self.agreement, "logits": self.logits}
        return sealed({"features": self.features} | {name: array for name, array in beside.items() if array is not None}, self.keys)

    @classmethod
    def from_bytes(cls, data: bytes) -> Embeddings | None:
        """The table, or None where the bytes are damaged: the cache is then made again."""
        found = unsealed(data)
        if found is None or "features" not in found[0]:
            return None
        arrays, keys = found
        return cls(keys=tuple(keys), features=arrays["features"], agreement=arrays.get("agreement"), logits=arrays.get("logits"))

    @classmethod
    def beside(cls, table: FeatureTable, network: FeatureNetwork) -> Embeddings:
        """From the table that the same network left, without another pass; of a network that cannot read."""
        return cls(table.keys, table.features, None, _logits(network, table.features))


class Embedding:
    """Gathers what a network says of pictures that come one by one.

    Args:
        network: on ``device`` already.
        batch: pictures a forward pass.
        device: where the network is.
    """

    def __init__(self, network: FeatureNetwork, *, batch: int, device: str = "cpu") -> None:
        self.network, self.batch = network, batch
        self._batches = Batches(network.embed, batch, device)
        self._names: list[tuple[str, str, str]] = []
        self._heap = Heap()

    def look(self, picture: Picture) -> Tensor:
        """A picture as the network wants it; from any thread."""
        return self.network.resized(as_batch([picture.image]))

    def take(self, picture: Picture, look: Tensor) -> None:
        """The next picture, as :meth:`look` saw it."""
        self._names.append((picture.prompt_id, picture.key, picture.prompt))
        self._batches.add(look)
        self._heap.passed(picture.image.nbytes)

    def add(self, picture: Picture) -> None:
        """Take the next picture."""
        self.take(picture, self.look(picture))

    def result(self) -> Embeddings:
        """Of all pictures that came.

        Raises:
            SettingsError: none did.
        """
        if not self._names:
            raise SettingsError("a set of pictures is empty; there is nothing to compare")
        order = sorted(range(len(self._names)), key=lambda place: self._names[place])
        features = self._batches.result()[order]
        names = [self._names[place] for place in order]
        agreement = self._agreement(features, [prompt for _, _, prompt in names])
        return Embeddings(tuple(key for _, key, _ in names), features, agreement, _logits(self.network, features))

    def _agreement(self, features: NDArray[np.float32], prompts: list[str]) -> NDArray[np.float32] | None:
        if self.network.read is None:
            return None
        texts = sorted(set(prompts))
        parts = [self.network.read(texts[start : start + self.batch]).cpu() for start in range(0, len(texts), self.batch)]
        place = {text: number for number, text in enumerate(texts)}
        read = torch.cat(parts)[[place[prompt] for prompt in prompts]]
        found: NDArray[np.float32] = cosine_similarity(torch.from_numpy(features), read).numpy()
        return found


def _logits(network: FeatureNetwork, features: NDArray[np.float32]) -> NDArray[np.float32] | None:
    found = network.logits(torch.from_numpy(features))
    return None if found is None else found.numpy()
