"""The time-aware feature upsampler: four small networks that carry the pivot's features to the bigger size (paper section 4.2, equation 8)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.functional import conv2d, group_norm, silu

from selfcascade.bases import fetch_artifact, names_artifact
from selfcascade.cascade.families import BaseSpec, Inject
from selfcascade.cascade.pivot import bilinear
from selfcascade.cascade.schedule import Size
from selfcascade.settings import SettingsError

if TYPE_CHECKING:
    from selfcascade.storage import Store

Variant = Literal["A", "C"]
Final = Literal["residual", "identity", "gate"]
PivotTime = Literal["current", "zero"]

BLOCKS = 2
"""Residual blocks of one upsampler (paper section 4.2)."""
TIME_FEATURES = 4
"""Fixed features of the timestep that variant C sees."""
GROUPS = (8, 8, 16, 16)
"""Channel groups of variant C from the shallow to the deep tap: 1,824 numbers in all."""


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

    def forward(self, u: Tensor, emb: Tensor) -> Tensor:
        """The residual of u, (B, C, H, W), at the time embedding emb, (B, T_e)."""
        v = self.conv1(silu(self.norm1(u))) + self.time(silu(emb))[:, :, None, None]
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


class GroupSharedUpsampler(nn.Module):
    """Variant C: the same structure with every weight shared by the channels of a group, and four fixed features of the timestep. 38 G parameters.

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
        tau = self._time_features(t).to(self.gamma.dtype)
        u = bilinear(feature, size)
        for kernel, scale, offset in zip(self.kernels, self.scale, self.offset, strict=True):
            v = silu(group_norm(u, self.norm_groups))
            v = conv2d(v, self._per_channel(kernel)[:, None], padding=1, groups=self.channels)
            u = u + self._modulation(1 + tau @ scale.T) * v + self._modulation(tau @ offset.T)
        return self._modulation(tau @ self.gamma.T) * u

    def _time_features(self, t: Tensor) -> Tensor:
        s = t.float() / self.timesteps
        return torch.stack([torch.ones_like(s), s, torch.cos(torch.pi * s), torch.sin(torch.pi * s)], dim=-1)

    def _per_channel(self, shared: Tensor, dim: int = 0) -> Tensor:
        return shared.repeat_interleave(self.channels // shared.shape[dim], dim)

    def _modulation(self, shared: Tensor) -> Tensor:
        return self._per_channel(shared, dim=1)[:, :, None, None]  # (B, G) to (B, C, 1, 1)


class FeatureUpsampler(ModelMixin, ConfigMixin):
    """Phi: one upsampler a tap point, and what it was trained for.

    Saved and loaded as a diffusers folder, safetensors only. Unless ``final`` is "identity", it adds exactly zero before it is trained: the tuned
    cascade starts as the tuning-free one.

    Args:
        channels: of the tap points, from shallow to deep.
        time_width: width of the UNet's time embedding.
        norm_groups: groups of the UNet's group normalisation.
        variant: A, residual blocks as in the paper; C, at most 2,000 parameters.
        groups: variant C's channel groups a tap point.
        inject: where the features are read and added, skip connections or the main path.
        pivot_t: timestep at which the pivot passes the encoder.
        final: variant A's result; "residual" leaves the enlarged feature itself out, "identity" keeps it (the released code), "gate" scales it from zero.
        timesteps: T.
        base: ``name@version`` of the base that it belongs to.
        size: height and width in pixels that it was trained at.
        stage: which stage of the cascade that was.

    Raises:
        SettingsError: channels do not divide into the groups, or ``final`` does not go with the variant.
    """

    @register_to_config
    def __init__(
        self,
        channels: tuple[int, ...] = (320, 640, 1280, 1280),
        time_width: int = 1280,
        norm_groups: int = 32,
        variant: Variant = "A",
        groups: tuple[int, ...] = GROUPS,
        inject: Inject = "skip",
        pivot_t: PivotTime = "current",
        final: Final = "residual",
        timesteps: int = 1000,
        base: str | None = None,
        size: tuple[int, int] | None = None,
        stage: int | None = None,
    ):
        super().__init__()
        if variant not in ("A", "C"):
            raise SettingsError(f"upsampler variant {variant!r} is not known; choose A or C")
        if variant == "C" and final != "residual":
            raise SettingsError(f"upsampler variant C has no final={final!r}: its own gate is zero at the start; leave final at 'residual'")
        for c, g in zip(channels, groups, strict=True):
            if c % norm_groups or (variant == "C" and c % g):
                raise SettingsError(f"{c} upsampler channels do not divide into {norm_groups} norm groups and {g} groups of variant C; choose others")
        self.levels = nn.ModuleList(
            ResidualUpsampler(c, time_width, norm_groups, final) if variant == "A" else GroupSharedUpsampler(c, g, norm_groups, timesteps)
            for c, g in zip(channels, groups, strict=True)
        )

    @classmethod
    def for_base(
        cls,
        spec: BaseSpec,
        *,
        variant: Variant,
        inject: Inject = "skip",
        pivot_t: PivotTime = "current",
        final: Final = "residual",
        base: str | None = None,
        size: tuple[int, int] | None = None,
        stage: int | None = None,
    ) -> FeatureUpsampler:
        """A fresh upsampler that fits a base. Its initial weights come from torch's default generator."""
        return cls(
            channels=spec.channels(inject),
            time_width=spec.time_width,
            norm_groups=spec.norm_groups,
            variant=variant,
            inject=inject,
            pivot_t=pivot_t,
            final=final,
            base=base,
            size=size,
            stage=stage,
        )

    def forward(self, level: int, feature: Tensor, *, t: Tensor, emb: Tensor, size: Size) -> Tensor:
        """What equation 8 adds to the feature map of the bigger latent: ``phi_n(h_n, t)``.

        Args:
            level: n, from 0.
            feature: the pivot's feature map, (B, C_n, h, w).
            t: timesteps, (B,).
            emb: the UNet's time embedding, (B, T_e).
            size: height and width of the feature map that it is added to.

        Returns:
            (B, C_n, *size), in the upsampler's dtype.
        """
        return self.levels[level](feature.to(self.dtype), t=t, emb=emb.to(self.dtype), size=size)

    def check_fits(self, spec: BaseSpec, base: str | None) -> None:
        """Refuse a base that the upsampler was not made for.

        Args:
            spec: of the base that the pipeline holds.
            base: ``name@version`` of it, where that is known.

        Raises:
            SettingsError: another base, another channel count; names both and the way out.
        """
        name = f"upsampler {self.config.get('_name_or_path') or ''}".strip()
        if base is not None and self.config.base is not None and base != self.config.base:
            raise SettingsError(
                f"{name} was trained for base '{_short(self.config.base)}' but the pipeline holds '{_short(base)}'; "
                f"retrain it or pass --base {self.config.base.partition('@')[0]}"
            )
        made_for = (tuple(self.config.channels), self.config.time_width)
        found = (spec.channels(self.config.inject), spec.time_width)
        if made_for != found:
            raise SettingsError(
                f"{name} was made for {self.config.inject} features of {made_for[0]} channels and time width {made_for[1]}, "
                f"but the base has {found[0]} and {found[1]}; choose an upsampler of this base"
            )


def load_upsampler(reference: str, store: Store | None = None, *, dtype: torch.dtype = torch.float32) -> FeatureUpsampler:
    """An upsampler from a folder, a hub id (``owner/name``), or an artifact (``upsamplers/name``, ``upsamplers/name@version``, ``s3://...``); safetensors only.

    Args:
        reference: which.
        store: where artifacts are looked up; unset, the store of the default settings is opened for that.
        dtype: of its weights.

    Raises:
        SettingsError: it is not found, or does not load; one line.
    """
    location = str(fetch_artifact(reference, "upsamplers", store)[0]) if names_artifact(reference, "upsamplers") else reference
    try:
        upsampler: FeatureUpsampler = FeatureUpsampler.from_pretrained(location, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise SettingsError(f"upsampler {reference!r} does not load: {' '.join(str(error).split())[:300]}") from None
    upsampler.register_to_config(_name_or_path=reference)  # what messages call it: the user's words, not a cache folder
    return upsampler


def count_parameters(**config: object) -> int:
    """Trainable numbers of a :class:`FeatureUpsampler` of that configuration; on the meta device, so nothing is allocated."""
    with torch.device("meta"):
        upsampler = FeatureUpsampler(**config)
    return sum(parameter.numel() for parameter in upsampler.parameters())


def _short(base: str) -> str:
    name, _, version = base.partition("@")
    return f"{name}@{version[:12]}" if version else name
