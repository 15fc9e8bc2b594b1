"""Classifier-free guidance: which branches run at a step, and the prediction they make together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selfcascade.settings import SettingsError


@dataclass(frozen=True)
class Guidance:
    """How strongly, and at which timesteps, the text guides."""

    scale: float
    """g of ``e_u + g (e_c - e_u)``; at 1 and below only the conditional branch runs."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Shares of T between which guidance is on (arXiv 2404.07724); outside, the conditional branch runs alone."""
    joint: bool = True
    """Whether the branches share a pass of the UNet, or run one after the other in half the memory."""
    timesteps: int = 1000
    """T."""

    def __post_init__(self) -> None:
        given = list(self.interval) if isinstance(self.interval, Sequence) else self.interval
        if not (isinstance(given, list) and len(given) == 2 and 0 <= given[0] < given[1] <= 1):
            raise SettingsError(f"guidance_interval={given} must be two shares of T with 0 <= low < high <= 1, such as [0.1, 0.8]")

    @property
    def on(self) -> bool:
        """Whether there is guidance at any step: then texts come in two halves, the unconditional first."""
        return guided(self.scale)

    def at(self, t: Tensor | float) -> bool:
        """Whether a step at timestep t is guided."""
        low, high = self.interval
        return self.on and low * self.timesteps <= float(t) <= high * self.timesteps

    def passes(self, t: Tensor | float, *, batch: int) -> list[slice]:
        """Rows, in a batch of both branches, of every pass of the UNet at timestep t."""
        if not self.on:
            return [slice(0, batch)]
        if not self.at(t):
            return [slice(batch, 2 * batch)]
        return [slice(0, 2 * batch)] if self.joint else [slice(0, batch), slice(batch, 2 * batch)]

    def combine(self, predictions: Sequence[Tensor], t: Tensor | float, *, batch: int) -> Tensor:
        """The guided prediction of what the passes gave, (B, ...)."""
        prediction = torch.cat(list(predictions)) if len(predictions) > 1 else predictions[0]
        if not self.at(t):
            return prediction
        return combine(prediction, self.scale)


def guided(scale: float) -> bool:
    """Whether a scale asks for guidance at all: at 1 and below only the conditional branch runs."""
    return scale > 1


def combine(prediction: Tensor, scale: float) -> Tensor:
    """``e_u + g (e_c - e_u)`` of the two halves of a batch, (2 B, ...) to (B, ...). Linear, so it holds for noise and velocity alike."""
    unconditional, conditional = prediction.chunk(2)
    return unconditional + scale * (conditional - unconditional)
