"""Training of the small base's autoencoder: f8, four channels, on crops of pictures at two scales."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from selfcascade.adaptation.recorded_step import RecordedStep, step_optimizers
from selfcascade.config import AutoencoderSettings

Kind = Literal["crops", "whole", "equivariant"]


def generator_of(*parts: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose stream depends on ``parts`` and the kind of device alone: a step draws the same numbers whether or not a run was interrupted."""
    digest = hashlib.sha256("\n".join(map(str, parts)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def build_autoencoder(settings: AutoencoderSettings, *, side: int, seed: int) -> AutoencoderKL:
    """An untrained :class:`AutoencoderKL` with one residual layer a level and no attention; fp32, seeded. ``side`` is the native side in pixels."""
    levels = len(settings.channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=settings.channels,
            layers_per_block=1,
            latent_channels=settings.latent_channels,
            norm_num_groups=8,
            mid_block_add_attention=False,
            sample_size=side,
            scaling_factor=1.0,
        )


class AutoencoderTraining:
    """Weights, optimizer and position of the autoencoder's training; :meth:`advance` takes one step.

    The loss is ``L1 + MSE / 2 + gradient_l1 * L1 of finite differences + kl * KL per latent element``. A share ``equivariance`` of the steps decodes a
    latent that was halved by averaging and compares it with the halved picture: a latent that survives resizing is what the cascade's pivot needs.

    Args:
        settings: architecture and training.
        pictures: uint8 (N, S, S, 3), sRGB; S is twice the native side.
        seed: of initial weights, crops and posterior noise.
        dtype: autocast precision; the weights stay fp32.
        device: that trains. It holds the pictures too, as bytes.
    """

    def __init__(
        self, settings: AutoencoderSettings, pictures: NDArray[np.uint8], *, seed: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.settings, self.seed, self.dtype, self.device = settings, seed, dtype, torch.device(device)
        self.pictures = torch.from_numpy(pictures).to(self.device)
        self.native = pictures.shape[1] // 2
        self.factor = 2 ** (len(settings.channels) - 1)
        self.model = build_autoencoder(settings, side=self.native, seed=seed).to(self.device).train()
        self.optimizers = (
            torch.optim.AdamW(self.model.parameters(), lr=settings.lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True, capturable=self.device.type == "cuda"),
        )
        self.recorded = {kind: RecordedStep(partial(self.learn, kind), self.device) for kind in get_args(Kind)}
        self.step = 0

    def advance(self) -> Tensor:
        """One optimizer step; returns its loss, a scalar on the device: whoever reads it waits for the step."""
        settings = self.settings
        generator = generator_of(self.seed, "autoencoder", self.step)
        refining = self.step >= settings.steps
        equivariance, kl = (0.0, 0.1 * settings.kl) if refining else (settings.equivariance, settings.kl)
        equivariant, whole = (torch.rand(2, generator=generator) < torch.tensor([equivariance, 0.25])).tolist()
        kind = "equivariant" if equivariant else "whole" if whole else "crops"
        side = settings.crop if kind == "crops" else self.native
        count = max(1, settings.batch * settings.crop**2 // side**2)
        chosen = torch.randint(len(self.pictures), (count,), generator=generator)
        place = torch.rand((2, count), generator=generator)
        span = side * torch.tensor([1 if kind == "crops" and number % 2 == 0 else 2 for number in range(count)])
        latent = (count, settings.latent_channels, side // self.factor, side // self.factor)
        reached = self.recorded[kind](
            chosen=chosen,
            corners=(place * ((self.pictures.shape[1] - span) // 2 + 1)).long() * 2,
            noise=torch.randn(latent, generator=generator_of(self.seed, "posterior", self.step, device=self.device), device=self.device),
            kl=torch.tensor(kl),
            factor=torch.tensor(self._factor(), dtype=torch.float64),
        )
        self.step += 1
        return reached

    def learn(self, kind: Kind, *, chosen: Tensor, corners: Tensor, noise: Tensor, kl: Tensor, factor: Tensor) -> Tensor:
        """What a step computes, given its draws on the device that trains.

        Args:
            kind: crops, whole halves of pictures, or whole halves whose latent is halved.
            chosen: int64 (B,), pictures of the batch.
            corners: int64 (2, B), even: top and left of each crop in pixels.
            noise: float32 (B, C, h, w), of the posterior.
            kl: scalar, weight of the KL divergence.
            factor: scalar, of the learning rate.
        """
        pixels = self._crops(chosen, corners, whole=kind != "crops")
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            posterior = self.model.encode(pixels).latent_dist
            latent = posterior.mean + posterior.std * noise
            if kind == "equivariant":
                latent, pixels = F.avg_pool2d(latent, 2), F.avg_pool2d(pixels, 2)
            decoded = self.model.decode(latent).sample
        loss = reconstruction_loss(decoded.float(), pixels, gradient_l1=self.settings.gradient_l1)
        loss = loss + kl * posterior.kl().float().sum() / posterior.mean.numel()
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        step_optimizers(self.optimizers, self.settings.lr, factor)
        reached: Tensor = loss.detach()
        return reached

    def _factor(self) -> float:
        """Of the learning rate, at the step."""
        settings = self.settings
        if self.step < settings.steps:
            return cosine(self.step, settings.steps, warmup=100)
        return 0.6 * cosine(self.step - settings.steps, settings.refine_steps, warmup=100)

    def _crops(self, chosen: Tensor, corners: Tensor, *, whole: bool) -> Tensor:
        """Float (B, 3, side, side) in [-1, 1]: crops of the pictures as they are and of their halves in turn, or whole halves."""
        if whole:
            crops = self._cut(chosen, corners, side=self.native, factor=2)
        else:
            cuts = [self._cut(chosen[first::2], corners[:, first::2], side=self.settings.crop, factor=first + 1) for first in (0, 1) if len(chosen) > first]
            crops = torch.cat(cuts)
        return crops / 127.5 - 1

    def _cut(self, chosen: Tensor, corners: Tensor, *, side: int, factor: int) -> Tensor:
        """Float (B, 3, side, side) in [0, 255]: squares of ``factor * side`` pixels at ``corners``, averaged over ``factor``."""
        rows, columns = corners[..., None] + torch.arange(side * factor, device=self.device)
        picked = self.pictures[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
        return F.avg_pool2d(picked.permute(0, 3, 1, 2).float(), factor)


def reconstruction_loss(decoded: Tensor, pixels: Tensor, *, gradient_l1: float) -> Tensor:
    """Scalar distance of two float (B, 3, H, W) batches: absolute, squared, and absolute in the finite differences along both axes."""
    difference = decoded - pixels
    edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    return difference.abs().mean() + 0.5 * difference.square().mean() + gradient_l1 * edges


def cosine(step: int, steps: int, *, warmup: int, hold: float = 0.0) -> float:
    """Learning-rate factor: linear warm-up, flat until ``hold * steps``, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    flat = max(warmup, hold * steps)
    progress = min(1.0, max(0.0, step - flat) / (steps - flat)) if steps > flat else 0.0
    return 0.5 * (1 + float(np.cos(np.pi * progress)))


def halves(pictures: NDArray[np.uint8], *, batch: int = 64) -> Iterator[Tensor]:
    """Batches of float (B, 3, S/2, S/2) in [-1, 1]: each picture averaged over 2x2 pixels, which is how the base's native size is made from the dataset."""
    for start in range(0, len(pictures), batch):
        block = torch.from_numpy(pictures[start : start + batch]).permute(0, 3, 1, 2).float()
        yield F.avg_pool2d(block, 2) / 127.5 - 1


@torch.inference_mode()
def encode_all(model: AutoencoderKL, pictures: NDArray[np.uint8]) -> Tensor:
    """Posterior means of the halved pictures, float32 (N, C, S/16, S/16) on the model's device, times its scaling factor."""
    latents: Tensor = torch.cat([model.encode(block.to(model.device)).latent_dist.mean for block in halves(pictures)]) * model.config.scaling_factor
    return latents


@torch.inference_mode()
def encode_crops(model: AutoencoderKL, pictures: NDArray[np.uint8], *, count: int, seed: int, batch: int = 64) -> Tensor:
    """Posterior means of seeded crops with half the pictures' side, float32 (N, count, C, S/16, S/16) on the model's device, times its scaling factor."""
    side = pictures.shape[1] // 2
    corners = torch.randint(side + 1, (len(pictures), count, 2), generator=generator_of(seed, "crops")).tolist()
    cut = [picture[top : top + side, left : left + side] for picture, places in zip(pictures, corners, strict=True) for top, left in places]
    parts = []
    for start in range(0, len(cut), batch):
        block = torch.from_numpy(np.stack(cut[start : start + batch])).permute(0, 3, 1, 2).float() / 127.5 - 1
        parts.append(model.encode(block.to(model.device)).latent_dist.mean)
    latents: Tensor = torch.cat(parts) * model.config.scaling_factor
    return latents.view(len(pictures), count, *latents.shape[1:])


@torch.no_grad()
def fold_statistics(model: AutoencoderKL, latents: Tensor) -> None:
    """Make every latent channel of ``latents`` zero-mean and unit-variance, exactly, by changing the 1x1 convolutions around the latent.

    diffusers has one scaling factor for all channels; channels of unlike spread and offset get unlike noise levels from it. ``z' = (z - mean) / std`` is
    affine and so are both convolutions, hence the autoencoder computes the same pictures as before and needs a scaling factor of 1.
    """
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    channels = len(mean)
    weight, bias = model.quant_conv.weight, model.quant_conv.bias
    weight[:channels] /= std.view(-1, 1, 1, 1)
    bias[:channels] = (bias[:channels] - mean) / std
    bias[channels:] -= 2 * std.log()
    outer = model.post_quant_conv
    outer.bias += (outer.weight[:, :, 0, 0] * mean).sum(dim=1)
    outer.weight *= std.view(1, -1, 1, 1)


@torch.inference_mode()
def psnr(model: AutoencoderKL, pictures: NDArray[np.uint8]) -> float:
    """Mean over pictures of the PSNR, in dB, of decode(encode(x)) against x at the native side, both as 8-bit values."""
    values = []
    for block in halves(pictures):
        block = block.to(model.device)
        decoded = model.decode(model.encode(block).latent_dist.mean).sample
        error = ((decoded.clamp(-1, 1) * 127.5 + 127.5).round() - (block * 127.5 + 127.5).round()).square().mean(dim=(1, 2, 3))
        values.append(10 * torch.log10(255**2 / error.clamp_min(1e-3)))
    return float(torch.cat(values).mean())
