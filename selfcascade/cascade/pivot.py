"""Pivot replacement: how one stage of the cascade starts from the stage below (paper section 4.1, equation 6)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from diffusers import SchedulerMixin
from torch import Tensor
from torch.nn.functional import interpolate

from selfcascade.cascade.schedule import Size, remaining_timesteps

Upscale = Callable[[Tensor, Size], Tensor]


def bilinear(latent: Tensor, size: Size) -> Tensor:
    """Bilinear enlargement of a latent (the paper's): (B, C, h, w) to (B, C, *size), a video frame by frame; pixel centres, not corners, are aligned."""
    return _enlarge(latent, size, mode="bilinear", align_corners=False)


def bicubic(latent: Tensor, size: Size) -> Tensor:
    """Bicubic enlargement of a latent (the released code's), as :func:`bilinear`."""
    return _enlarge(latent, size, mode="bicubic", align_corners=False)


def _enlarge(latent: Tensor, size: Size, *, mode: str, align_corners: bool | None = None) -> Tensor:
    maps = latent.flatten(1, -3)  # the frames of a video, (B, C, F, h, w), are as independent here as its channels
    return interpolate(maps, size, mode=mode, align_corners=align_corners).reshape(*latent.shape[:-2], *size)


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
        upscale: how the pivot grows.

    Returns:
        The noisy latent, of the noise's shape, and the remaining timesteps, (S,), descending.

    Raises:
        ValueError: ``size`` is smaller than the pivot, or ``start`` leaves no timestep.
    """
    if size[0] < pivot.shape[-2] or size[1] < pivot.shape[-1]:
        raise ValueError(f"latent size {size[0]}x{size[1]} is smaller than the pivot, {pivot.shape[-2]}x{pivot.shape[-1]}")
    timesteps = remaining_timesteps(scheduler, start)
    return scheduler.add_noise(upscale(pivot, size), noise, timesteps[:1].expand(len(pivot))), timesteps
