"""Pivot guidance: an unmodified UNet whose features are joined by those of the pivot (paper section 4.2, equations 7 and 8).

Hooks on the encoder's blocks read and add features. They hold nothing: what belongs to one forward pass (pivot, timestep, upsampler) travels in a
context variable, which every thread has for itself, so threads may share a UNet. Without a pass under way a hook does nothing, and after the ``with``
block of :func:`attached` there is none.

A text-to-video UNet folds the F frames of a latent (B, C, F, h, w) into its batch, so that its feature maps, time embeddings and texts are those of B * F
pictures, sample by sample and frame by frame. Features go from pivot to latent in that order: every frame is joined by its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import ModelMixin
from torch import Tensor

from selfcascade.cascade.families import BaseSpec, Inject, Tap, spec_of
from selfcascade.cascade.hooks import SharedHooks
from selfcascade.cascade.upsampler import FeatureUpsampler

Features = tuple[Tensor, ...]

RESIDUALS = ("down_block_additional_residuals", "mid_block_additional_residual", "down_intrablock_additional_residuals")
"""What ControlNets and T2I adapters add inside the UNet, in its forward's words: as large as the latent, so not for the pivot."""


@dataclass
class _Pass:
    """One forward pass of one UNet: which features it visits, and what is done there."""

    unet: ModelMixin
    taps: tuple[Tap, ...]
    visit: Callable[[int, Tensor, Tensor], Tensor | None]
    """Takes the tap's number, the feature map and the time embedding; returns the map that replaces it, or None."""
    residuals: bool = True
    """Whether the UNet is given what ControlNets add."""
    visited: int = 0


class _EncoderDone(Exception):
    """Leaves the UNet's own forward once the last feature of the pivot is read: its decoder has no use for the pivot."""


_PASS: ContextVar[_Pass | None] = ContextVar("selfcascade_pass", default=None)
_SPECS: WeakKeyDictionary[ModelMixin, BaseSpec] = WeakKeyDictionary()
"""Of the UNets that have hooks, read whenever these come: no pass has to look at the networks again."""


def attached(unet: ModelMixin) -> AbstractContextManager[None]:
    """Hooks on the UNet's encoder for the time of a ``with`` block. Blocks nest, also across threads: the last one out removes the hooks.

    The passes below attach for themselves. Attach around a loop of passes to spare the upkeep, and around all use of a compiled UNet: ``torch.compile``
    does not see hooks that come after it.
    """
    return _HOOKS.on(_bare(unet))


def pivot_features(
    unet: ModelMixin, pivot: Tensor, t: Tensor | float, encoder_hidden_states: Tensor, *, inject: Inject = "skip", **conditioning: Any
) -> Features:
    """Feature maps ``h_{n,0}`` of the clean pivot (equation 7): the UNet's encoder alone, without gradients.

    Args:
        unet: the frozen UNet, in any state the user put it in (LoRA, offload, compiled).
        pivot: clean latent of the stage below, (B, C, h, w), for video (B, C, F, h, w), scaled.
        t: timestep at which the pivot passes, a scalar or (B,): the current one, or 0.
        encoder_hidden_states: text, (B, L, D).
        inject: where features are read.
        conditioning: whatever else the UNet's forward takes, such as SDXL's ``added_cond_kwargs``. A ControlNet's residuals are left out, also those that a
            hook of the user's gives: they have the latent's size, and would join the skips and the mid block after these were read. So are a T2I adapter's,
            which Phi did not see in training.

    Returns:
        Four maps from shallow to deep, (B, C_n, h_n, w_n), for video (B, F, C_n, h_n, w_n).
    """
    features: list[Tensor] = []

    def read(level: int, feature: Tensor, emb: Tensor) -> None:
        features.append(feature.reshape(len(pivot), *_frames(pivot), *feature.shape[1:]))
        if level == len(this.taps) - 1:
            raise _EncoderDone

    with attached(unet), torch.no_grad(), suppress(_EncoderDone):
        this = _Pass(_bare(unet), _SPECS[_bare(unet)].taps(inject), read, residuals=False)
        _run(this, unet, pivot, t, encoder_hidden_states, conditioning)
    return tuple(features)


def unet_with_pivot(
    unet: ModelMixin,
    z: Tensor,
    t: Tensor | float,
    encoder_hidden_states: Tensor,
    *,
    upsampler: FeatureUpsampler,
    pivot: Tensor | None = None,
    features: Features | None = None,
    strength: float = 1.0,
    **conditioning: Any,
) -> Tensor:
    """The UNet's prediction with the pivot's features added to its own, ``h_n + phi_n(h_{n,0}, t)`` (equation 8).

    In training, freeze the UNet (``requires_grad_(False)``): autograd then records nothing before the first feature is added, so with ``inject="skip"``
    the encoder runs without a graph, and with ``inject="main"`` the blocks up to the first tap do.

    Args:
        unet: the frozen UNet, in any state the user put it in (LoRA, offload, compiled).
        z: noisy latent, (B, C, H, W), for video (B, C, F, H, W), as the scheduler scales it for the model.
        t: timestep, a scalar or (B,).
        encoder_hidden_states: text, (B, L, D).
        upsampler: Phi; says where it adds and at which timestep the pivot passes.
        pivot: clean latent of the stage below, (B, C, h, w), for video (B, C, F, h, w): as many as there are latents in z, the branches of guidance included.
        features: of that pivot by :func:`pivot_features`, to spare its pass where they are known already.
        strength: factor on what is added.
        conditioning: whatever else the UNet's forward takes, such as SDXL's ``added_cond_kwargs``.

    Returns:
        The UNet's output, of z's shape: noise or velocity, as the base predicts.

    Raises:
        ValueError: neither pivot nor features are given, or they are not as many as there are latents, or frames, in z.
    """
    with attached(unet):
        if features is None:
            if pivot is None:
                raise ValueError("unet_with_pivot needs the pivot or its features")
            pivot_t = t if upsampler.config.pivot_t == "current" else 0
            features = pivot_features(unet, pivot, pivot_t, encoder_hidden_states, inject=upsampler.config.inject, **conditioning)
        if len(features[0]) != len(z):
            raise ValueError(f"the pivot has batch {len(features[0])} but the latent {len(z)}: repeat the pivot for every branch of guidance")
        frames = _frames(z)
        if features[0].shape[1:-3] != frames:
            raise ValueError(f"the pivot has {_count(features[0].shape[1:-3])} but the latent {_count(frames)}: a cascade grows in space alone")
        timesteps = torch.as_tensor(t, device=z.device).expand(len(z)).repeat_interleave(frames.numel())

        def add(level: int, feature: Tensor, emb: Tensor) -> Tensor:
            phi = upsampler(level, features[level].flatten(0, -4), t=timesteps, emb=emb, size=feature.shape[-2:])
            return feature + (strength * phi).to(feature.dtype)

        return _run(_Pass(_bare(unet), _SPECS[_bare(unet)].taps(upsampler.config.inject), add), unet, z, t, encoder_hidden_states, conditioning)


def _run(this: _Pass, unet: ModelMixin, z: Tensor, t: Tensor | float, text: Tensor, conditioning: dict[str, Any]) -> Tensor:
    """The attached UNet's own forward with ``this`` pass under way."""
    token = _PASS.set(this)
    try:
        output: Tensor = unet(z, t, encoder_hidden_states=text, return_dict=False, **conditioning)[0]
    finally:
        _PASS.reset(token)
    if this.visited != len(this.taps):
        raise RuntimeError(
            f"the UNet passed {this.visited} of {len(this.taps)} tap points; if it is compiled, attach before compiling: with attached(unet): ..."
        )
    return output


def _hook_all(unet: ModelMixin) -> list[Any]:
    _SPECS[unet] = spec = spec_of(unet)
    modules = sorted({tap.module for tap in (*spec.skip_taps, *spec.main_taps)})
    taps = [unet.get_submodule(module).register_forward_hook(_hook(unet, module), with_kwargs=True) for module in modules]
    return [unet.register_forward_pre_hook(_without_residuals, with_kwargs=True), *taps]


@torch.compiler.disable
def _without_residuals(unet: ModelMixin, args: tuple[Any, ...], kwargs: Mapping[str, Any] = {}) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Comes after the hooks that the user had put on the UNet before."""
    this = _PASS.get()
    if this is None or this.unet is not unet or this.residuals:
        return None
    return args, {name: value for name, value in kwargs.items() if name not in RESIDUALS}


def _hook(unet: ModelMixin, module: str) -> Callable[..., Any]:
    @torch.compiler.disable  # the surroundings compile; what a pass does here may differ from call to call
    def hook(block: torch.nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        this = _PASS.get()
        if this is None or this.unet is not unet:
            return None
        kwargs, output = rest
        for level, tap in enumerate(this.taps):
            if tap.module == module:
                output = _visit(this, level, tap, output, kwargs["temb"] if "temb" in kwargs else args[1])
        return output

    return hook


_HOOKS = SharedHooks(_hook_all)


def _visit(this: _Pass, level: int, tap: Tap, output: Any, emb: Tensor) -> Any:
    """A block's output after the visit. A down block returns its main path and its skips, the mid block its main path alone."""
    this.visited += 1
    if tap.module == "mid_block":
        replaced = this.visit(level, output, emb)
        return output if replaced is None else replaced
    main, skips = output
    replaced = this.visit(level, main if tap.skip is None else skips[tap.skip], emb)
    if replaced is None:
        return output
    if tap.skip is None:
        return replaced, skips
    return main, (*skips[: tap.skip], replaced, *skips[tap.skip + 1 :])


def _frames(latent: Tensor) -> torch.Size:
    """(F,) of a video, () of a picture: what the UNet folds into its batch."""
    return latent.shape[2:-2]


def _count(frames: torch.Size) -> str:
    return f"{frames[0]} frames" if frames else "no frames"


def _bare(unet: ModelMixin) -> ModelMixin:
    return getattr(unet, "_orig_mod", unet)  # torch.compile wraps
