"""One upsampler a stage of the cascade, as one component of a pipeline (paper algorithm 1 trains one for each step from size to size)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from selfcascade.cascade.families import BaseSpec
from selfcascade.cascade.upsampler import FeatureUpsampler, load_upsampler
from selfcascade.settings import SettingsError

if TYPE_CHECKING:
    from selfcascade.storage import Store


One = FeatureUpsampler | str | PathLike[str] | None


class UpsamplerSet(ModelMixin, ConfigMixin):
    """Upsamplers by stage. A stage without one is tuning-free.

    It is a model of its own, so that a diffusers pipeline saves, loads, moves and offloads it like any component: one folder, one ``config.json`` that
    holds the configurations of its members by stage, one safetensors file. It has the face of a :class:`FeatureUpsampler`, which serves all stages.

    Args:
        members: configuration of the upsampler of each stage, by the stage's number, from 1.

    Raises:
        SettingsError: there is none, a stage is no number above 0, or a member was trained for another stage.
    """

    stages: Any
    """A ``ModuleDict`` of :class:`FeatureUpsampler` by the stage's number."""

    @register_to_config
    def __init__(self, members: Mapping[str, Mapping[str, Any]]):
        super().__init__()
        if not members:
            raise SettingsError("a set of upsamplers needs at least one; leave upsampler out for the tuning-free cascade")
        self.stages = nn.ModuleDict({stage: FeatureUpsampler(**config) for stage, config in members.items()})
        for stage, member in self.stages.items():
            if not (stage.isdecimal() and int(stage) > 0):
                raise SettingsError(f"upsamplers are given by the number of their stage, from 1, not by {stage!r}")
            if member.of(int(stage)) is None:
                raise SettingsError(f"{member._title()} was trained for stage {member.config.stage} but is given for stage {stage}; put it there")

    @classmethod
    def holding(cls, members: Mapping[int, FeatureUpsampler]) -> Self:
        """A set of these very modules, by stage; one that is given twice is copied, so that each stage has weights of its own.

        Raises:
            SettingsError: as the constructor.
        """
        with torch.device("meta"):
            made = cls({str(stage): _own(member) for stage, member in members.items()})
        taken: list[FeatureUpsampler] = []
        for stage, member in members.items():
            taken.append(copy.deepcopy(member) if any(member is other for other in taken) else member)
            made.stages[str(stage)] = taken[-1]
        return made

    def of(self, stage: int) -> FeatureUpsampler | None:
        """What guides a stage of the cascade, counted from 1, or nothing."""
        return self.stages[str(stage)] if str(stage) in self.stages else None  # noqa: SIM401 (ModuleDict has no get)

    def check_stages(self, stages: int) -> None:
        """Refuse a cascade of ``stages`` stages above the base of which it serves none.

        Raises:
            SettingsError: names the stages that there are.
        """
        if stages and not any(self.of(stage) for stage in range(1, stages + 1)):
            there = ", ".join(self.stages)
            raise SettingsError(f"the upsamplers are for stage {there} but this cascade has {stages} above the base; choose a larger size or others")

    def check_fits(self, spec: BaseSpec, base: str | None) -> None:
        """Refuse a base that a member was not made for, as :meth:`FeatureUpsampler.check_fits`."""
        for member in self.stages.values():
            member.check_fits(spec, base)


Upsamplers = One | UpsamplerSet | Mapping[int, One | UpsamplerSet] | Sequence[One | UpsamplerSet]
"""What a user may give in place of an upsampler: see :func:`gather`."""


def gather(upsampler: Upsamplers, store: Store | None = None, *, dtype: torch.dtype = torch.float32) -> FeatureUpsampler | UpsamplerSet | None:
    """The component that a pipeline holds, from what a user may give.

    Args:
        upsampler: nothing; a module; folder, hub id or artifact of one; or of these a mapping by stage, from 1, or a list, the first being stage 1's. In a
            mapping or a list None is a stage without one.
        store: where artifacts are looked up.
        dtype: of what is loaded.

    Raises:
        SettingsError: one is not found or does not load, or is for another stage.
    """
    if upsampler is None or isinstance(upsampler, FeatureUpsampler | UpsamplerSet):
        return upsampler
    if isinstance(upsampler, str | PathLike):
        return load_upsampler(str(upsampler), store, dtype=dtype)
    if not isinstance(upsampler, Mapping | Sequence):
        raise SettingsError(f"upsampler is a {type(upsampler).__name__}; give an upsampler, where one is, or a list or mapping of these by stage")
    by_stage = upsampler if isinstance(upsampler, Mapping) else dict(enumerate(upsampler, start=1))
    members = {}
    for stage, given in by_stage.items():
        member = gather(given, store, dtype=dtype)
        if isinstance(member, UpsamplerSet):
            member = member.of(stage)
        if member is not None:
            members[stage] = member
    return UpsamplerSet.holding(members) if members else None


def _own(member: FeatureUpsampler) -> dict[str, Any]:
    """Its configuration without diffusers' notes."""
    return {name: value for name, value in member.config.items() if not name.startswith("_")}
