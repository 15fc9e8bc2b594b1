"""Base and latent super-resolution: the base's own latent, enlarged stage by stage, decoded; no further diffusion."""

from __future__ import annotations

import models
import pytest
import torch

from selfcascade import SelfCascadePipeline
from selfcascade.baselines import latent_sr
from selfcascade.cascade.decoding import decode
from selfcascade.cascade.latent_upscaler import LatentUpscaler
from selfcascade.settings import SettingsError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipeline() -> SelfCascadePipeline:
    """With a latent upscaler that adds something."""
    upscaler = LatentUpscaler(4, width=4, blocks=1)
    for parameter in upscaler.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=seeded(parameter.numel()))
    made = SelfCascadePipeline.from_pipe(models.base("small"), latent_upscaler=upscaler)
    made.set_progress_bar_config(disable=True)
    return made


@torch.no_grad()
def test_it_is_the_bases_latent_enlarged_and_decoded(pipeline, monkeypatch):
    """To 160x224 over 128x192, bit for bit; with the latent given the UNet does not run at all."""
    call = {"num_inference_steps": 2, "generator": seeded()}
    sizes = pipeline.sizes(192, 320)
    assert len(sizes) == 3
    base = pipeline("a red cat", sizes=sizes[:1], output_type="latent", num_inference_steps=2, generator=seeded()).images
    z = base
    for height, width in sizes[1:]:
        z = pipeline.latent_upscaler(z, (height // 8, width // 8))
    whole = latent_sr.sample(pipeline, "a red cat", height=192, width=320, output_type="latent", **call).images
    assert torch.equal(whole, z)
    monkeypatch.setattr(pipeline.unet, "forward", lambda *_, **__: pytest.fail("diffusion above the base"))
    pictures = latent_sr.sample(pipeline, height=192, width=320, base=base, output_type="pt").images
    torch.testing.assert_close(pictures, (decode(pipeline.vae, z) / 2 + 0.5).clamp(0, 1))


def test_at_the_bases_own_size_it_is_the_base(pipeline):
    base = torch.randn(1, 4, 8, 8, generator=seeded(1))
    assert torch.equal(latent_sr.sample(pipeline, height=64, width=64, base=base, output_type="latent", return_dict=False)[0], base)


def test_without_a_latent_upscaler_it_is_refused():
    with pytest.raises(SettingsError, match=r"^method 'latent-sr' needs a latent upscaler; set generation\.upscaler"):
        latent_sr.sample(SelfCascadePipeline.from_pipe(models.base("small")), "a cat", height=128, width=128)
