"""Preview pictures: the same few prompts and seeds, out of the tune split, while a network trains and when it is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray

from selfcascade.adaptation.cache import LatentCache
from selfcascade.adaptation.objective import Trained
from selfcascade.baselines.lora import Lora
from selfcascade.cascade.decoding import decode
from selfcascade.cascade.latent_upscaler import LatentUpscaler
from selfcascade.cascade.pipeline import SelfCascadePipeline
from selfcascade.cascade.pivot import bilinear
from selfcascade.config import AdaptationSettings
from selfcascade.generation.prompts import prompts_of_rows
from selfcascade.generation.seeds import SampleSpec, sample_generator, sample_specs
from selfcascade.generation.sheet import contact_sheet

Picture = NDArray[np.uint8]
HEADINGS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {"upsampler": ("tuning-free", "tuned"), "latent-upscaler": ("bilinear", "learned"), "lora": ("direct", "lora"), "full": ("direct", "full")}
)
"""What the previews are called without and with what is trained."""


def preview_specs(latents: LatentCache, settings: AdaptationSettings) -> list[SampleSpec]:
    """Prompts and seeds of the previews: captions of the tune split, of known words where there are such, spread evenly over their keys."""
    rows = [{"key": key, "caption": latents.caption(key), "split": split, "kept": True} for split in ("train", "tune") for key in latents.keys(split)]
    found = [*prompts_of_rows(lambda: rows, split="tune", known_words=True)] or prompts_of_rows(lambda: rows, split="tune", known_words=False)
    prompts = sorted(found, key=lambda prompt: prompt.id)
    count = min(settings.previews, len(prompts))
    chosen = [prompts[index * len(prompts) // count] for index in range(count)]
    return list(sample_specs(chosen, run_seed=settings.seed, per_prompt=1))


class Previewer:
    """Draws the previews with a base and what was trained so far. The pictures of the base are sampled once.

    A feature upsampler is shown by the cascade with it and without it. A latent upscaler is shown alone: its enlargement of the base's latent and the
    bilinear one, both decoded without a further step of diffusion, which would hide most of the difference. A tuned UNet is shown by direct sampling at the
    target size, as the base is beside it.
    """

    def __init__(self, pipeline: SelfCascadePipeline, specs: Sequence[SampleSpec], settings: AdaptationSettings) -> None:
        """Draw ``specs`` with the networks of ``pipeline``, in whatever precision they are."""
        self.pipe = pipeline
        self.pipe.set_progress_bar_config(disable=True)
        self.specs = list(specs)
        self.settings = settings
        self._pivots: list[torch.Tensor] = []
        self._untuned: list[Picture] = []

    def base(self) -> list[Picture]:
        """What the base draws, at its own size."""
        return [_picture(decode(self.pipe.vae, pivot)) for pivot in self._bases()]

    def untuned(self) -> list[Picture]:
        """What the base's pictures become without anything trained."""
        if not self._untuned:
            self._untuned = self._enlarge(None) if self.settings.trainable == "latent-upscaler" else self._draw(self.pipe)
        return self._untuned

    def tuned(self, trained: Trained) -> list[Picture]:
        """What they become with ``trained``."""
        if isinstance(trained, LatentUpscaler):
            return self._enlarge(trained)
        if isinstance(trained, Lora):
            return self._draw(SelfCascadePipeline.from_pipe(self.pipe, unet=trained.added_to(self.pipe.unet)))
        if isinstance(trained, UNet2DConditionModel):
            return self._draw(SelfCascadePipeline.from_pipe(self.pipe, unet=trained.to(self.pipe.unet.device, self.pipe.unet.dtype)))
        return self._draw(SelfCascadePipeline.from_pipe(self.pipe, upsampler=trained))

    def columns(self, trained: Trained) -> dict[str, list[Picture]]:
        """All of it by heading."""
        return {"base": self.base(), self.without: self.untuned(), HEADINGS[self.settings.trainable][1]: self.tuned(trained)}

    def sheet(self, trained: Trained, *, step: int) -> bytes:
        """PNG of the previews without anything trained and with ``trained`` as it is after ``step`` steps."""
        columns = {self.without: self.untuned(), f"step {step}": self.tuned(trained)}
        return preview_sheet(columns, self.specs, size=self.settings.size)

    @property
    def without(self) -> str:
        """What it is called when nothing trained is used."""
        return HEADINGS[self.settings.trainable][0]

    @torch.no_grad()
    def _enlarge(self, upscaler: LatentUpscaler | None) -> list[Picture]:
        grown = [(upscaler or bilinear)(pivot, (2 * pivot.shape[-2], 2 * pivot.shape[-1])) for pivot in self._bases()]
        return [_picture(decode(self.pipe.vae, latent)) for latent in grown]

    def _draw(self, pipe: SelfCascadePipeline) -> list[Picture]:
        pipe.set_progress_bar_config(disable=True)
        size = self.settings.size
        if self.settings.trainable in ("lora", "full"):
            latents = [self._sample(pipe, spec, sizes=[(size, size)]) for spec in self.specs]
        else:
            latents = [self._sample(pipe, spec, height=size, width=size, pivot=pivot) for spec, pivot in zip(self.specs, self._bases(), strict=True)]
        return [_picture(decode(pipe.vae, latent)) for latent in latents]

    def _bases(self) -> list[torch.Tensor]:
        if not self._pivots:
            size = self.settings.size
            self._pivots = [self._sample(self.pipe, spec, sizes=self.pipe.sizes(size, size)[:1]) for spec in self.specs]
        return self._pivots

    def _sample(self, pipe: SelfCascadePipeline, spec: SampleSpec, **arguments: Any) -> torch.Tensor:
        """Clean latent of one sample, (1, C, h, w); one at a time, so that a preview needs no more memory than a step."""
        settings = self.settings
        with torch.autocast(pipe.unet.device.type, pipe.unet.dtype, enabled=pipe.unet.dtype != torch.float32):
            images: torch.Tensor = pipe(
                spec.prompt,
                start=settings.start,
                guidance_scale=settings.preview_guidance,
                generator=sample_generator(spec.seed),
                output_type="latent",
                return_dict=False,
                **arguments,
            )[0]
        return images


def preview_sheet(columns: dict[str, list[Picture]], specs: Sequence[SampleSpec], *, size: int) -> bytes:
    """PNG with a row for each preview and a column for each entry of ``columns``; pictures at most ``size`` pixels a side."""
    return contact_sheet(columns, [spec.prompt for spec in specs], cell=min(size, 256))


def _picture(pixels: torch.Tensor) -> Picture:
    """(1, 3, H, W) in [-1, 1] to (H, W, 3) uint8."""
    scaled = ((pixels[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return scaled.permute(1, 2, 0).cpu().numpy()
