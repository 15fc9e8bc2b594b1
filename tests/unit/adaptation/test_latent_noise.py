"""Latents that are drawn anew in each step: of the right distribution, the same however a step is cut or interrupted, and nothing where it is not asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_adapt import _interrupt_at
from tiny_run import synthetic_latents, tiny_settings, tiny_trainer

from selfcascade import SelfCascadePipeline
from selfcascade.adaptation.adapt import adapt
from selfcascade.adaptation.cache import Batch, Encoder, Recipe
from selfcascade.adaptation.latent_noise import LatentNoise
from selfcascade.bases import load_pipeline, resolve_base
from selfcascade.cascade.conditioning import Conditioning
from selfcascade.config import AdaptationSettings
from selfcascade.settings import SettingsError
from selfcascade.storage import Store, resolve

ROWS = 4000


def batch(count: int) -> Batch:
    """Latents of mean 3 and -2, with standard deviations of 0.5 and 0.2."""
    target, pivot = torch.full((count, 2, 4, 4), 3.0), torch.full((count, 2, 2, 2), -2.0)
    return Batch(target, pivot, Conditioning(torch.zeros(count, 1, 1), None), torch.full_like(target, 0.5), torch.full_like(pivot, 0.2))


def noised(noise: LatentNoise, count: int = ROWS) -> tuple[Batch, Batch]:
    before = batch(count)
    return before, noise.on(before, noise.draw((count, 2, 4, 4), torch.Generator().manual_seed(0)))


def test_latents_are_draws_of_the_posterior() -> None:
    """Mean and deviation of many draws, within five standard errors; each element by itself."""
    _, drawn = noised(LatentNoise(posterior=True, share=0.0, std=0.1))
    for tensor, mean, std in ((drawn.target, 3.0, 0.5), (drawn.pivot, -2.0, 0.2)):
        assert (tensor.mean(0) - mean).abs().max() < 5 * std / ROWS**0.5
        assert (tensor.std(0) - std).abs().max() < 5 * std / (2 * ROWS) ** 0.5
        correlated = torch.corrcoef(tensor.flatten(1).T) - torch.eye(tensor[0].numel())
        assert correlated.abs().max() < 5 / ROWS**0.5


def test_a_share_of_the_pivots_is_noised_and_nothing_else() -> None:
    before, drawn = noised(LatentNoise(posterior=False, share=0.25, std=0.1))
    assert torch.equal(drawn.target, before.target)
    chosen = (drawn.pivot != before.pivot).flatten(1).any(1)
    assert abs(float(chosen.float().mean()) - 0.25) < 5 * (0.25 * 0.75 / ROWS) ** 0.5
    added = (drawn.pivot - before.pivot)[chosen]
    assert abs(float(added.std()) - 0.1) < 5 * 0.1 / (2 * added.numel()) ** 0.5


def test_without_it_nothing_is_drawn() -> None:
    """Neither from the run's generator, so that runs of before are what they were, nor on the latents."""
    noise = LatentNoise.of(AdaptationSettings())
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    assert noise.draw((4, 2, 4, 4), generator) == ()
    assert torch.equal(generator.get_state(), state)
    assert noise.on(before := batch(2), ()) is before


def test_settings_of_before_keep_their_address() -> None:
    assert not {"posterior", "noisy_pivots", "pivot_noise"} & AdaptationSettings().what().keys()
    assert AdaptationSettings(noisy_pivots=0.5).digest() != AdaptationSettings().digest() != AdaptationSettings(posterior="sample").digest()


def test_the_deviation_is_the_autoencoders(tiny_base: Path) -> None:
    """Scaled as the mean is, which is the same with and without it; the recipe has another address."""
    base = resolve_base(str(tiny_base))
    recipe = Recipe.here(base=base.version, size=128, device="cpu")
    sampled = replace(recipe, posterior="sample")
    picture = torch.randint(0, 256, (128, 128, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    plain, kept = (Encoder(SelfCascadePipeline.from_pipe(load_pipeline(base)), each).latents(picture) for each in (recipe, sampled))
    assert sampled.digest != recipe.digest
    assert plain.keys() == {"target", "pivot"}
    assert kept.keys() == {"target", "pivot", "target_std", "pivot_std"}
    assert all(torch.equal(plain[name], kept[name]) for name in plain)
    vae = load_pipeline(base).vae
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        logvar = vae.quant_conv(vae.encoder(pixels)).chunk(2, 1)[1] if vae.quant_conv is not None else vae.encoder(pixels).chunk(2, 1)[1]
    expected = (0.5 * logvar.clamp(-30, 20)).exp()[0] * vae.config.scaling_factor
    torch.testing.assert_close(kept["target_std"], expected, rtol=1e-4, atol=1e-6)


def test_a_step_is_the_same_however_it_is_cut() -> None:
    """Noise is drawn for the whole step: two parts have the gradient of one, to float tolerance."""
    gradients = []
    for accumulation in (1, 2):
        settings = tiny_settings("tiny", noisy_pivots=0.5, pivot_noise=1.0, accumulation=accumulation)
        trainer = tiny_trainer(synthetic_latents(), settings)
        trainer._gradient()
        gradients.append(torch.cat([p.grad.flatten() for _, p in trainer.trainable if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6 * float(gradients[0].abs().max()))


@pytest.mark.parametrize("trainable", ["upsampler", "latent-upscaler"])
def test_an_interrupted_run_has_the_bytes_of_one_that_was_not(fresh: Callable[[], Store], tiny_base: Path, trainable: str) -> None:
    settings = tiny_settings(tiny_base, trainable=trainable, posterior="sample", noisy_pivots=0.5)
    whole, interrupted = fresh(), fresh()
    adapt(settings, whole)
    with pytest.raises(KeyboardInterrupt):
        adapt(settings, interrupted, progress=_interrupt_at(3))
    adapt(settings, interrupted)
    place = "upscalers" if trainable == "latent-upscaler" else "upsamplers"
    assert published(interrupted, place) == published(whole, place)
    if trainable == "upsampler":
        plain = fresh()
        adapt(tiny_settings(tiny_base), plain)
        assert published(plain, place) != published(whole, place)


def published(store: Store, place: str) -> bytes:
    """The manifest, which holds the SHA-256 of every object."""
    return store.read(resolve(store, f"{place}/tiny").ref.prefix + "/manifest.json")


def test_pivots_of_what_has_none_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"noisy_pivots=0\.5 is about pivots, which have no part in trainable=lora; set it to 0"):
        AdaptationSettings.from_tree({"trainable": "lora", "noisy_pivots": 0.5})
