"""Dispersed convolution: a 3x3 kernel enlarged to 5x5 without data or training (ScaleCrafter, arXiv 2310.07702; method section 11)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

PATCH = 7
"""Side of the input patch over which the map is fitted."""
PIXELS_WEIGHT = 0.05
"""eta: weight of the pixels' residual beside that of the structure."""


@cache
def dispersion_map() -> Tensor:
    """R, (25, 9), fp64: the kernel ``R k`` does to an enlarged picture what k does to the picture, and nearly the same to the picture itself.

    The least-squares solution, over all inputs h of 7x7 elements with zero padding, of ``up(k * h) = (R k) * up(h)`` (structure; up is bilinear x2 with
    aligned corners) together with ``eta (k * h) = eta (R k) * h`` (pixels), eta = 0.05. Both sides are linear in h and in k, so the 49 unit inputs and the
    nine unit kernels say it all. Its columns sum to 0.954 for the corners of k, 0.977 for the edges and 1 for the centre.
    """
    coefficients, targets = dispersion_system()
    return torch.linalg.solve(coefficients.T @ coefficients, coefficients.T @ targets)


def dispersion_system() -> tuple[Tensor, Tensor]:
    """The overdetermined system ``A R = B`` of :func:`dispersion_map`: A of (12005, 25), B of (12005, 9), fp64; a row for every input and output element."""
    inputs = torch.eye(PATCH**2, dtype=torch.float64).view(-1, 1, PATCH, PATCH)
    kernels = torch.eye(9, dtype=torch.float64).view(9, 1, 3, 3)
    outputs = F.conv2d(inputs, kernels, padding=1)
    taps = [F.unfold(picture, 5, padding=2).transpose(1, 2).reshape(-1, 25) for picture in (_up(inputs), inputs)]
    wanted = [picture.permute(0, 2, 3, 1).reshape(-1, 9) for picture in (_up(outputs), outputs)]
    return torch.cat([taps[0], PIXELS_WEIGHT * taps[1]]), torch.cat([wanted[0], PIXELS_WEIGHT * wanted[1]])


def dispersed(weight: Tensor) -> Tensor:
    """The enlarged kernels ``R k`` of a convolution, (O, I, 3, 3) to (O, I, 5, 5), in its precision. This costs about one output element of the convolution."""
    enlarged = weight.flatten(2).to(torch.promote_types(weight.dtype, torch.float32))
    enlarged = enlarged @ dispersion_map().T.to(enlarged)
    return enlarged.reshape(*weight.shape[:2], 5, 5).to(weight.dtype)


def _up(picture: Tensor) -> Tensor:
    return F.interpolate(picture, scale_factor=2, mode="bilinear", align_corners=True)
