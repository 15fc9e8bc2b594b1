"""What a call of the pipeline must satisfy; looked at before any network runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Generator, Tensor

from selfcascade.cascade.families import BaseSpec
from selfcascade.cascade.schedule import Size, check_size
from selfcascade.settings import SettingsError


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
    if batch < 1:
        raise SettingsError("num_images_per_prompt must be at least 1")
    if prompt is not None and negative_prompt is not None and len(negative_prompt) != len(prompt):
        raise SettingsError(f"{len(negative_prompt)} negative prompts for {len(prompt)} prompts; give one for all or one each")
    if len(generators) != batch:
        raise SettingsError(f"{len(generators)} generators for {batch} samples; give one for all or one each")
    if output_type not in ("pil", "np", "pt", "latent"):
        raise SettingsError(f"output_type={output_type!r} is not known; choose pil, np, pt or latent")


def check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape; None is fine."""
    if tensor is not None and tuple(tensor.shape) != shape:
        raise SettingsError(f"{name} has shape {tuple(tensor.shape)}, but this call needs {shape}")
