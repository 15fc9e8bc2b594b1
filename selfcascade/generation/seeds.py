"""A sample's identity: its key, its own seed, its own generator. Nothing here depends on order, batch or number of workers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfcascade.generation.prompts import Prompt
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


def sample_specs(prompts: Iterable[Prompt], *, run_seed: int, per_prompt: int, negative_prompt: str = "") -> tuple[SampleSpec, ...]:
    """The samples of a run, sorted by key: ``per_prompt`` for each prompt.

    A prompt's own seed, where its file gives one, is taken literally: sample ``index`` of that prompt has ``seed + index`` (modulo 2^63), which is what
    ``torch.Generator().manual_seed(seed)`` gives by hand. A prompt's own negative prompt stands in for ``negative_prompt``.
    """
    specs = []
    for prompt in prompts:
        negative = negative_prompt if prompt.negative_prompt is None else prompt.negative_prompt
        for index in range(per_prompt):
            seed = sample_seed(run_seed, prompt.id, index) if prompt.seed is None else (prompt.seed + index) % 2**63
            specs.append(SampleSpec(key=f"{prompt.id}-{index:04d}", prompt_id=prompt.id, prompt=prompt.text, negative_prompt=negative, index=index, seed=seed))
    return tuple(sorted(specs, key=lambda spec: spec.key))
