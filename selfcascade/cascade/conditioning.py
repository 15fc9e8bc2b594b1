"""What the UNet is told besides latent and timestep: the text of every sample, for SDXL also its pooled form and the size of the stage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers
from torch import Tensor

from selfcascade.cascade.families import Family
from selfcascade.cascade.schedule import Size

_LOCK = RLock()
"""Held while text is encoded: fast tokenizers keep the padding of the call under way, so that of two threads one would get the other's."""


@dataclass(frozen=True)
class Conditioning:
    """Text of a batch; with guidance the unconditional half comes first."""

    text: Tensor
    """(B or 2 B, L, D)."""
    pooled: Tensor | None
    """SDXL's pooled text, (B or 2 B, P)."""
    images: list[Tensor] | None = None
    """Embedded image prompts, one an IP-Adapter, (B or 2 B, N, D)."""
    attention: dict[str, Any] | None = None
    """``cross_attention_kwargs`` of the UNet: a LoRA's scale, an IP-Adapter's masks."""

    def of_stage(self, size: Size) -> dict[str, Any]:
        """Keyword arguments of the UNet's forward for a stage of this height and width in pixels.

        SDXL's size ids follow the stage: original and target size are the stage's own, the crop begins at (0, 0).
        """
        added: dict[str, Any] = {} if self.images is None else {"image_embeds": self.images}
        if self.pooled is not None:
            ids = torch.tensor([[*size, 0, 0, *size]], dtype=self.text.dtype, device=self.text.device)
            added |= {"text_embeds": self.pooled, "time_ids": ids.expand(len(self.pooled), -1)}
        given = {"added_cond_kwargs": added or None, "cross_attention_kwargs": self.attention}
        return {name: value for name, value in given.items() if value is not None}


def encode(
    pipeline: DiffusionPipeline,
    family: Family,
    *,
    prompt: list[str] | None,
    negative_prompt: list[str] | None,
    per_prompt: int,
    guided: bool,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    pooled_prompt_embeds: Tensor | None = None,
    negative_pooled_prompt_embeds: Tensor | None = None,
    image_embeds: list[Tensor] | None = None,
    attention: dict[str, Any] | None = None,
) -> Conditioning:
    """Text of every sample, prompt by prompt, encoded by the stock pipeline of the family, so that textual inversions and long prompts behave as they do there.

    Args:
        pipeline: holds tokenizers and text encoders under their stock names.
        family: of the base.
        prompt: one a prompt, or None with ``prompt_embeds``, (P, L, D).
        negative_prompt: what guidance steers away from, one a prompt; None is the family's own "nothing".
        per_prompt: samples of each prompt.
        guided: whether the unconditional half is needed.
        prompt_embeds: and the following, in place of text.
        negative_prompt_embeds: (P, L, D).
        pooled_prompt_embeds: SDXL, (P, W).
        negative_pooled_prompt_embeds: SDXL, (P, W).
        image_embeds: one an IP-Adapter, (1 or B, N, D), with guidance (2 or 2 B, N, D), the unconditional half first.
        attention: ``cross_attention_kwargs`` of the UNet; a LoRA's ``scale`` among them holds for the text encoders too.
    """
    device = pipeline._execution_device
    given: dict[str, Any] = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
    common = {"prompt": prompt, "device": device, "num_images_per_prompt": per_prompt, "do_classifier_free_guidance": guided}
    stock = StableDiffusionXLPipeline if family.size_ids else StableDiffusionPipeline
    if family.size_ids:
        given |= {"pooled_prompt_embeds": pooled_prompt_embeds, "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds}
    with _LOCK, _lora_scaled((pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)), scale=(attention or {}).get("scale", 1.0)):
        halves = stock.encode_prompt(pipeline, negative_prompt=negative_prompt, **common, **given)
    # text, its negative, and of SDXL the same of the pooled text
    text, *pooled = (torch.cat([negative, positive]) if guided else positive for positive, negative in zip(halves[::2], halves[1::2], strict=True))
    images = None if image_embeds is None else [_of_every_sample(embeds.to(device), guided, batch=len(halves[0])) for embeds in image_embeds]
    return Conditioning(text, pooled[0] if pooled else None, images, attention)


def _of_every_sample(embeds: Tensor, guided: bool, *, batch: int) -> Tensor:
    """Embeddings, (1 or B, N, D) or with guidance (2 or 2 B, N, D), as (B or 2 B, N, D)."""
    return torch.cat([half.expand(batch, *half.shape[1:]) for half in (embeds.chunk(2) if guided else [embeds])])


@contextmanager
def _lora_scaled(encoders: Iterable[Any], *, scale: float) -> Iterator[None]:
    """The encoders with their LoRAs at that scale, which diffusers leaves scaled where encoding fails."""
    if scale == 1.0 or not USE_PEFT_BACKEND:
        yield
        return
    present = [encoder for encoder in encoders if encoder is not None]
    for encoder in present:
        scale_lora_layers(encoder, scale)
    try:
        yield
    finally:
        for encoder in present:
            unscale_lora_layers(encoder, scale)
