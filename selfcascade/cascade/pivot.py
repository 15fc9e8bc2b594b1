"""Pivot replacement: how one stage of the cascade starts from the stage below (paper section 4.1, equation 6)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from diffusers import SchedulerMixin
from torch import Tensor
from torch.nn.functional import interpolate

from selfcascade.cascade.schedule import Size, remaining_timesteps
from selfcascade.cascade.video import frames_of, stacked_as

Upscale = Callable[[Tensor, Size], Tensor]


def bilinear(latent: Tensor, size: Size) -> Tensor:
    """Bilinear enlargement of a latent (the paper's): (B, C, h, w) to (B, C, *size); pixel centres, not corners, are aligned."""
    return interpolate(latent, size, mode="bilinear", align_corners=False)


def bicubic(latent: Tensor, size: Size) -> Tensor:
    """Bicubic enlargement of a latent (the released code's): (B, C, h, w) to (B, C, *size); pixel centres, not corners, are aligned."""
    return interpolate(latent, size, mode="bicubic", align_corners=False)


UPSCALES: Mapping[str, Upscale] = MappingProxyType({"bilinear": bilinear, "bicubic": bicubic})


def renoise_pivot(pivot: Tensor, size: Size, scheduler: SchedulerMixin, *, start: float, noise: Tensor, upscale: Upscale = bilinear) -> tuple[Tensor, Tensor]:
    """Latent from which a stage starts, and the timesteps that it still has to take.

    Equation 6, ``z_K = sqrt(abar_K) * up(z_0) + sqrt(1 - abar_K) * eps``, with K the first timestep at or below ``start * T``. The scheduler's own
    ``add_noise`` computes it, so that it is right in the parametrisation of whichever scheduler follows.

    Args:
        pivot: clean latent of the stage below, (B, C, h, w), for video (B, C, F, h, w), scaled.
        size: latent height and width of this stage.
        scheduler: a diffusers scheduler whose ``set_timesteps`` was called; it is told where it will begin.
        start: K / T, in (0, 1]; the paper uses 0.7.
        noise: standard normal, (B, C, *size), for video (B, C, F, *size); drawn by the caller, so that a sample owns its randomness.
        upscale: how the pivot grows; a video grows frame by frame.

    Returns:
        The noisy latent, of the noise's shape, and the remaining timesteps, (S,), descending.

    Raises:
        ValueError: ``size`` is smaller than the pivot, or ``start`` leaves no timestep.
    """
    if size[0] < pivot.shape[-2] or size[1] < pivot.shape[-1]:
        raise ValueError(f"latent size {size[0]}x{size[1]} is smaller than the pivot, {pivot.shape[-2]}x{pivot.shape[-1]}")
    timesteps = remaining_timesteps(scheduler, start)
    grown = stacked_as(pivot, upscale(frames_of(pivot), size))
    return scheduler.add_noise(grown, noise, timesteps[:1].expand(len(pivot))), timesteps
