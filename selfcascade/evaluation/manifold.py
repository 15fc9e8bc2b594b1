"""Fidelity and diversity apart: precision, recall, density and coverage of generated features among real ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5
"""``k`` of Kynkäänniemi et al. (2019) and of Naeem et al. (2020)."""

RULE = (
    f"precision and recall: a point lies within another's distance to its {PRECISION_NEIGHBOURS}rd nearest of its own set (Kynkäänniemi et al., 2019); "
    f"density and coverage: {DENSITY_NEIGHBOURS}th nearest, real side alone (Naeem et al., 2020); Euclidean distance of features in float64"
)


@dataclass(frozen=True, slots=True)
class Manifold:
    """Shares of points that lie where the other set's points do; density alone may exceed 1."""

    precision: float
    """Of generated points, those within a real point's sphere: how many look real."""
    recall: float
    """Of real points, those within a generated point's sphere: how much of what is real can be had."""
    density: float
    """Real spheres that a generated point lies in, over the number that is expected: as precision, but an odd real point counts once."""
    coverage: float
    """Of real points, those whose sphere holds a generated one: as recall, but an odd generated point counts for nothing."""


def manifold(real: Tensor, generated: Tensor) -> Manifold | None:
    """The four numbers of two sets of features, (n, d) and (m, d); None where a set is too small to have neighbours.

    All depend on the counts of both sets: compare methods at one count, against one reference.
    """
    if min(len(real), len(generated)) <= DENSITY_NEIGHBOURS:
        return None
    real, generated = real.double(), generated.double()
    between = torch.cdist(real, generated)
    within_real, within_generated = torch.cdist(real, real), torch.cdist(generated, generated)
    near_real = between <= _radii(within_real, PRECISION_NEIGHBOURS)[:, None]
    near_generated = between <= _radii(within_generated, PRECISION_NEIGHBOURS)[None, :]
    dense = between <= _radii(within_real, DENSITY_NEIGHBOURS)[:, None]
    return Manifold(
        precision=float(near_real.any(dim=0).double().mean()),
        recall=float(near_generated.any(dim=1).double().mean()),
        density=float(dense.double().sum(dim=0).mean() / DENSITY_NEIGHBOURS),
        coverage=float(dense.any(dim=1).double().mean()),
    )


def _radii(distances: Tensor, neighbours: int) -> Tensor:
    """Distance of each point to the ``neighbours``-th nearest other point, (n,), from distances within a set, (n, n)."""
    radii: Tensor = distances.kthvalue(neighbours + 1, dim=1).values  # the nearest is the point itself
    return radii
