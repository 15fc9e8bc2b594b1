"""How sure a number is: half-samples without replacement, the same halves for every method.

Drawing with replacement would put equal pictures into the kernel sums and bias KID upwards, and it would lower the rank of the covariances in FID.
Half-samples are a delete-d jackknife with d = n / 2: for statistics that are smooth in the distribution, the spread of a half-sample's value around the
mean of them is the standard error of the whole sample's value (Shao and Wu, "A general theory for jackknife variance estimation", 1989). At a distance of
about 0 KID has no linear term and its half-samples spread more than that: errors are then too large, never too small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist, linear_regression

import torch
from torch import Tensor

from selfcascade.evaluation.statistics import frechet, mmd2, polynomial_kernel, root_trace
from selfcascade.settings import digest_of

LEVEL = 0.95
_CHUNK_ELEMENTS = 8_000_000


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its standard error and the 95 % interval that follows from it."""

    value: float
    error: float

    @property
    def half_width(self) -> float:
        """Half of the interval's length."""
        return NormalDist().inv_cdf((1 + LEVEL) / 2) * self.error

    @property
    def low(self) -> float:
        """Lower end."""
        return self.value - self.half_width

    @property
    def high(self) -> float:
        """Upper end."""
        return self.value + self.half_width

    @property
    def excludes_zero(self) -> bool:
        """Whether the value is clearly not 0."""
        return self.low > 0 or self.high < 0


def half_samples(count: int, draws: int, *, seed: int, side: str) -> Tensor:
    """Indices of ``draws`` seeded halves of ``count`` things, (draws, count // 2) int64, sorted within a half, none twice.

    ``side`` names what is drawn ("prompts", "real"), so that two sides are independent.
    """
    generator = torch.Generator().manual_seed(int(digest_of(["half-samples", seed, side, count])[:15], 16))
    order = torch.rand(draws, count, generator=generator, dtype=torch.float64).argsort(dim=1)
    return order[:, : count // 2].sort(dim=1).values


def widen(halves: Tensor, each: int) -> Tensor:
    """Indices of rows where every drawn thing owns ``each`` consecutive rows (its crops, or the samples of a prompt)."""
    return (halves[..., None] * each + torch.arange(each)).flatten(-2)


@dataclass(frozen=True, slots=True)
class GramBlock:
    """Inner products of two sets of features, computed once; KID and FID of every half-sample are made from them."""

    xx: Tensor
    xy: Tensor
    yy: Tensor
    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor, yy: Tensor | None = None) -> GramBlock:
        """From features (n, d) and (m, d), taken to float64. ``yy`` may be passed where another block has it."""
        x, y = x.double(), y.double()
        return cls(xx=x @ x.T, xy=x @ y.T, yy=y @ y.T if yy is None else yy, x=x, y=y)

    def kid(self, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
        """Unbiased squared MMD over all pairs: of the whole sets, (), or of each half-sample, (draws,).

        Args:
            rows: indices into the first set, (draws, r).
            columns: indices into the second set, (draws, c).
        """
        kxx, kxy, kyy = (polynomial_kernel(gram, self.x.shape[1]) for gram in (self.xx, self.xy, self.yy))
        if rows is None or columns is None:
            return mmd2(kxx, kxy, kyy)
        r, c = rows.shape[1], columns.shape[1]
        x, y, between = _sums(kxx, rows), _sums(kyy, columns), _cross_sums(kxy, rows, columns)
        return (x.pairs - x.diagonal) / (r * (r - 1)) + (y.pairs - y.diagonal) / (c * (c - 1)) - 2 * between / (r * c)

    def fid(self, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
        """Fréchet distance of the whole sets, (), or of each half-sample, (draws,). Arguments as for :meth:`kid`."""
        if rows is None or columns is None:
            return frechet(self.x, self.y)
        if min(rows.shape[1], columns.shape[1]) > self.x.shape[1]:
            return torch.stack([frechet(self.x[chosen], self.y[others]) for chosen, others in zip(rows, columns, strict=True)])
        r, c = rows.shape[1], columns.shape[1]
        x, y, between = _sums(self.xx, rows), _sums(self.yy, columns), _cross_sums(self.xy, rows, columns)
        gap = x.pairs / r**2 + y.pairs / c**2 - 2 * between / (r * c)
        traces = (x.diagonal - x.pairs / r) / (r - 1) + (y.diagonal - y.pairs / c) / (c - 1)
        roots = [root_trace(self.xy[some[:, :, None], others[:, None, :]]) for some, others in _chunks(rows, columns)]
        return gap + traces - 2 * torch.cat(roots)


def extrapolated(block: GramBlock, count: int, each: int, *, draws: int, seed: int) -> float:
    """The Fréchet distance for ever more pictures of the first set, against all of the second: FID is biased upwards by about a constant over n.

    The mean over ``draws`` seeded subsets is taken at five sizes from half of the set to all of it, and the line in 1 / n through them, by least squares, is
    read at 0 (Chong and Forsyth, "Effectively unbiased FID and Inception score", 2020, with plain subsets in place of Sobol ones).

    Args:
        block: the two sets.
        count: prompts of the first set, at least 8.
        each: rows of each prompt.
        draws: subsets a size.
        seed: of the subsets.
    """
    generator = torch.Generator().manual_seed(int(digest_of(["extrapolated", seed, count])[:15], 16))
    columns = torch.arange(len(block.y))
    sizes = sorted({round(count * share) for share in (0.5, 0.6, 0.7, 0.85, 1.0)})
    means = []
    for size in sizes:
        repeats = 1 if size == count else draws
        order = torch.rand(repeats, count, generator=generator, dtype=torch.float64).argsort(dim=1)[:, :size].sort(dim=1).values
        means.append(float(block.fid(widen(order, each), columns.expand(repeats, -1)).mean()))
    line = linear_regression([1 / (size * each) for size in sizes], means)
    return line.intercept


def standard_error(replicates: Tensor, count: int) -> float:
    """Standard error of the whole sample's value from its half-samples' values, (draws,).

    Args:
        replicates: values of the half-samples.
        count: size of the whole sample of what was halved; an odd one leaves halves that are a little too small, which is allowed for.
    """
    kept = count // 2
    spread = float(replicates.std(correction=1))
    return spread * math.sqrt(kept / (count - kept))


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sums over the chosen rows and columns of a symmetric matrix, (draws,) each."""

    pairs: Tensor
    diagonal: Tensor


def _sums(matrix: Tensor, chosen: Tensor) -> _Sums:
    # A sum over chosen pairs is a product with 0/1 vectors: no sub-matrix is copied.
    u = indicator(chosen, len(matrix))
    return _Sums(pairs=((u @ matrix) * u).sum(dim=1), diagonal=u @ matrix.diagonal())


def _cross_sums(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return ((indicator(rows, matrix.shape[0]) @ matrix) * indicator(columns, matrix.shape[1])).sum(dim=1)


def indicator(indices: Tensor, count: int) -> Tensor:
    """0/1 vectors, (draws, count) float64, of ``indices``, (draws, r): a sum over what is chosen is a product with one."""
    return torch.zeros(len(indices), count, dtype=torch.float64).scatter_(1, indices, 1.0)


def _chunks(rows: Tensor, columns: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    step = max(1, _CHUNK_ELEMENTS // (rows.shape[1] * columns.shape[1]))
    for start in range(0, len(rows), step):
        yield rows[start : start + step], columns[start : start + step]
