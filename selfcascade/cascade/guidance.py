"""Classifier-free guidance: both branches in one batch, the unconditional first, and the prediction they make together."""

from __future__ import annotations

from torch import Tensor


def branches(latent: Tensor, scale: float) -> Tensor:
    """A latent, or a pivot, once for each branch: (B, ...) to (2 B, ...), unguided unchanged."""
    return latent.repeat(2, *[1] * (latent.ndim - 1)) if guided(scale) else latent


def combine(prediction: Tensor, scale: float) -> Tensor:
    """``e_u + g (e_c - e_u)`` of the two halves of the batch: (2 B, ...) to (B, ...), unguided unchanged. Linear, so it holds for noise and velocity alike."""
    if not guided(scale):
        return prediction
    unconditional, conditional = prediction.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def guided(scale: float) -> bool:
    """Whether a scale asks for guidance at all: at 1 and below only the conditional branch runs."""
    return scale > 1
