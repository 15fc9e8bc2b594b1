"""Noise of the samples: who draws what, and in which order, so that a sample is the same whatever its batch holds and whichever stages were cached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor


@dataclass(frozen=True)
class StageNoise:
    """All randomness of one stage of a batch."""

    entry: Tensor
    """Standard normal that the stage starts from, (B, C, h, w), for video (B, C, F, h, w), fp32."""
    generators: list[Generator]
    """One a sample, for what the scheduler draws at its steps (DDIM's eta, ancestral samplers)."""


def draw_noise(generators: Sequence[Generator | None], channels: int, sizes: Sequence[tuple[int, ...]], device: torch.device) -> list[StageNoise]:
    """Noise of every stage for every sample, each from the sample's own generator.

    The order is part of the contract. A sample draws, for stage 0, 1, ..., R in turn, the stage's entry noise, fp32, (1, C, h, w), and one integer that
    seeds the stage's step noise; it does so whether or not the stage will be sampled. Hence the base does not depend on the target above it, a stage that
    starts from a cached pivot gets the noise that it would have got, and the first draw is the one that diffusers' own pipelines make.

    Args:
        generators: one a sample, usually on the CPU; None draws from torch's default. One generator listed twice draws for its samples in turn.
        channels: of the latent.
        sizes: latent height and width of every stage, for video frames, height and width.
        device: where the noise is needed.
    """
    entries: list[list[Tensor]] = [[] for _ in sizes]
    steppers: list[list[Generator]] = [[] for _ in sizes]
    for generator in generators:
        where = torch.device("cpu") if generator is None else generator.device
        for stage, size in enumerate(sizes):
            entries[stage].append(torch.randn(1, channels, *size, generator=generator, device=where, dtype=torch.float32))
            seed = torch.randint(2**63 - 1, (1,), generator=generator, device=where).item()
            steppers[stage].append(Generator(where).manual_seed(int(seed)))
    return [StageNoise(torch.cat(entry).to(device), stepper) for entry, stepper in zip(entries, steppers, strict=True)]
