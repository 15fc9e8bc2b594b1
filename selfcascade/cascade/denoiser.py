"""What the scheduler is given at each step: the UNet's prediction, guided by the text and, above the base, by the pivot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from selfcascade.cascade.guidance import Guidance
from selfcascade.cascade.injection import Features, pivot_features, unet_with_pivot
from selfcascade.cascade.upsampler import FeatureUpsampler

Residuals = Callable[[Tensor, Tensor, Tensor, Mapping[str, Any]], Mapping[str, Any]]
"""Takes what the UNet takes in one pass: the scaled noisy latent, (B or 2 B, C, H, W), the timestep, the text and the rest of the conditions. Returns what else
the UNet takes, ``down_block_additional_residuals`` and ``mid_block_additional_residual``, or nothing."""


class Denoiser:
    """The guided prediction of one stage, called once a step.

    With guidance the batch of the UNet holds the unconditional branch first. A step outside the guidance interval takes the conditional branch alone;
    ``guidance.joint`` says whether the two branches share a pass. The pivot never changes, so its features are kept where they may be used again: at
    pivot time 0 they are the same at every step, and with ``pivot_every = k`` those of the current timestep serve k steps.

    Args:
        unet: the frozen UNet.
        text: (B, L, D), or with guidance (2 B, L, D), the unconditional half first.
        conditioning: whatever else the UNet takes at this stage; tensors have the batch of ``text``.
        guidance: scale, interval, and whether its branches share a pass.
        pivot: clean latent of the stage below, (B, C, h, w); None at the base.
        upsampler: Phi; None is the tuning-free cascade.
        t_min: the upsampler guides while t is above this.
        strength: factor on what the upsampler adds.
        pivot_every: steps that the pivot's features of one timestep serve.
        residuals: what a ControlNet adds, for every pass but the pivot's.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        *,
        text: Tensor,
        conditioning: dict[str, Any],
        guidance: Guidance,
        pivot: Tensor | None = None,
        upsampler: FeatureUpsampler | None = None,
        t_min: int = 0,
        strength: float = 1.0,
        pivot_every: int = 1,
        residuals: Residuals | None = None,
    ) -> None:
        self.unet, self.text, self.conditioning, self.guidance = unet, text, conditioning, guidance
        self.pivot = pivot if upsampler is not None and strength > 0 else None
        self.upsampler, self.t_min, self.strength, self.pivot_every = upsampler, t_min, strength, pivot_every
        self.residuals = residuals
        self._kept: list[tuple[slice, Features]] = []
        self._steps_kept = 0
        self._dtype = unet.dtype  # diffusers walks every module to tell it

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        """The prediction that the scheduler steps with.

        Args:
            z: noisy latent as the scheduler scales it for the model, (B, C, H, W).
            t: timestep, a scalar.

        Returns:
            Noise or velocity, as the base predicts, (B, C, H, W), fp32.
        """
        z = z.to(self._dtype)
        self._age_features()
        rows = [self._predict(z, t, rows).float() for rows in self.guidance.passes(t, batch=len(z))]
        return self.guidance.combine(rows, t, batch=len(z))

    def replace_text(self, text: Tensor) -> None:
        """Go on with another text, (B or 2 B, L, D), as a user's callback may want."""
        if text is not self.text:
            self.text = text
            self._kept.clear()

    def _predict(self, z: Tensor, t: Tensor, rows: slice) -> Tensor:
        """The UNet's output for some rows of the batch of both branches."""
        z = _repeat(z, rows)
        text, conditioning = self.text[rows], take_rows(self.conditioning, rows)
        added = {} if self.residuals is None else self.residuals(z, t, text, conditioning)
        if self.upsampler is None or self.pivot is None or t <= self.t_min:
            prediction: Tensor = self.unet(z, t, encoder_hidden_states=text, return_dict=False, **conditioning, **added)[0]
            return prediction
        features = self._features(self.pivot, t, rows, text, conditioning)
        return unet_with_pivot(self.unet, z, t, text, upsampler=self.upsampler, features=features, strength=self.strength, **conditioning, **added)

    def _features(self, pivot: Tensor, t: Tensor, rows: slice, text: Tensor, conditioning: dict[str, Any]) -> Features:
        assert self.upsampler is not None
        for kept, features in self._kept:
            if kept.start <= rows.start and rows.stop <= kept.stop:
                return tuple(feature[rows.start - kept.start : rows.stop - kept.start] for feature in features)
        phi = self.upsampler.config
        pivot = _repeat(pivot, rows).to(self._dtype)
        features = pivot_features(self.unet, pivot, t if phi.pivot_t == "current" else 0, text, inject=phi.inject, **conditioning)
        self._kept.append((rows, features))
        return features

    def _age_features(self) -> None:
        if self.upsampler is not None and self.upsampler.config.pivot_t == "current" and self._steps_kept % self.pivot_every == 0:
            self._kept.clear()
        self._steps_kept += 1


def _repeat(latent: Tensor, rows: slice) -> Tensor:
    """Those rows of a latent that is repeated once a branch: (B, ...) to (rows, ...)."""
    return torch.cat([latent] * ((rows.stop - rows.start) // len(latent)))


def take_rows(conditioning: Any, rows: slice) -> Any:
    """The rows of every tensor in nested dictionaries and lists; anything else, such as a factor, is left as it is, and so are attention's own arguments:
    an IP-Adapter's masks have no rows.
    """
    if isinstance(conditioning, Tensor):
        return conditioning[rows] if conditioning.ndim else conditioning
    if isinstance(conditioning, dict):
        return {name: value if name == "cross_attention_kwargs" else take_rows(value, rows) for name, value in conditioning.items()}
    if isinstance(conditioning, list | tuple):
        return type(conditioning)(take_rows(value, rows) for value in conditioning)
    return conditioning
