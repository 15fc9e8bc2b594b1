"""Upsamplers of at most 2,000 trained numbers on features of hundreds of channels: weights shared by groups (variant C), a fixed subspace (variant D).

Both keep the paper's structure, one bilinear enlargement and two time-conditioned residual blocks, and see four fixed features of the timestep in
place of the UNet's embedding. The layers that the paper describes cannot be that small; these are designs of our own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, group_norm, silu

from selfcascade.cascade.pivot import bilinear
from selfcascade.cascade.residual_upsampler import BLOCKS
from selfcascade.cascade.schedule import Size

TIME_FEATURES = 4
"""Fixed features of the timestep."""
GROUPS = (8, 8, 16, 16)
"""Channel groups of variant C from the shallow to the deep tap: 1,824 numbers in all. The fourth tap of a three-level base is its mid block."""
BASIS = 4
"""Directions of variant D a tap point."""


class GroupSharedUpsampler(nn.Module):
    """Variant C: every weight is shared by the channels of a group. 38 G parameters.

    Both blocks take ``v = silu(norm(u))`` through a 3x3 kernel a group, then ``u = u + (1 + S tau)[g] v + (O tau)[g]``. The result is
    ``(Gamma tau)[g] u``, zero at the start.
    """

    def __init__(self, channels: int, groups: int, norm_groups: int, timesteps: int):
        super().__init__()
        self.channels, self.norm_groups, self.timesteps = channels, norm_groups, timesteps
        self.kernels = nn.Parameter(0.1 * torch.randn(BLOCKS, groups, 3, 3))
        self.scale = nn.Parameter(torch.zeros(BLOCKS, groups, TIME_FEATURES))
        self.offset = nn.Parameter(torch.zeros(BLOCKS, groups, TIME_FEATURES))
        self.gamma = nn.Parameter(torch.zeros(groups, TIME_FEATURES))

    def forward(self, feature: Tensor, *, t: Tensor, emb: Tensor, size: Size) -> Tensor:
        """As :meth:`FeatureUpsampler.forward`; ``emb`` is not looked at."""
        tau = time_features(t, self.timesteps).to(self.gamma.dtype)
        u = bilinear(feature, size)
        for kernel, scale, offset in zip(self.kernels, self.scale, self.offset, strict=True):
            v = silu(group_norm(u, self.norm_groups))
            v = conv2d(v, self._per_channel(kernel)[:, None], padding=1, groups=self.channels)
            u = u + self._modulation(1 + tau @ scale.T) * v + self._modulation(tau @ offset.T)
        return self._modulation(tau @ self.gamma.T) * u

    def _per_channel(self, shared: Tensor, dim: int = 0) -> Tensor:
        return shared.repeat_interleave(self.channels // shared.shape[dim], dim)

    def _modulation(self, shared: Tensor) -> Tensor:
        return _spread(self._per_channel(shared, dim=1))  # (B, G) to (B, C, 1, 1)


class FrozenBasisUpsampler(nn.Module):
    """Variant D: two residual blocks in a subspace of four directions, P, which is fitted to features of the base and then fixed. 372 parameters.

    With ``u`` the enlarged feature and ``z = P^T u``, both blocks take ``v = conv(silu(z))``, 3x3 from 4 to 4 channels without bias, then
    ``z = z + (1 + S tau) v + O tau``. The result is ``(gamma tau) u + P ((Gamma tau) z)``, zero at the start.
    """

    basis: Tensor
    """P, (C, 4), orthonormal columns: a buffer, saved with the weights. The first four channels until it is fitted."""

    def __init__(self, channels: int, timesteps: int):
        super().__init__()
        self.timesteps = timesteps
        self.register_buffer("basis", torch.eye(channels, BASIS))
        self.kernels = nn.Parameter(0.1 * torch.randn(BLOCKS, BASIS, BASIS, 3, 3))
        self.scale = nn.Parameter(torch.zeros(BLOCKS, BASIS, TIME_FEATURES))
        self.offset = nn.Parameter(torch.zeros(BLOCKS, BASIS, TIME_FEATURES))
        self.gamma = nn.Parameter(torch.zeros(TIME_FEATURES))
        self.mixed_gamma = nn.Parameter(torch.zeros(BASIS, TIME_FEATURES))

    def forward(self, feature: Tensor, *, t: Tensor, emb: Tensor, size: Size) -> Tensor:
        """As :meth:`FeatureUpsampler.forward`; ``emb`` is not looked at."""
        tau = time_features(t, self.timesteps).to(self.gamma.dtype)
        u = bilinear(feature, size)
        z = bilinear(torch.einsum("bchw,cd->bdhw", feature, self.basis), size)  # P^T u: both are linear, and this order is the cheaper one
        for kernel, scale, offset in zip(self.kernels, self.scale, self.offset, strict=True):
            v = conv2d(silu(z), kernel, padding=1)
            z = z + _spread(1 + tau @ scale.T) * v + _spread(tau @ offset.T)
        mixed = torch.einsum("bdhw,cd->bchw", _spread(tau @ self.mixed_gamma.T) * z, self.basis)
        return (tau @ self.gamma)[:, None, None, None] * u + mixed


def time_features(t: Tensor, timesteps: int) -> Tensor:
    """``tau(t) = [1, s, cos pi s, sin pi s]`` with ``s = t / T``: (B,) to (B, 4), float32."""
    s = t.float() / timesteps
    return torch.stack([torch.ones_like(s), s, torch.cos(torch.pi * s), torch.sin(torch.pi * s)], dim=-1)


def _spread(per_channel: Tensor) -> Tensor:
    """(B, C) to (B, C, 1, 1)."""
    return per_channel[:, :, None, None]
