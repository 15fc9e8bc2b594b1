"""What a call of the pipeline must satisfy; looked at before any network runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from numbers import Integral
from typing import Any

from diffusers import ModelMixin
from torch import Generator, Tensor

from selfcascade.cascade.control import Control
from selfcascade.cascade.families import BaseSpec
from selfcascade.cascade.schedule import Size, check_size
from selfcascade.settings import SettingsError

CALLBACK_INPUTS = ("latents", "prompt_embeds")
"""Tensors that a callback may see and change."""


def check_kinds(
    *,
    pixels: Mapping[str, object],
    sizes: object,
    texts: Mapping[str, object],
    num_images_per_prompt: object,
    generator: object,
    tensors: Mapping[str, object],
    callback: object,
    callback_inputs: Sequence[str],
    attention: object,
) -> None:
    """Refuse values that are not even of the kind that the call takes."""
    for name, side in pixels.items():
        if not isinstance(side, Integral | None):
            raise SettingsError(f"{name}={side!r} must be a whole number of pixels")
    for size in sizes if isinstance(sizes, Sequence) else []:
        if not (isinstance(size, Sequence) and len(size) == 2 and all(isinstance(side, Integral) for side in size)):
            raise SettingsError(f"sizes holds {size!r}; give pairs of height and width in whole pixels")
    for name, text in texts.items():
        if not isinstance(text, list | None):
            raise SettingsError(f"{name}={text!r} is no text; give a text or a list of texts")
        for one in text or []:
            if not isinstance(one, str):
                raise SettingsError(f"{name} holds {one!r}; give a text or a list of texts")
    if not isinstance(num_images_per_prompt, Integral) or num_images_per_prompt < 1:
        raise SettingsError(f"num_images_per_prompt={num_images_per_prompt} must be a whole number, at least 1")
    for one in generator if isinstance(generator, list) else [generator]:
        if not isinstance(one, Generator | None):
            raise SettingsError(f"generator is a {type(one).__name__}; give a torch.Generator, or a list of one a sample")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor | None):
            raise SettingsError(f"{name} is a {type(tensor).__name__}; give a tensor")
    if callback is not None and not callable(callback):
        raise SettingsError(f"callback_on_step_end is a {type(callback).__name__}; give a function")
    strange = [name for name in callback_inputs if name not in CALLBACK_INPUTS]
    if strange:
        raise SettingsError(f"callback_on_step_end_tensor_inputs names {', '.join(strange)}; choose of {', '.join(CALLBACK_INPUTS)}")
    if not isinstance(attention, dict | None):
        raise SettingsError(f"cross_attention_kwargs={attention!r} must be a dictionary, such as {{'scale': 0.5}}")


def as_texts(text: Any) -> list[str] | None:
    """One text as a list of one; a list, or what :func:`check_kinds` refuses, as it is."""
    return [text] if isinstance(text, str) else list(text) if isinstance(text, tuple) else text


def count_prompts(prompt: list[str] | None, embeds: Tensor | None) -> int:
    """How many prompts there are, in words or as embeddings (P, L, D)."""
    given = [len(prompts) for prompts in (prompt, embeds) if prompts is not None]
    if len(given) != 1 or given[0] == 0:
        raise SettingsError("give at least one prompt, either as prompt or as prompt_embeds")
    return given[0]


def stage_above(pivot: Tensor, latent_sizes: Sequence[Size]) -> int:
    """The stage that starts from a pivot of that size."""
    size = tuple(pivot.shape[-2:])
    if size not in latent_sizes[:-1]:
        raise SettingsError(
            f"pivot has latent size {size[0]}x{size[1]}, but the stages below the target have {', '.join(f'{h}x{w}' for h, w in latent_sizes[:-1]) or 'none'}"
        )
    return latent_sizes.index(size) + 1


def check_call(
    spec: BaseSpec,
    sizes: Sequence[Size],
    batch: int,
    prompt: list[str] | None,
    negative_prompt: list[str] | None,
    generators: Sequence[Generator | None],
    output_type: str,
    given: dict[str, object],
) -> None:
    """Refuse sizes, counts and names that the call cannot serve."""
    for height, width in sizes:
        check_size(height, width, step=spec.step)
    if not sizes or any(above[0] < below[0] or above[1] < below[1] for below, above in pairwise(sizes)):
        raise SettingsError(f"sizes {list(sizes)} must hold at least one stage, and no stage may be smaller than the one below")
    starts = [name for name in ("pivot", "image") if given[name] is not None]
    if len(starts) > 1:
        raise SettingsError("give a pivot or an image to start from, not both")
    if spec.family.frames is not None and given["image"] is not None:
        raise SettingsError("image starts a picture, but this base makes videos; give the clean latents of a video as pivot")
    if prompt is not None and negative_prompt is not None and len(negative_prompt) != len(prompt):
        raise SettingsError(f"{len(negative_prompt)} negative prompts for {len(prompt)} prompts; give one for all or one each")
    if len(generators) != batch:
        raise SettingsError(f"{len(generators)} generators for {batch} samples; give one for all or one each")
    if output_type not in ("pil", "np", "pt", "latent"):
        raise SettingsError(f"output_type={output_type!r} is not known; choose pil, np, pt or latent")


def check_image_prompts(unet: ModelMixin, embeds: list[Tensor] | None, batch: int, *, guided: bool) -> None:
    """Refuse image prompts without an IP-Adapter, an IP-Adapter without them, and embeddings, (1 or B, N, D) a half, of another count."""
    unet = getattr(unet, "_orig_mod", unet)  # torch.compile wraps
    adapters = len(getattr(getattr(unet, "encoder_hid_proj", None), "image_projection_layers", ()))
    given = 0 if embeds is None else len(embeds)
    if given != adapters:
        raise SettingsError(
            f"ip_adapter_image_embeds has {given} embeddings, but this UNet has {adapters} IP-Adapters; give one each, "
            "by the prepare_ip_adapter_image_embeds of the pipeline that loaded them, or call its unload_ip_adapter()"
        )
    halves = 2 if guided else 1
    for embedding in embeds or []:
        if embedding.ndim not in (3, 4) or len(embedding) not in (halves, halves * batch):
            raise SettingsError(
                f"an embedding of ip_adapter_image_embeds has shape {tuple(embedding.shape)}, but this call needs {halves} or {halves * batch} in its batch"
                f"{', the unconditional half first' if guided else ' (no guidance)'}"
            )


def check_residuals(unet: ModelMixin, residuals: object, batch: int) -> None:
    """Refuse residuals that are no function, and a :class:`~.control.Control` that does not fit."""
    if isinstance(residuals, Control):
        residuals.check(getattr(unet, "_orig_mod", unet), batch)
    elif residuals is not None and not callable(residuals):
        raise SettingsError(
            f"residuals is a {type(residuals).__name__}; every stage and step has its own, so give a Control (selfcascade.cascade.control) or a function"
        )


def check_text(
    spec: BaseSpec,
    unet: ModelMixin,
    negative_prompt: list[str] | None,
    embeds: Mapping[str, Tensor | None],
    *,
    prompts: int,
) -> None:
    """Refuse embeddings of another shape than (P, L, D), and those of SDXL without the pooled ones, (P, W)."""
    if negative_prompt is not None and embeds["negative_prompt_embeds"] is not None:
        raise SettingsError("give negative_prompt or negative_prompt_embeds, not both")
    width = getattr(unet, "_orig_mod", unet).config["cross_attention_dim"]
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        text = embeds[name]
        if text is not None and (text.ndim != 3 or len(text) != prompts or (isinstance(width, int) and text.shape[-1] != width)):
            raise SettingsError(f"{name} has shape {tuple(text.shape)}, but this call needs ({prompts}, tokens, {width})")
        pooled = name.replace("prompt", "pooled_prompt")
        if spec.family.size_ids and (text is None) != (embeds[pooled] is None):
            raise SettingsError(f"SDXL needs {name} and {pooled} together; its encode_prompt makes both")
    if embeds["prompt_embeds"] is not None:
        check_shape("negative_prompt_embeds", embeds["negative_prompt_embeds"], tuple(embeds["prompt_embeds"].shape))


def check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape; None is fine."""
    if tensor is not None and tuple(tensor.shape) != shape:
        raise SettingsError(f"{name} has shape {tuple(tensor.shape)}, but this call needs {shape}")
