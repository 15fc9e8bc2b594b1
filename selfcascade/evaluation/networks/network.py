"""A frozen network behind one interface: uint8 pictures in, our own resize, float features out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from selfcascade.evaluation.resize import resize


@dataclass(frozen=True, slots=True)
class NetworkKind:
    """What can be said of a feature network without loading it."""

    name: str
    num_features: int
    side: int
    """Pictures are resized to ``side`` x ``side`` before the network sees them."""
    scaling: str
    """How 0..255 becomes what the network was trained on, in words."""
    licence: str
    """Of the weights, as their source has it."""
    classes: int = 0
    """Logits that its file gives beside features, where it has a head."""


class FeatureNetwork(nn.Module):
    """A frozen network behind one interface; torchmetrics takes it as ``feature=`` for every metric."""

    def __init__(self, kind: NetworkKind, body: nn.Module, rule: str = "clean") -> None:
        """``body`` turns float pictures in 0..255, (N, 3, H, W), into features, (N, d); ``rule`` names the resize.

        Of a body with ``read``, texts (N) to (N, d), or ``head``, a matrix (classes, d), these are the network's too.
        """
        super().__init__()
        self.kind, self.rule = kind, rule
        self.num_features = kind.num_features
        self.body = body.eval().requires_grad_(False)
        self.read: Callable[[Sequence[str]], Tensor] | None = getattr(body, "read", None)
        self._head: Tensor | None = getattr(body, "head", None)

    def logits(self, features: Tensor) -> Tensor | None:
        """Logits of classes without their bias, (N, classes) float32, of features, (N, d) on the CPU; None where the network has no head."""
        return None if self._head is None else features @ self._head.detach().cpu().T

    @torch.inference_mode()
    def forward(self, pictures: Tensor) -> Tensor:
        """Features, (N, d) float32, of pictures, (N, 3, H, W) uint8, of any size.

        Raises:
            TypeError: the pictures are not uint8. A float picture would have to be rounded by somebody, and libraries differ in how.
        """
        return self.embed(self.resized(pictures))

    def resized(self, pictures: Tensor) -> Tensor:
        """Pictures, (N, 3, H, W) uint8, at the network's own size, float32 in 0..255: small enough to be gathered to a batch. Raises as :meth:`forward`."""
        _check_bytes(pictures)
        return resize(pictures, (self.kind.side, self.kind.side), self.rule)

    @torch.inference_mode()
    def embed(self, pictures: Tensor) -> Tensor:
        """Features, (N, d) float32, of float pictures in 0..255 that have the network's size already.

        Raises:
            ValueError: the network gave another shape than (N, d), or a number that is not finite.
        """
        # Channels-last is half again as fast on CPU; it changes memory order, not values.
        features: Tensor = self.body(pictures.to(memory_format=torch.channels_last)).float().flatten(1)
        if features.shape != (len(pictures), self.num_features):
            raise ValueError(f"the feature network gave shape {tuple(features.shape)} for {len(pictures)} pictures, not ({len(pictures)}, {self.num_features})")
        if not bool(torch.isfinite(features).all()):
            raise ValueError("the feature network gave a number that is not finite")
        return features


def _check_bytes(pictures: Tensor) -> None:
    if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
        raise TypeError(f"pictures must be uint8 of shape (N, 3, H, W), not {pictures.dtype} of shape {tuple(pictures.shape)}")
