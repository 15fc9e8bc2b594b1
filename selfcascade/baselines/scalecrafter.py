"""ScaleCrafter: dilated convolutions and noise-damped guidance in the first steps of direct sampling (arXiv 2310.07702; method section 11)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import ImagePipelineOutput, UNet2DConditionModel
from torch import Tensor
from torch.nn import Conv2d

from selfcascade.baselines import direct
from selfcascade.baselines.baseline import Baseline
from selfcascade.baselines.dilation import DispersedRedilation, Redilation
from selfcascade.baselines.dilation_tables import STEPS, DilationRecipe, convolutions_of, missing_table, recipe_for, resolve_table
from selfcascade.baselines.hooks import Hooks
from selfcascade.cascade.families import BaseSpec
from selfcascade.cascade.guidance import guided
from selfcascade.cascade.pipeline import SelfCascadePipeline
from selfcascade.cascade.solver import prepare
from selfcascade.config import BaselineSettings
from selfcascade.settings import SettingsError


@contextmanager
def redilated(unet: UNet2DConditionModel, recipe: DilationRecipe, timesteps: Tensor, *, guidance: bool = True) -> Iterator[None]:
    """ScaleCrafter in every call of the UNet that this thread makes inside the ``with`` block. Blocks nest: the innermost recipe counts.

    Noise-damped guidance, ``e = e_base(u) + g (e_dil(c) - e_dil(u))``, needs no other sampling loop. The UNet, called with both branches, calls itself
    once more for the unconditional one with the milder table, and returns ``[e_base(u), e_base(u) + e_dil(c) - e_dil(u)]``, which ordinary guidance
    combines to just that.

    Args:
        unet: any diffusers UNet, in a cascade or in a stock pipeline; it may wear a LoRA or be offloaded.
        recipe: what is dilated, how much and when.
        timesteps: the whole descending grid of the call, (S,), such as :func:`~.solver.prepare` makes for the cascade: it says which step a timestep is.
        guidance: whether calls hold the unconditional branch in the first half of the batch. Without it there is nothing to damp.

    Raises:
        SettingsError: the recipe names what the UNet does not have, or the UNet is compiled; in calls, an odd batch where guidance is on, or a batch of
            different steps.
    """
    state = _State(
        recipe=recipe,
        dilations=_layers(unet, recipe.dilations, recipe.dispersed),
        damped=_layers(unet, recipe.damped, recipe.dispersed),
        dispersed=frozenset(resolve_table(unet, dict.fromkeys(recipe.dispersed, 1.0))),
        timesteps=timesteps.detach().double().cpu(),
        guidance=guidance,
    )
    for name in state.dispersed:
        if not isinstance(unet.get_submodule(name), Conv2d):
            raise SettingsError(f"dispersed convolution needs the kernel of {name!r}, which an adapter wraps; fuse the adapter first, or set dispersed to []")
    token = _PASS.set(None)
    try:
        with _HOOKS.on(unet, state):
            yield
    finally:
        _PASS.reset(token)


def sample(
    pipeline: SelfCascadePipeline,
    prompt: str | list[str] | None = None,
    *,
    height: int,
    width: int,
    settings: BaselineSettings = BaselineSettings(),
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    **call: Any,
) -> ImagePipelineOutput:
    """Pictures of that size in a single stage with the recipe of the base's family and the size, arguments as in :mod:`~.baseline`.

    ``settings`` also hold what replaces the recipe's. At a ``guidance_scale`` of 1 and below there is nothing to damp.

    Raises:
        SettingsError: there is no table for this base and size, or guidance is to be damped and not both its branches are in every pass; or as the pipeline's
            call.
    """
    recipe = recipe_for(pipeline.spec, height, width, settings.scalecrafter)
    whole = call.get("joint_branches", True) and tuple(call.get("guidance_interval", (0, 1))) == (0, 1)
    if recipe.damps(0) and guided(guidance_scale) and not whole:
        raise SettingsError(
            "noise-damped guidance needs both branches in one pass at every step; leave joint_branches and guidance_interval alone, or set"
            " baselines.scalecrafter.tau_damped to 0"
        )
    timesteps = prepare(pipeline.scheduler, num_inference_steps).timesteps
    with redilated(pipeline.unet, recipe, timesteps, guidance=guided(guidance_scale)):
        own = {"eta": settings.eta, "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        return direct.sample(pipeline, prompt, height=height, width=width, **own | call)


def refusal(spec: BaseSpec, height: int, width: int, settings: BaselineSettings) -> str | None:
    """Why there is no table, or None."""
    return missing_table(spec, height, width, settings.scalecrafter)


@dataclass(frozen=True)
class _State:
    """What one block asks for."""

    recipe: DilationRecipe
    dilations: Mapping[str, float]
    damped: Mapping[str, float]
    dispersed: frozenset[str]
    timesteps: Tensor
    guidance: bool

    def step(self, timestep: Tensor | float) -> float:
        """Which step of 50 a timestep is, counted from 0."""
        given = torch.as_tensor(timestep).double().flatten()
        if (given != given[0]).any():
            raise SettingsError("ScaleCrafter dilates by step; all samples of a batch must be at one timestep")
        return int((self.timesteps > given[0].item()).sum()) * STEPS / len(self.timesteps)


@dataclass
class _Pass:
    """One call of the UNet."""

    unet: UNet2DConditionModel
    dilations: Mapping[str, float]
    dispersed: frozenset[str]
    under_way: dict[str, Redilation | DispersedRedilation] = field(default_factory=dict)


_PASS: ContextVar[_Pass | None] = ContextVar("selfcascade_scalecrafter_pass", default=None)


def _layers(unet: UNet2DConditionModel, table: Mapping[str, float], dispersed: tuple[str, ...]) -> dict[str, float]:
    return resolve_table(unet, dict.fromkeys(dispersed, 1.0)) | resolve_table(unet, table)


def _hook_all(unet: UNet2DConditionModel) -> list[Any]:
    handles = [
        unet.register_forward_pre_hook(_begin, with_kwargs=True),
        unet.register_forward_hook(_finish, with_kwargs=True),
    ]
    for name, (convolution, stride) in convolutions_of(unet).items():
        before, after = _around(unet, name, stride)
        handles += [convolution.register_forward_pre_hook(before), convolution.register_forward_hook(after)]
    return handles


_HOOKS: Hooks[_State] = Hooks("scalecrafter", _hook_all)


def _begin(unet: UNet2DConditionModel, args: tuple[Any, ...], kwargs: Mapping[str, Any] = {}) -> None:
    state = _HOOKS.state(unet)
    if state is None:
        return
    step = state.step(args[1] if len(args) > 1 else kwargs["timestep"])
    if step < state.recipe.tau:
        _PASS.set(_Pass(unet, {name: state.recipe.dilation(d, step) if d > 1 else 1 for name, d in state.dilations.items()}, state.dispersed))
    else:
        _PASS.set(None)


def _finish(unet: UNet2DConditionModel, args: tuple[Any, ...], *rest: Any) -> Any:
    state = _HOOKS.state(unet)
    if state is None:
        return None
    kwargs, output = rest
    if not (state.guidance and state.recipe.damps(state.step(args[1] if len(args) > 1 else kwargs["timestep"]))):
        return None
    prediction = output[0]
    if len(prediction) % 2:
        raise SettingsError(f"noise-damped guidance needs both branches in one batch, but the batch has {len(prediction)}; sample with guidance, in one batch")
    unconditional, conditional = prediction.chunk(2)
    with _HOOKS.on(unet, replace(state, dilations=state.damped, guidance=False)):
        base = unet(*_first_half(args, len(prediction)), **_first_half(kwargs, len(prediction)))[0]
    damped = torch.cat([base, base + conditional - unconditional])
    return (damped, *output[1:]) if isinstance(output, tuple) else type(output)(sample=damped)


def _around(unet: UNet2DConditionModel, name: str, stride: int) -> tuple[Any, Any]:
    """Hooks before and after one convolution."""

    def before(convolution: Any, args: tuple[Tensor]) -> Tensor | None:
        this = _PASS.get()
        if this is None or this.unet is not unet or name not in this.dilations:
            return None
        d, (x,) = this.dilations[name], args
        if name in this.dispersed:
            this.under_way[name] = DispersedRedilation(convolution, d)
        elif d > 1:
            this.under_way[name] = Redilation((x.shape[-2], x.shape[-1]), d, stride)
        else:
            return None
        return this.under_way[name].before(x)

    def after(convolution: Any, args: Any, outputs: Tensor) -> Tensor | None:
        this = _PASS.get()
        if this is None or this.unet is not unet or name not in this.under_way:
            return None
        return this.under_way.pop(name).after(outputs)

    return before, after


def _first_half(value: Any, batch: int) -> Any:
    """The unconditional part of a call's arguments: the first half of every tensor with as many entries as the batch."""
    if isinstance(value, Tensor):
        return value[: batch // 2] if value.ndim and len(value) == batch else value
    if isinstance(value, Mapping):
        return {key: _first_half(item, batch) for key, item in value.items()}
    return type(value)(_first_half(item, batch) for item in value) if isinstance(value, (tuple, list)) else value


SCALECRAFTER = Baseline("scalecrafter", "the target size from noise, convolutions dilated in the first steps", refusal, sample)
