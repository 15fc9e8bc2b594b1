"""Fidelity and diversity apart: precision, recall, density and coverage of generated features among real ones; and how real each single picture is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5
"""``k`` of Kynkäänniemi et al. (2019) and of Naeem et al. (2020)."""

LARGEST_REPLICATED = 2000
"""Pictures of a side up to which distances of all pairs are kept for half-samples; 2,000 take 32 MB."""

_ROWS = 2048
"""Real pictures whose distances are held at once: memory grows with the number of pictures, not with its square."""

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


NAMES = tuple(field.name for field in fields(Manifold))


def manifold(real: Tensor, generated: Tensor) -> Manifold | None:
    """The four numbers of two sets of features, (n, d) and (m, d); None where a set is too small to have neighbours.

    All depend on the counts of both sets: compare methods at one count, against one reference.
    """
    if min(len(real), len(generated)) <= DENSITY_NEIGHBOURS:
        return None
    real, generated = real.double(), generated.double()
    radii = [_nearest(points) for points in (real, generated)]
    return _shares(((torch.cdist(real[rows], generated), radii[0][rows]) for rows in _blocks(len(real))), radii[1])


def manifold_replicates(real: Tensor, generated: Tensor, columns: Tensor, rows: Tensor) -> dict[str, Tensor] | None:
    """The four numbers of half-samples, (draws,) each, by name; None where a set is too large for them, or a half too small to have neighbours.

    Args:
        real: features, (n, d).
        generated: features, (m, d).
        columns: indices of each half of the real ones, (draws, n').
        rows: indices of each half of the generated ones, (draws, m').
    """
    if max(len(real), len(generated)) > LARGEST_REPLICATED or min(columns.shape[1], rows.shape[1]) <= DENSITY_NEIGHBOURS:
        return None
    real, generated = real.double(), generated.double()
    between, within_real, within_generated = torch.cdist(real, generated), torch.cdist(real, real), torch.cdist(generated, generated)
    found = [
        _shares([(between[some[:, None], others], _sorted(within_real[some[:, None], some]))], _sorted(within_generated[others[:, None], others]))
        for some, others in zip(columns, rows, strict=True)
    ]
    return {name: torch.tensor([getattr(each, name) for each in found], dtype=torch.float64) for name in NAMES}


def realism(real: Tensor, generated: Tensor) -> Tensor | None:
    """How real each of the generated pictures looks, (m,), from features (n, d) and (m, d): from 1 on it lies within a real picture's sphere.

    The realism score of Kynkäänniemi et al. (2019, equation 3): the largest ratio, over the real pictures, of the sphere's radius to the distance; the
    wider half of the spheres is left out, as there, for odd real pictures have wide ones. None for too few real pictures to have neighbours.
    """
    if len(real) <= DENSITY_NEIGHBOURS:
        return None
    real, generated = real.double(), generated.double()
    radii = _nearest(real)[:, PRECISION_NEIGHBOURS]
    real, radii = real[radii <= radii.median()], radii[radii <= radii.median()]
    found = torch.zeros(len(generated), dtype=torch.float64)
    for rows in _blocks(len(real)):
        # A copy of a real picture is as near as can be told, not infinitely near, which no table could hold.
        distances = torch.cdist(real[rows], generated).clamp_min(_CLOSEST)
        found = torch.maximum(found, (radii[rows, None] / distances).amax(dim=0))
    return found


_CLOSEST = 1e-6


def _shares(blocks: Iterable[tuple[Tensor, Tensor]], nearest_generated: Tensor) -> Manifold:
    """The numbers from distances between some real points and all generated ones, (rows, m), with the real ones' own distances, block by block."""
    precise, reached, held, covered, count = torch.tensor(False), 0, 0, 0, 0
    for between, nearest_real in blocks:
        precise = precise | (between <= nearest_real[:, PRECISION_NEIGHBOURS, None]).any(dim=0)
        reached += int((between <= nearest_generated[:, PRECISION_NEIGHBOURS]).any(dim=1).sum())
        dense = between <= nearest_real[:, DENSITY_NEIGHBOURS, None]
        held, covered, count = held + int(dense.sum()), covered + int(dense.any(dim=1).sum()), count + len(between)
    return Manifold(
        precision=float(precise.double().mean()),
        recall=reached / count,
        density=held / (DENSITY_NEIGHBOURS * len(nearest_generated)),
        coverage=covered / count,
    )


def _nearest(points: Tensor) -> Tensor:
    """Distances of each point to itself and its nearest others of the set, (n, neighbours + 1), the k-th at place k."""
    return torch.cat([_sorted(torch.cdist(points[rows], points)) for rows in _blocks(len(points))])


def _sorted(distances: Tensor) -> Tensor:
    """The smallest of each row, (rows, neighbours + 1), in ascending order."""
    found: Tensor = distances.topk(DENSITY_NEIGHBOURS + 1, dim=1, largest=False).values
    return found


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, start + _ROWS) for start in range(0, count, _ROWS))
