"""The time-aware feature upsampler: four small networks that carry the pivot's features to the bigger size (paper section 4.2, equation 8)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from selfcascade.bases import fetch_artifact, names_artifact
from selfcascade.cascade.families import BaseSpec, Inject, refuse_other_base
from selfcascade.cascade.residual_upsampler import Final, ReleasedUpsampler, ResidualUpsampler
from selfcascade.cascade.schedule import Size
from selfcascade.cascade.small_upsampler import BASIS, GROUPS, FrozenBasisUpsampler, GroupSharedUpsampler
from selfcascade.config import upsampler_conflict
from selfcascade.settings import SettingsError

if TYPE_CHECKING:
    from selfcascade.cascade.upsampler_set import UpsamplerSet
    from selfcascade.storage import Store

Variant = Literal["A", "B", "C", "D"]
PivotTime = Literal["current", "zero"]

VARIANTS: tuple[Variant, ...] = ("A", "B", "C", "D")
SMALL: tuple[Variant, ...] = ("C", "D")
"""Of at most 2,000 parameters: scalars that stand for many weights each, which weight decay must leave alone."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""How files that run code when they are read are called."""


class Count(NamedTuple):
    """Numbers that an upsampler holds."""

    trained: int
    """By gradients."""
    fitted: int
    """To features of the base, before training: variant D's directions."""


class FeatureUpsampler(ModelMixin, ConfigMixin):
    """Phi: one upsampler a tap point, and what it was trained for.

    Saved and loaded as a diffusers folder, safetensors only. Unless ``final`` is "identity", it adds exactly zero before it is trained: the tuned
    cascade starts as the tuning-free one.

    Args:
        channels: of the tap points, from shallow to deep.
        time_width: width of the UNet's time embedding.
        norm_groups: groups of the UNet's group normalisation.
        variant: A, residual blocks as in the paper; B, as in the released code; C and D, at most 2,000 parameters.
        groups: variant C's channel groups a tap point.
        inject: where the features are read and added, skip connections or the main path.
        pivot_t: timestep at which the pivot passes the encoder.
        final: the result of variants A and B; "residual" leaves the enlarged feature itself out, "identity" keeps it (the released code), "gate" scales it
            from zero. Variants C and D have a gate of their own.
        timesteps: T.
        family: name of the family of bases that it belongs to: features of several families have the same channels.
        base: ``name@version`` of the base that it belongs to.
        size: height and width in pixels that it was trained at.
        stage: which stage of the cascade that was, from 1.
        shared: whether it guides every stage, or only the one that it was trained at.

    Raises:
        SettingsError: channels do not divide into the groups, or ``inject`` or ``final`` does not go with the variant.
    """

    _supports_gradient_checkpointing = True

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
        family: str | None = None,
        base: str | None = None,
        size: tuple[int, int] | None = None,
        stage: int | None = None,
        shared: bool = False,
    ):
        super().__init__()
        if variant not in VARIANTS:
            raise SettingsError(f"upsampler variant {variant!r} is not known; choose {', '.join(VARIANTS[:-1])} or {VARIANTS[-1]}")
        conflict = upsampler_conflict(variant, inject, final)
        if conflict is not None:
            raise SettingsError(conflict)
        for c, g in zip(channels, groups, strict=True):
            if c % norm_groups or (variant == "C" and c % g):
                raise SettingsError(f"{c} upsampler channels do not divide into {norm_groups} norm groups and {g} groups of variant C; choose others")

        def level(c: int, g: int) -> nn.Module:
            match variant:
                case "A":
                    return ResidualUpsampler(c, time_width, norm_groups, final)
                case "B":
                    return ReleasedUpsampler(c, time_width, norm_groups)
                case "C":
                    return GroupSharedUpsampler(c, g, norm_groups, timesteps)
                case "D":
                    return FrozenBasisUpsampler(c, timesteps)

        self.levels = nn.ModuleList(level(c, g) for c, g in zip(channels, groups, strict=True))
        self.gradient_checkpointing = False

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
        shared: bool = False,
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
            family=spec.family.name,
            base=base,
            size=size,
            stage=stage,
            shared=shared,
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
        upsample = partial(self.levels[level], t=t, emb=emb.to(self.dtype), size=size)
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(upsample, feature.to(self.dtype))
        return upsample(feature.to(self.dtype))

    @property
    def needs_basis(self) -> bool:
        """Whether :meth:`set_basis` comes before the training (variant D)."""
        return self.config.variant == "D"

    def set_basis(self, basis: Sequence[Tensor]) -> None:
        """Give variant D its directions.

        Args:
            basis: of every tap point orthonormal columns, (C_n, 4).

        Raises:
            ValueError: another variant, another shape, or columns that are not orthonormal.
        """
        for level, directions in zip(self.levels, basis, strict=True):
            if not isinstance(level, FrozenBasisUpsampler):
                raise ValueError(f"variant {self.config.variant} has no basis; only D does")
            if directions.shape != level.basis.shape:
                raise ValueError(f"a basis of shape {tuple(directions.shape)} is not one of {tuple(level.basis.shape)}")
            if not torch.allclose(directions.T @ directions, torch.eye(BASIS, dtype=directions.dtype, device=directions.device), atol=1e-4):
                raise ValueError("the columns of a basis must be orthonormal")
            level.basis.copy_(directions)

    def count(self) -> Count:
        """How many numbers it holds; nothing is computed, so it may be on the meta device."""
        return Count(sum(parameter.numel() for parameter in self.parameters()), sum(buffer.numel() for buffer in self.buffers()))

    def of(self, stage: int) -> FeatureUpsampler | None:
        """What guides a stage of the cascade, counted from 1: this upsampler, or nothing."""
        return self if self.config.shared or self.config.stage in (None, stage) else None

    def check_stages(self, stages: int) -> None:
        """Refuse a cascade of ``stages`` stages above the base none of which it is for; those that it is not for are tuning-free.

        Raises:
            SettingsError: names its stage and the way out.
        """
        if stages and not any(self.of(stage) for stage in range(1, stages + 1)):
            size = "x".join(str(side) for side in self.config.size or ())
            raise SettingsError(
                f"{self._title()} was trained for stage {self.config.stage}{f' ({size} pixels)' if size else ''} but this cascade has "
                f"{f'stages 1 to {stages}' if stages > 1 else 'stage 1 alone'}; choose one of these stages, a larger size, or train with upsampler.shared=true"
            )

    def check_fits(self, spec: BaseSpec, base: str | None) -> None:
        """Refuse a base that the upsampler was not made for.

        Args:
            spec: of the base that the pipeline holds.
            base: ``name@version`` of it, where that is known.

        Raises:
            SettingsError: another base, another family, another channel count; names both and the way out.
        """
        name = self._title()
        refuse_other_base(name, self.config.base, base)
        if self.config.family not in (None, spec.family.name):
            raise SettingsError(f"{name} was made for a base of family {self.config.family!r}, but this one is of family {spec.family.name!r}; choose another")
        made_for = (tuple(self.config.channels), self.config.time_width)
        found = (spec.channels(self.config.inject), spec.time_width)
        if made_for != found:
            raise SettingsError(
                f"{name} was made for {self.config.inject} features of {made_for[0]} channels and time width {made_for[1]}, "
                f"but the base has {found[0]} and {found[1]}; choose an upsampler of this base"
            )

    def _title(self) -> str:
        return f"upsampler {self.config.get('_name_or_path') or ''}".strip()


def load_upsampler(reference: str, store: Store | None = None, *, dtype: torch.dtype = torch.float32) -> FeatureUpsampler | UpsamplerSet:
    """An upsampler, or a set of one a stage, from a folder, a hub id (``owner/name``), or an artifact (``upsamplers/name``, ``upsamplers/name@version``,
    ``s3://...``); safetensors only.

    Args:
        reference: which.
        store: where artifacts are looked up; unset: that of an ``s3://`` URI, else that of the default settings, is opened for it.
        dtype: of its weights.

    Raises:
        SettingsError: it is not found, is no upsampler, has pickled weights, or does not load; one line.
    """
    from selfcascade.cascade.upsampler_set import UpsamplerSet  # which is made of what is here

    location = str(fetch_artifact(reference, "upsamplers", store)[0]) if names_artifact(reference, "upsamplers") else reference
    files = [path.name for path in Path(location).glob("*")]
    pickled = [name for name in files if name.endswith(PICKLES)]
    if pickled and not any(name.endswith(".safetensors") for name in files):
        raise SettingsError(f"upsampler {reference!r} has pickled weights ({pickled[0]}), which may run code when they are read; save it as safetensors")
    try:
        kind = FeatureUpsampler.load_config(location).get("_class_name")
        upsampler: FeatureUpsampler | UpsamplerSet
        network = {"FeatureUpsampler": FeatureUpsampler, "UpsamplerSet": UpsamplerSet}.get(kind)
        if network is None:
            raise SettingsError(f"upsampler {reference!r} is a {kind}; choose what `selfcascade adapt` has trained")
        upsampler, told = network.from_pretrained(location, dtype=dtype, use_safetensors=True, output_loading_info=True)
    except SettingsError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise SettingsError(f"upsampler {reference!r} does not load: {' '.join(str(error).split())[:300]}") from None
    if told["missing_keys"] or told["unexpected_keys"]:
        raise SettingsError(f"upsampler {reference!r} does not load: its weights are not those of its config.json; fetch it again")
    upsampler.register_to_config(_name_or_path=reference)  # what messages call it: the user's words, not a cache folder
    return upsampler


def count_parameters(**config: object) -> Count:
    """Numbers of a :class:`FeatureUpsampler` of that configuration; on the meta device, so nothing is allocated."""
    with torch.device("meta"):
        return FeatureUpsampler(**config).count()
