"""Attention scaling: self-attention as sharp over many tokens as it was over the tokens of training (Attn-SF, arXiv 2306.08645)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import log, sqrt
from typing import Any

from diffusers import ImagePipelineOutput, UNet2DConditionModel
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from torch import Tensor

from selfcascade.baselines import direct
from selfcascade.baselines.baseline import Baseline, pixel_ratio
from selfcascade.baselines.hooks import Hooks
from selfcascade.cascade.families import BaseSpec
from selfcascade.cascade.pipeline import SelfCascadePipeline
from selfcascade.config import BaselineSettings
from selfcascade.settings import SettingsError


def attention_factor(tokens: int, ratio: float) -> float:
    """``sqrt(log N_test / log N_train)``, by which the logits of a self-attention layer grow; N_train is ``tokens / ratio``.

    512 -> 1024 pixels of SD 2.1 (ratio 4) gives 1.0801 for the 128 x 128 tokens of its first level, 1.0954, 1.1180 and 1.1547 below.

    Args:
        tokens: N_test, those of the layer.
        ratio: pixels of the picture over pixels of training.

    Raises:
        SettingsError: the layer had a single token in training, whose attention has no sharpness to keep.
    """
    trained = tokens / ratio
    if trained <= 1:
        raise SettingsError(
            f"attention scaling needs layers with more than one token in training; {tokens} tokens at {ratio:g} times the pixels leave {trained:g}"
        )
    return sqrt(log(tokens) / log(trained))


@contextmanager
def scaled_attention(unet: UNet2DConditionModel, ratio: float) -> Iterator[None]:
    """Scaled self-attention in every call of the UNet that this thread makes inside the ``with`` block; cross-attention stays as it is.

    The factor goes onto the queries, and so onto the logits, whichever attention processor is set. Blocks nest: the innermost ratio counts.

    Args:
        unet: any diffusers UNet, in a cascade or in a stock pipeline.
        ratio: pixels of the picture over pixels of training: 4 for 512 -> 1024.

    Raises:
        SettingsError: the ratio is not positive, the UNet is compiled, or its projections are fused.
    """
    if not ratio > 0:
        raise SettingsError(f"ratio={ratio} must be positive: pixels of the picture over pixels of training")
    if any(getattr(attention, "fused_projections", False) for attention in _self_attentions(unet)):
        raise SettingsError("this UNet's attention projections are fused, so that queries cannot be scaled; call unfuse_qkv_projections() first")
    with _HOOKS.on(unet, ratio):
        yield


def sample(
    pipeline: SelfCascadePipeline,
    prompt: str | list[str] | None = None,
    *,
    height: int,
    width: int,
    settings: BaselineSettings = BaselineSettings(),
    **call: Any,
) -> ImagePipelineOutput:
    """Pictures of that size in a single stage with scaled self-attention, arguments as in :mod:`~.baseline`.

    Raises:
        SettingsError: the base has a level too small to scale (:func:`refusal`); or as the pipeline's call.
    """
    reason = refusal(pipeline.spec, height, width, settings)
    if reason is not None:
        raise SettingsError(f"attention-scaling does not apply: {reason}")
    with scaled_attention(pipeline.unet, pixel_ratio(pipeline.spec, height, width)):
        return direct.sample(pipeline, prompt, height=height, width=width, **{"eta": settings.eta} | call)


def refusal(spec: BaseSpec, height: int, width: int, settings: BaselineSettings) -> str | None:
    """Why there is no factor for the deepest level, or None."""
    side = spec.pixels * spec.latent_step
    tokens = spec.native[0] * spec.native[1] / side**2
    return None if tokens > 1 else f"the base's deepest level has {tokens:g} tokens at its own size, whose attention has no sharpness to keep"


def _self_attentions(unet: Any) -> list[Any]:
    """All of one picture's tokens; those of a video's frames, over time, are as many as in training."""
    temporal = tuple(f"{name}." for name, module in unet.named_modules() if isinstance(module, TransformerTemporalModel))
    return [module for name, module in unet.named_modules() if name.rpartition(".")[2] == "attn1" and not name.startswith(temporal)]


def _hook_all(unet: Any) -> list[Any]:
    return [attention.to_q.register_forward_hook(_hook(unet)) for attention in _self_attentions(unet)]


def _hook(unet: Any) -> Any:
    def hook(to_q: Any, args: Any, queries: Tensor) -> Tensor | None:
        ratio = _HOOKS.state(unet)
        return None if ratio is None else queries * attention_factor(queries.shape[1], ratio)

    return hook


_HOOKS: Hooks[float] = Hooks("attention_scaling", _hook_all)

ATTENTION_SCALING = Baseline("attention-scaling", "the target size from noise, self-attention scaled by the layer's tokens", refusal, sample)
