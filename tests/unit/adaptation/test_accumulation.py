"""A step whose samples pass in parts, one after another or on several devices, is the step of the whole batch."""

from __future__ import annotations

import pytest
import torch
from test_latent_training import upscaler_settings
from tiny_run import synthetic_latents, tiny_settings, tiny_trainer

from selfcascade.adaptation.cache import LatentCache
from selfcascade.adaptation.trainer import Trainer
from selfcascade.adaptation.validation import Validation
from selfcascade.config import AdaptationSettings, UpsamplerSettings

KINDS = {
    "paper": tiny_settings("b", batch=8),
    "weighted": tiny_settings("b", batch=8, upsampler=UpsamplerSettings(variant="B", inject="main", final="identity"), snr_gamma=5.0, timesteps="stratified"),
    "latent-upscaler": upscaler_settings("b", batch=8),
}
SETTINGS = pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)


@pytest.fixture(scope="module")
def latents() -> LatentCache:
    return synthetic_latents(train=9)


def gradient(trainer: Trainer) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of the next step."""
    loss = trainer._gradient()
    return loss, torch.cat([parameter.grad.flatten() for _, parameter in trainer.trainable])


@SETTINGS
def test_parts_make_the_step_of_the_whole_batch(latents: LatentCache, settings: AdaptationSettings) -> None:
    """The loss and every gradient of 8 samples in 2, 4 or 8 parts, or in unequal ones: to float tolerance those of one part, and the same draws."""
    whole = tiny_trainer(latents, settings)
    loss, expected = gradient(whole)
    cut = [tiny_trainer(latents, settings.model_copy(update={"accumulation": count})) for count in (2, 4, 8)]
    uneven = tiny_trainer(latents, settings)
    uneven.parts = [slice(0, 3), slice(3, 8)]
    for trainer in (*cut, uneven):
        found, parts = gradient(trainer)
        torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(parts, expected, rtol=1e-3, atol=4e-6 * float(expected.abs().max()) + 1e-9)
        assert torch.equal(trainer.generator.get_state(), whole.generator.get_state())


def test_parts_elsewhere_add_up(latents: LatentCache) -> None:
    """Two trainers with a half of the parts each: the sums of their losses and gradients are those of one trainer with all of them."""
    settings = KINDS["paper"]
    loss, expected = gradient(tiny_trainer(latents, settings))
    halves = []
    for rank in range(2):
        trainer = tiny_trainer(latents, settings.model_copy(update={"accumulation": 4}))
        trainer.parts = trainer.parts[rank::2]
        halves.append(gradient(trainer))
    torch.testing.assert_close(halves[0][0] + halves[1][0], loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(halves[0][1] + halves[1][1], expected, rtol=1e-3, atol=1e-6 * float(expected.abs().max()))


def test_a_step_is_logged_once_and_moves_on_by_its_batch(latents: LatentCache) -> None:
    """The UNet sees 2 samples at a time; after two steps the position is 16 and the log has two rows, those of undivided steps to float tolerance."""
    settings = tiny_settings("b", batch=8, lr=1e-4)
    seen: list[int] = []
    logs = []
    for accumulation in (1, 4):
        trainer = tiny_trainer(latents, settings.model_copy(update={"accumulation": accumulation}))
        unet = trainer.objective.unet
        unet.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])) if args[0].shape[-1] == 16 else None)
        for _ in range(2):
            trainer.advance()
        logs.append(trainer.log())
        assert (trainer.step, trainer.position, len(trainer.log())) == (2, 16, 2)
    assert seen == [8, 8] + [2] * 8
    for row, whole in zip(logs[1], logs[0], strict=True):
        assert row == pytest.approx(whole, rel=1e-3)


def test_a_validation_passes_no_more_samples_at_once_than_training() -> None:
    """Four pictures of the tune split with two samples a part, in five bins: to float tolerance the loss of passing all four."""
    losses = []
    for accumulation in (1, 2):
        trainer = tiny_trainer(synthetic_latents(tune=4), tiny_settings("b", accumulation=accumulation))
        seen: list[int] = []
        trainer.objective.unet.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(len(args[0])) if args[0].shape[-1] == 16 else None)
        validation = Validation(trainer)
        validation.look()
        losses.append(validation.rows[0].loss)
        assert seen == [4 // accumulation] * 5 * accumulation
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
