"""How weights step: the optimizer, and the learning rate of every step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from selfcascade.config import AdaptationSettings
from selfcascade.settings import SettingsError


def learning_rate(step: int, settings: AdaptationSettings) -> float:
    """Learning rate of step ``step``, counted from 0: linear warm-up, then as ``settings.schedule`` says; linear and cosine are zero at the last step.

    The factors are those of ``diffusers.optimization`` one step on, so that the warm-up does not begin at zero. They follow from the step and the settings
    alone: there is no scheduler whose state could be lost.
    """
    done, warmup = step + 1, settings.warmup
    if done < warmup:
        return settings.lr * (done / warmup)
    progress = min(1.0, (done - warmup) / max(1, settings.steps - warmup))
    match settings.schedule:
        case "constant":
            return settings.lr
        case "linear":
            return settings.lr * (1 - progress)
        case "cosine":
            return settings.lr * (0.5 * (1 + math.cos(math.pi * progress)))


def optimizer_of(parameters: Iterable[nn.Parameter], settings: AdaptationSettings, *, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW over ``parameters``, its two averages in float32 or, where a tensor is not small, in blocks of 8 bits.

    Raises:
        SettingsError: 8 bits are asked for and bitsandbytes is not installed.
    """
    if settings.optimizer == "adamw-8bit":
        check_bitsandbytes()
        from bitsandbytes.optim import AdamW8bit as Chosen
    else:
        from torch.optim import AdamW as Chosen
    made: torch.optim.Optimizer = Chosen(parameters, lr=settings.lr, betas=(0.9, 0.999), weight_decay=weight_decay)
    return made


def check_optimizer(settings: AdaptationSettings, device: torch.device) -> None:
    """Refuse an optimizer that this device or installation does not have.

    Raises:
        SettingsError: names the setting and the way out.
    """
    if settings.optimizer == "adamw-8bit":
        if device.type != "cuda":
            raise SettingsError(f"adaptation.optimizer=adamw-8bit needs a CUDA device, not {device.type}; use adamw")
        check_bitsandbytes()


def check_bitsandbytes() -> None:
    """Refuse to go on where bitsandbytes is not installed.

    Raises:
        SettingsError: names the extra that installs it.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise SettingsError(
            "adaptation.optimizer=adamw-8bit needs the package bitsandbytes, which is not installed; pip install 'selfcascade[8bit]', or use adamw"
        ) from None
