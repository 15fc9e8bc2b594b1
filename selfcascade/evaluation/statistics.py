"""Fréchet distance and MMD in closed form, from features or from their Gram matrices: what intervals are computed with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DEGREE, OFFSET = 3, 1.0


def polynomial_kernel(gram: Tensor, dimension: int) -> Tensor:
    """KID's kernel, ``(x.y / d + 1) ** 3``, of a matrix of inner products (Binkowski et al., "Demystifying MMD GANs", 2018, section 4)."""
    return (gram / dimension + OFFSET) ** DEGREE


def mmd2(kxx: Tensor, kxy: Tensor, kyy: Tensor) -> Tensor:
    """Unbiased estimate of the squared MMD, over all pairs (Gretton et al., "A kernel two-sample test", 2012, equation 3). It may be negative.

    ``sum_{i != j} k(x_i, x_j) / (n (n - 1)) + sum_{i != j} k(y_i, y_j) / (m (m - 1)) - 2 sum_{i, j} k(x_i, y_j) / (n m)``

    Args:
        kxx: kernel within the first set, (..., n, n).
        kxy: kernel between the sets, (..., n, m).
        kyy: kernel within the second set, (..., m, m).

    Returns:
        (...,).
    """
    return _mean_off_diagonal(kxx) + _mean_off_diagonal(kyy) - 2 * kxy.mean(dim=(-2, -1))


def frechet(x: Tensor, y: Tensor) -> Tensor:
    """Fréchet distance of the Gaussians fitted to two sets of features, with unbiased covariances (Dowson and Landau, 1982; Heusel et al., 2017).

    ``|mu_x - mu_y|^2 + tr(S_x) + tr(S_y) - 2 tr((S_x S_y)^{1/2})``. With ``S_x = A'A`` and ``S_y = B'B`` the last trace is the sum of the singular values
    of ``A B'``, so no d x d matrix is ever made from fewer than d samples, and no root of a singular matrix is taken.

    Args:
        x: (n, d), float64, n at least 2.
        y: (m, d), float64, m at least 2.
    """
    a = _root(x)
    b = _root(y)
    gap = (x.mean(dim=0) - y.mean(dim=0)).square().sum()
    roots: Tensor = torch.linalg.svdvals(a @ b.T)
    return gap + a.square().sum() + b.square().sum() - 2 * roots.sum()


def root_trace(cross: Tensor) -> Tensor:
    """``tr((S_x S_y)^{1/2})`` from the inner products ``x y'``, (..., n, m) float64: its cost does not depend on d.

    Double centring turns them into ``((n - 1) (m - 1))^{1/2} A B'`` of :func:`frechet`; its singular values are the roots of the eigenvalues of its
    product with itself, taken on the shorter side.
    """
    n, m = cross.shape[-2:]
    centred = cross - cross.mean(dim=-1, keepdim=True)
    centred = centred - centred.mean(dim=-2, keepdim=True)
    short = centred if n <= m else centred.mT
    roots: Tensor = torch.linalg.eigvalsh(short @ short.mT).clamp_min(0).sqrt()
    return roots.sum(dim=-1) / math.sqrt((n - 1) * (m - 1))


def _mean_off_diagonal(kernel: Tensor) -> Tensor:
    n = kernel.shape[-1]
    diagonal = kernel.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    total: Tensor = kernel.sum(dim=(-2, -1)) - diagonal
    return total / (n * (n - 1))


def _root(x: Tensor) -> Tensor:
    """A matrix with at most d rows whose product with itself is the covariance of ``x``."""
    centred = (x - x.mean(dim=0)) / math.sqrt(len(x) - 1)
    if len(x) <= x.shape[1]:
        return centred
    triangle: Tensor = torch.linalg.qr(centred, mode="r").R
    return triangle
