"""The cascade's plan: how big each stage is, and which timesteps it still has to take (paper section 4.1, method section 6)."""

from __future__ import annotations

from math import floor, sqrt

from diffusers import SchedulerMixin
from torch import Tensor

from selfcascade.settings import SettingsError

Size = tuple[int, int]


def stage_sizes(height: int, width: int, *, native: Size, step: int) -> tuple[Size, ...]:
    """Height and width in pixels of every stage, from the base to the target.

    The base has the target's aspect and the area that the model was trained at; every stage doubles both sides; the last one is exactly the target,
    so its factor may be smaller. There are ``R = ceil(log4(target area / native area))`` stages above the base.

    Args:
        height: of the target, in pixels.
        width: of the target, in pixels.
        native: height and width in pixels that the base was trained at.
        step: every side is a multiple of this many pixels.

    Raises:
        SettingsError: a side is no multiple of ``step``, or the target is smaller than the base.
    """
    check_size(height, width, step=step)
    area = native[0] * native[1]
    if height * width < area:
        raise SettingsError(f"size {height}x{width} is smaller than the base's own {native[0]}x{native[1]}; ask for at least that many pixels")
    growths = 0
    while area * 4**growths < height * width:
        growths += 1
    if growths == 0:
        return ((height, width),)

    shrink = sqrt(area / (height * width))
    base = tuple(step * max(1, floor(side * shrink / step + 0.5)) for side in (height, width))
    sizes = [(min(base[0] * 2**r, height), min(base[1] * 2**r, width)) for r in range(growths)]
    sizes.append((height, width))
    return tuple(dict.fromkeys(sizes))  # rounding can make the base the target itself: then one stage is all there is


def check_size(height: int, width: int, *, step: int) -> None:
    """Refuse a size that the UNet cannot halve evenly at every level.

    Raises:
        SettingsError: a side is not a positive multiple of ``step``; names the nearest size that is.
    """
    if height < step or width < step or height % step or width % step:
        nearest = [step * max(1, floor(side / step + 0.5)) for side in (height, width)]
        raise SettingsError(
            f"size {height}x{width} must have sides that are multiples of {step} pixels (the base's latent step), such as {nearest[0]}x{nearest[1]}"
        )


def remaining_timesteps(scheduler: SchedulerMixin, start: float) -> Tensor:
    """The suffix of the scheduler's grid that a stage takes when it enters at ``K = start * T``: all t <= K. It begins there.

    Of DDIM's 50 steps over T = 1000 (981, 961, ..., 1), K = 700 keeps 35, the first of them 681.

    Args:
        scheduler: a diffusers scheduler whose ``set_timesteps`` was called; it is told where it will begin.
        start: K / T, in (0, 1].

    Returns:
        Timesteps, (S,), descending, on the scheduler's device.

    Raises:
        SettingsError: ``start`` is out of range, or no timestep is left.
    """
    if not 0 < start <= 1:
        raise SettingsError(f"start={start} must be above 0 and at most 1: it is K / T, where a stage enters the diffusion (paper: 0.7)")
    timesteps: Tensor = scheduler.timesteps
    latest = round(start * scheduler.config.num_train_timesteps, 6)  # 0.25025 * 4000 is a little below 1001 in floating point
    skipped = int((timesteps > latest).sum())
    if skipped == len(timesteps):
        raise SettingsError(
            f"start={start} leaves no timestep of {len(timesteps)} steps, the last of which is t={timesteps[-1].item():g}; raise start or steps"
        )
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    return timesteps[skipped:]
