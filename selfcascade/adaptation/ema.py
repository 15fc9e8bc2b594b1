"""Exponential moving average of trained parameters: what is published."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class MovingAverage:
    """Average of named parameters, ``a <- d a + (1 - d) p`` after each step, in float32 on the parameters' device.

    The decay of update n (from 1) is ``min(decay, n / (n + 9))``: early weights are forgotten quickly, so a short run is averaged over its end
    and not over its start.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], *, decay: float) -> None:
        """Start at the current values of ``parameters``."""
        self.decay = decay
        self.updates = 0
        self.values: dict[str, Tensor] = {name: parameter.detach().clone() for name, parameter in parameters}

    @torch.no_grad()
    def update(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Take in the parameters after one more step."""
        self.updates += 1
        decay = self.decay_at(self.updates)
        for name, parameter in parameters:
            self.values[name].lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def swap(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Exchange average and parameters, bit for bit, one after another: there is never a second copy of all of them."""
        for name, parameter in parameters:
            kept = parameter.clone()
            parameter.copy_(self.values[name])
            self.values[name].copy_(kept)

    def decay_at(self, update: int) -> float:
        """Decay of update ``update``, counted from 1."""
        return min(self.decay, update / (update + 9))
