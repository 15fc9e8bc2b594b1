"""FID in closed form and KID through torchmetrics, from features that the network gave once."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from selfcascade.evaluation.statistics import frechet
from selfcascade.settings import SettingsError, digest_of

PICTURES_PER_FEATURE = 10
"""Below as many pictures a feature FID is biased too much to be compared with another count."""


@dataclass(frozen=True, slots=True)
class Kid:
    """Kernel distance: mean over random subsets, and how far the subsets spread."""

    mean: float
    spread: float
    subset: int


class _PassThrough(nn.Module):
    """Stands in for the feature network where torchmetrics expects one: what it is given are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def fid(real: Tensor, generated: Tensor) -> float:
    """Fréchet distance of two sets of features, (n, d) and (m, d), in float64.

    It is biased upwards for few samples, more so the larger d is (Binkowski et al., 2018, appendix D): compare only sets of one size, against one reference.

    Raises:
        SettingsError: a set has fewer than two pictures.
    """
    _check(real, generated)
    return max(0.0, float(frechet(real.double(), generated.double())))


def kid(real: Tensor, generated: Tensor, *, subset: int, subsets: int, seed: int) -> Kid:
    """Kernel distance: the unbiased squared MMD with kernel ``(x.y / d + 1) ** 3``, mean over ``subsets`` seeded subsets without replacement.

    Two calls with the same seed and the same counts draw the same subsets, so the values of two methods differ by the methods alone. The global random
    state is left as it was: torchmetrics draws from it and takes no seed.

    Args:
        real: features, (n, d).
        generated: features, (m, d).
        subset: pictures a subset; lowered to half of the smaller set.
        subsets: how many.
        seed: of the draws.

    Raises:
        SettingsError: a set has fewer than two pictures.
    """
    _check(real, generated)
    from torchmetrics.image.kid import KernelInceptionDistance

    size = kid_subset(subset, len(real), len(generated))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer.*")
        metric = KernelInceptionDistance(feature=_PassThrough(real.shape[1]), subset_size=size, subsets=subsets)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(digest_of(["kid", seed])[:15], 16))
        mean, spread = metric.compute()
    return Kid(mean=float(mean), spread=float(spread), subset=size)


def too_few(count: int, num_features: int) -> bool:
    """Whether FID of ``count`` pictures means something only beside FID of as many."""
    return count < PICTURES_PER_FEATURE * num_features


def kid_subset(subset: int, *counts: int) -> int:
    """Pictures a subset: ``subset``, but at most half of the smallest set, so that subsets differ."""
    return max(2, min(subset, *(count // 2 for count in counts)))


def _check(real: Tensor, generated: Tensor) -> None:
    for side, features in (("real", real), ("generated", generated)):
        if features.ndim != 2 or len(features) < 2:
            raise SettingsError(f"{len(features)} {side} pictures are too few for a distance of distributions; at least 2 are needed")
    if real.shape[1] != generated.shape[1]:
        raise ValueError(f"features of different networks: {real.shape[1]} and {generated.shape[1]} wide")
