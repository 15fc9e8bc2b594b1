"""An autoencoder that is a linear map, so that what passes through it has a closed form."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate


class LinearAutoencoder(ModelMixin, ConfigMixin):
    """A latent element is the mean colour of 8 x 8 pixels, and a picture has that colour all over them. The posterior is wide: only its mode is of use."""

    @register_to_config
    def __init__(
        self, block_out_channels: tuple[int, ...] = (1, 1, 1, 1), scaling_factor: float = 0.5, shift_factor: float | None = 0.25, force_upcast: bool = True
    ):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.use_tiling = False

    def encode(self, pictures: Tensor) -> AutoencoderKLOutput:
        means = avg_pool2d(pictures, 8) * self.scale
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(torch.cat([means, torch.full_like(means, 3.0)], dim=1)))

    def decode(self, latents: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        pictures = interpolate(latents * self.scale, scale_factor=8, mode="nearest")
        return DecoderOutput(sample=pictures) if return_dict else (pictures,)
