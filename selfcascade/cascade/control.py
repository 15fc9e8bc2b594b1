"""A ControlNet in every stage of a cascade: it sees each stage's latent, and the user's picture at that stage's size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import ControlNetModel, ModelMixin
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from torch import Tensor

from selfcascade.settings import SettingsError


@dataclass(frozen=True)
class Control:
    """What a ControlNet adds to the UNet, for the ``residuals`` of a pipeline's call: ``pipe(..., residuals=Control(controlnet, picture))``.

    The pivot's pass has no residuals: they have the latent's size, and the UNet adds them to its skips and its mid block after the pivot's features were
    read there, so that these would be the same bits with them.

    Raises:
        SettingsError: the scale is negative.
    """

    controlnet: ControlNetModel
    """Of the base's family, on the UNet's device and in its precision."""
    image: PipelineImageInput
    """What it is controlled by, such as edges: one picture for all samples or one each, as diffusers' own ControlNet pipelines take them. Any size: it is
    resized to each stage."""
    scale: float = 1.0
    """Factor on what it adds."""
    _of_size: dict[tuple[int, int], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.scale >= 0:
            raise SettingsError(f"a Control's scale={self.scale} must not be negative")

    def __call__(self, z: Tensor, t: Tensor, text: Tensor, conditioning: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments of the UNet's forward.

        Args:
            z: noisy latent as the scheduler scales it for the model, (B or 2 B, C, H, W).
            t: timestep, a scalar.
            text: (B or 2 B, L, D).
            conditioning: whatever else the UNet takes; SDXL's added conditions are the ControlNet's too.
        """
        added = conditioning.get("added_cond_kwargs")
        pictures = self._pictures((z.shape[-2], z.shape[-1])).to(z.device, z.dtype)
        down, mid = self.controlnet(
            z,
            t,
            encoder_hidden_states=text,
            controlnet_cond=torch.cat([pictures] * (len(z) // len(pictures))) if len(pictures) > 1 else pictures.expand(len(z), -1, -1, -1),
            conditioning_scale=self.scale,
            return_dict=False,
            **({} if added is None else {"added_cond_kwargs": added}),
        )
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}

    def check(self, unet: ModelMixin, batch: int) -> None:
        """Refuse a ControlNet of other channels than the UNet's, or of another text, and pictures that are neither one nor as many as the samples.

        Raises:
            SettingsError: names both.
        """
        for name in ("in_channels", "block_out_channels", "cross_attention_dim"):
            own, base = (_plain(network.config.get(name)) for network in (self.controlnet, unet))
            if own != base:
                raise SettingsError(f"the ControlNet was made for a UNet with {name}={own}, but this one has {base}; choose one of this base's family")
        count = len(self._pictures((8, 8)))
        if count not in (1, batch):
            raise SettingsError(f"the Control has {count} pictures for {batch} samples; give one for all or one each")

    def _pictures(self, size: tuple[int, int]) -> Tensor:
        """(1 or B, 3, H, W), [0, 1], of a latent's height and width."""
        if size not in self._of_size:
            pixels = 2 ** (len(self.controlnet.config.conditioning_embedding_out_channels) - 1)
            processor = VaeImageProcessor(vae_scale_factor=pixels, do_convert_rgb=True, do_normalize=False)
            self._of_size[size] = processor.preprocess(self.image, height=size[0] * pixels, width=size[1] * pixels)
        return self._of_size[size]


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
