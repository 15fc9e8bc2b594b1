"""CMMD: the maximum mean discrepancy of CLIP embeddings under a Gaussian kernel (Jayasumana et al., "Rethinking FID", 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from selfcascade.evaluation.intervals import indicator

SIGMA, SCALE = 10.0, 1000.0
"""Width of the kernel on normalised embeddings, and the factor that the published numbers carry."""
RULE = f"1,000 x squared MMD over all pairs, equal ones included, of normalised embeddings, kernel exp(-|x - y|^2 / (2 x {SIGMA:g}^2))"


@dataclass(frozen=True, slots=True)
class CmmdBlock:
    """Kernels within and between two sets, made once; the distance of every half-sample follows from them."""

    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> CmmdBlock:
        """From embeddings (n, d) and (m, d), taken to float64 and normalised."""
        x, y = normalize(x.double()), normalize(y.double())
        return cls(kernel(x, x), kernel(x, y), kernel(y, y))

    def distance(self, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
        """``SCALE (mean k(x, x') + mean k(y, y') - 2 mean k(x, y))``: of the whole sets, (), or of each half-sample, (draws,).

        As published the means go over all pairs, those of a picture with itself included: an estimate that is never negative and biased upwards by about
        ``SCALE ((1 - mean k(x, x')) / n + (1 - mean k(y, y')) / m)``.

        Args:
            rows: indices into the first set, (draws, r).
            columns: indices into the second set, (draws, c).
        """
        if rows is None or columns is None:
            return SCALE * (self.xx.mean() + self.yy.mean() - 2 * self.xy.mean())
        u, v = indicator(rows, len(self.xx)) / rows.shape[1], indicator(columns, len(self.yy)) / columns.shape[1]
        return SCALE * (((u @ self.xx) * u).sum(dim=1) + ((v @ self.yy) * v).sum(dim=1) - 2 * ((u @ self.xy) * v).sum(dim=1))


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """``exp(-|x - y|^2 / (2 SIGMA^2))`` of unit vectors (n, d) and (m, d): (n, m)."""
    return torch.exp((x @ y.T - 1) / SIGMA**2)
