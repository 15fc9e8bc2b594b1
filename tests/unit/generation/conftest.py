"""A tiny base, upsamplers for it, and settings that sample a handful of pictures in a second."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import NATIVE, saved_base

from selfcascade.bases import resolve_base
from selfcascade.cascade.upsampler import FeatureUpsampler
from selfcascade.config import CascadeSettings, GenerationSettings, PromptSettings
from selfcascade.generation.models import outline

PROMPTS = ("a red cat", "two blue dog", "a green apple on a house", "sun", "a blue house", "two cat")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    return saved_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="session")
def tiny_upsampler(tiny_base, tmp_path_factory) -> Path:
    """Variant A, its last convolutions moved off zero, so that it adds something."""
    resolved = resolve_base(str(tiny_base))
    torch.manual_seed(3)
    upsampler = FeatureUpsampler.for_base(outline(resolved)[0], variant="A", base=str(resolved))
    for parameter in upsampler.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("upsamplers") / "phi"
    upsampler.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


@pytest.fixture
def generation(tiny_base, prompt_file) -> GenerationSettings:
    """Six prompts at 4x in two chunks, four steps, guided, tuning-free."""
    return GenerationSettings(
        name="tiny",
        base=str(tiny_base),
        method="tuning-free",
        prompts=PromptSettings(file=prompt_file),
        cascade=CascadeSettings(height=2 * NATIVE, width=2 * NATIVE, steps=4, guidance_scale=3.0),
        chunk=4,
        batch=2,
    )
