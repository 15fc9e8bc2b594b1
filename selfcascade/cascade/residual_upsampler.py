"""Upsamplers of ordinary residual blocks: the paper's layers (variant A, section 4.2) and those of the released code (variant B)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, silu

from selfcascade.cascade.pivot import bilinear
from selfcascade.cascade.schedule import Size

Final = Literal["residual", "identity", "gate"]

BLOCKS = 2
"""Residual blocks of one upsampler (paper section 4.2)."""


class ResidualBlock(nn.Module):
    """``u + conv_zero(silu(norm(conv(silu(norm(u))) + W silu(emb))))``; returns what is added to u, zero at the start. 18 C^2 + (T_e + 7) C parameters."""

    def __init__(self, channels: int, time_width: int, norm_groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.time = nn.Linear(time_width, channels)
        self.norm2 = nn.GroupNorm(norm_groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)

    def forward(self, u: Tensor, emb: Tensor, size: Size | None = None) -> Tensor:
        """The residual of u, (B, C, h, w), at the time embedding emb, (B, T_e): as large as u, or enlarged to ``size`` after the first activation."""
        v = silu(self.norm1(u))
        if size is not None:
            v = nearest(v, size)
        v = self.conv1(v) + self.time(silu(emb))[:, :, None, None]
        return self.conv2(silu(self.norm2(v)))


class ResidualUpsampler(nn.Module):
    """Variant A, the paper's layers: one bilinear enlargement, then two residual blocks that see the UNet's time embedding."""

    def __init__(self, channels: int, time_width: int, norm_groups: int, final: Final):
        super().__init__()
        self.final = final
        self.blocks = nn.ModuleList(ResidualBlock(channels, time_width, norm_groups) for _ in range(BLOCKS))
        self.gate = nn.Parameter(torch.zeros(())) if final == "gate" else None

    def forward(self, feature: Tensor, *, t: Tensor, emb: Tensor, size: Size) -> Tensor:
        """As :meth:`FeatureUpsampler.forward`; ``t`` is not looked at, since the embedding holds it."""
        grown = u = bilinear(feature, size)
        for block in self.blocks:
            u = u + block(u, emb)
        if self.final == "residual":
            return u - grown
        return u if self.gate is None else self.gate * u


class ReleasedUpsampler(nn.Module):
    """Variant B, the released code's layers: the nearest-neighbour enlargement is inside the first block, on both of its paths.

    At the start it returns the enlarged feature itself. As many parameters as variant A.
    """

    def __init__(self, channels: int, time_width: int, norm_groups: int):
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(channels, time_width, norm_groups) for _ in range(BLOCKS))

    def forward(self, feature: Tensor, *, t: Tensor, emb: Tensor, size: Size) -> Tensor:
        """As :meth:`FeatureUpsampler.forward`; ``t`` is not looked at, since the embedding holds it."""
        enlarging, *others = self.blocks
        u = nearest(feature, size) + enlarging(feature, emb, size)
        for block in others:
            u = u + block(u, emb)
        return u


def nearest(feature: Tensor, size: Size) -> Tensor:
    """Nearest-neighbour enlargement: (B, C, h, w) to (B, C, *size). Pixel centres are aligned; at a factor of 2 every element becomes 2 x 2."""
    return interpolate(feature, size, mode="nearest-exact")
