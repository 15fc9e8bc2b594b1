"""The four directions in which a feature map varies most: what variant D's upsampler works in."""

from __future__ import annotations

import torch
from torch import Tensor


class PrincipalDirections:
    """Principal component analysis of feature vectors that arrive piece by piece.

    Every position of a map is one vector of C channels. Sums are kept in float64 on the CPU, so neither the size of the pieces nor the device's
    precision shows in the result.
    """

    def __init__(self, channels: int) -> None:
        """Nothing seen yet of vectors of ``channels`` entries."""
        self.count = 0
        self.sum = torch.zeros(channels, dtype=torch.float64)
        self.products = torch.zeros(channels, channels, dtype=torch.float64)

    def add(self, feature: Tensor) -> None:
        """See the vectors of a map, (B, C, h, w), of any precision and device."""
        vectors = feature.detach().to("cpu", torch.float64).movedim(1, 0).flatten(1)
        self.count += vectors.shape[1]
        self.sum += vectors.sum(1)
        self.products += vectors @ vectors.T

    def directions(self, count: int) -> Tensor:
        """The ``count`` directions of largest variance about the mean, strongest first, as orthonormal columns: (C, count), float32.

        A direction and its negative are equally good; the one is taken whose entry of largest magnitude is positive.

        Raises:
            ValueError: nothing was seen.
        """
        if self.count == 0:
            raise ValueError("principal directions need at least one feature vector")
        mean = self.sum / self.count
        covariance = self.products / self.count - torch.outer(mean, mean)
        vectors = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :count]
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        return (vectors * largest.sign()).float().contiguous()
