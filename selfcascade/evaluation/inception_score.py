"""The Inception score: how sure a classifier is of each picture, and how many classes a set covers (Salimans et al., "Improved techniques", 2016)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SPLITS = 10
RULE = (
    f"mean over {SPLITS} splits (fewer where a split would hold less than 2 pictures) in a seeded order of exp(mean KL(p(y|x) || p(y))), "
    "class probabilities of Inception-v3's logits without bias, as torch-fidelity"
)


@dataclass(frozen=True, slots=True, eq=False)
class Classified:
    """A set of n pictures as a classifier sees them, in the order in which it is split."""

    probabilities: Tensor
    """(n, classes), float64."""
    certainty: Tensor
    """(n,), sum of p log p of each picture."""
    place: Tensor
    """(n,), where each picture went."""

    @classmethod
    def of(cls, logits: Tensor, *, seed: int) -> Classified:
        """Of logits, (n, classes). The order is that of torch-fidelity with ``rng_seed=seed``, so that the splits are the same pictures."""
        order = torch.from_numpy(np.random.RandomState(seed).permutation(len(logits)))
        logs = logits[order].double().log_softmax(dim=1)
        probabilities = logs.exp()
        return cls(probabilities, (probabilities * logs).sum(dim=1), order.argsort())

    def scores(self, chosen: Tensor | None = None) -> Tensor:
        """The score of each split, (splits,): of the whole set, or of the pictures with the indices ``chosen``, (r,)."""
        places = torch.arange(len(self.place)) if chosen is None else self.place[chosen].sort().values
        splits, count = splits_of(len(places)), len(places)
        parts = [places[number * count // splits : (number + 1) * count // splits] for number in range(splits)]
        logs = [self.certainty[part].mean() + torch.special.entr(self.probabilities[part].mean(dim=0)).sum() for part in parts]
        return torch.stack(logs).exp()

    def halves(self, rows: Tensor) -> Tensor:
        """The mean score of each half-sample, (draws,), from indices into the set, (draws, r)."""
        return torch.stack([self.scores(chosen).mean() for chosen in rows])


def splits_of(count: int) -> int:
    """Splits of ``count`` pictures: a split of one picture would score 1 whatever it shows."""
    return max(1, min(SPLITS, count // 2))
