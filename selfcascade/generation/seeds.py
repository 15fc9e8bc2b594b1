"""A sample's identity: its key, its own seed, its own generator. Nothing here depends on order, batch or number of workers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfcascade.generation.prompt_list import Prompt
from selfcascade.settings import digest_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """Everything that tells one sample from another, before a single step is taken."""

    key: str
    prompt_id: str
    prompt: str
    negative_prompt: str
    index: int
    seed: int


def sample_seed(run_seed: int, prompt_id: str, index: int) -> int:
    """The first 63 bits of the SHA-256 of the canonical JSON of ``[run_seed, prompt_id, index]``."""
    return int(digest_of([run_seed, prompt_id, index])[:16], 16) >> 1


def sample_generator(seed: int) -> torch.Generator:
    """A CPU generator of the sample's own, so that the noise is the same on every device.

    Torch's CPU generator is a Mersenne twister that takes the low 32 bits of a seed: samples whose seeds agree there share their noise.
    """
    import torch  # planning needs the specs alone

    return torch.Generator("cpu").manual_seed(seed)


def sample_key(prompt_id: str, index: int) -> str:
    """The key of one sample of a prompt."""
    return f"{prompt_id}-{index:04d}"


def sample_spec(prompt: Prompt, index: int, *, run_seed: int, negative_prompt: str = "") -> SampleSpec:
    """One sample of a prompt.

    A prompt's own seed, where its file gives one, is taken literally: sample ``index`` of that prompt has ``seed + index`` (modulo 2^63), which is what
    ``torch.Generator().manual_seed(seed)`` gives by hand. A prompt's own negative prompt stands in for ``negative_prompt``.
    """
    negative = negative_prompt if prompt.negative_prompt is None else prompt.negative_prompt
    seed = sample_seed(run_seed, prompt.id, index) if prompt.seed is None else (prompt.seed + index) % 2**63
    return SampleSpec(key=sample_key(prompt.id, index), prompt_id=prompt.id, prompt=prompt.text, negative_prompt=negative, index=index, seed=seed)


def sample_specs(prompts: Iterable[Prompt], *, run_seed: int, per_prompt: int, negative_prompt: str = "") -> tuple[SampleSpec, ...]:
    """The samples of a run, sorted by key: ``per_prompt`` for each prompt, as :func:`sample_spec` makes them."""
    specs = [sample_spec(prompt, index, run_seed=run_seed, negative_prompt=negative_prompt) for prompt in prompts for index in range(per_prompt)]
    return tuple(sorted(specs, key=lambda spec: spec.key))
