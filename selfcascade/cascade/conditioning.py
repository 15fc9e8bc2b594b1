"""What the UNet is told besides latent and timestep: the text of every sample, for SDXL also its pooled form and the size of the stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from selfcascade.cascade.families import Family
from selfcascade.cascade.schedule import Size


@dataclass(frozen=True)
class Conditioning:
    """Text of a batch; with guidance the unconditional half comes first."""

    text: Tensor
    """(B or 2 B, L, D)."""
    pooled: Tensor | None
    """SDXL's pooled text, (B or 2 B, P)."""

    def of_stage(self, size: Size) -> dict[str, Any]:
        """Keyword arguments of the UNet's forward for a stage of this height and width in pixels.

        SDXL's size ids follow the stage: original and target size are the stage's own, the crop begins at (0, 0).
        """
        if self.pooled is None:
            return {}
        ids = torch.tensor([[*size, 0, 0, *size]], dtype=self.text.dtype, device=self.text.device)
        return {"added_cond_kwargs": {"text_embeds": self.pooled, "time_ids": ids.expand(len(self.pooled), -1)}}


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
    """
    given: dict[str, Any] = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
    common = {"prompt": prompt, "device": pipeline._execution_device, "num_images_per_prompt": per_prompt, "do_classifier_free_guidance": guided}
    if family.size_ids:
        given |= {"pooled_prompt_embeds": pooled_prompt_embeds, "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds}
        text, negative, pooled, negative_pooled = StableDiffusionXLPipeline.encode_prompt(pipeline, negative_prompt=negative_prompt, **common, **given)
        return Conditioning(torch.cat([negative, text]), torch.cat([negative_pooled, pooled])) if guided else Conditioning(text, pooled)
    text, negative = StableDiffusionPipeline.encode_prompt(pipeline, negative_prompt=negative_prompt, **common, **given)
    return Conditioning(torch.cat([negative, text]) if guided else text, None)
