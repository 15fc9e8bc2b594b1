"""Training in float16: the loss is scaled, steps whose gradient overflows are left out. On a CPU the same logic runs, slowly; only the command refuses it."""

from __future__ import annotations

import math

import pytest
import torch
from test_trainer import state, weights
from tiny_run import synthetic_latents, tiny_settings, tiny_trainer

from selfcascade.adaptation.cache import LatentCache
from selfcascade.adaptation.trainer import Diverged, Trainer
from selfcascade.config import ComputeSettings, UpsamplerSettings

HALF = ComputeSettings(dtype="float16", threads=1)


@pytest.fixture(scope="module")
def latents() -> LatentCache:
    return synthetic_latents()


def half_trainer(latents: LatentCache, *, scale: float = 2.0**12) -> Trainer:
    """Variant C in float16, at a scale at which the tiny base's gradients fit."""
    trainer = tiny_trainer(latents, tiny_settings("b", upsampler=UpsamplerSettings(variant="C"), compute=HALF))
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": scale})
    return trainer


def overflowing(trainer: Trainer) -> torch.utils.hooks.RemovableHandle:
    """Gradients of one weight are infinite until the handle is removed."""
    return trainer.trainable[0][1].register_hook(lambda gradient: gradient + math.inf)


def test_loss_and_gradient_are_those_of_float32(latents: LatentCache) -> None:
    """Within 2 percent, whatever the scale: it is taken off before clipping and before the log. Weights and averages stay in float32."""
    plain = tiny_trainer(latents, tiny_settings("b", upsampler=UpsamplerSettings(variant="C")))
    plain.advance()
    for scale in (2.0**8, 2.0**12):
        trainer = half_trainer(latents, scale=scale)
        trainer.advance()
        assert trainer.log()[0] == pytest.approx(plain.log()[0], rel=0.02)
        tensors, _ = trainer.state()
        assert {tensor.dtype for name, tensor in tensors.items() if name.startswith(("weights/", "ema/", "optimizer/"))} == {torch.float32}
    assert trainer.objective.unet.dtype == torch.float16


def test_a_step_that_overflows_moves_nothing_and_halves_the_scale(latents: LatentCache) -> None:
    """It is logged with its infinite norm, and the next one steps."""
    trainer = half_trainer(latents)
    before = weights(trainer.trained)
    handle = overflowing(trainer)
    trainer.advance()
    assert weights(trainer.trained) == before
    assert trainer.scaler.get_scale() == 2.0**11
    handle.remove()
    trainer.advance()
    assert weights(trainer.trained) != before
    assert [math.isfinite(norm) for _, _, norm in trainer.log()] == [False, True]


def test_gradients_that_fit_at_no_scale_stop_the_run(latents: LatentCache) -> None:
    """Once the scale is below 1, by name of the step, every time it is asked; before that the steps count as left out."""
    trainer = half_trainer(latents, scale=2.0)
    overflowing(trainer)
    trainer.advance()
    assert len(trainer.log()) == 1
    trainer.advance()
    for _ in range(2):
        with pytest.raises(Diverged, match=r"stopped at step 2: .* norm of its gradient (inf|nan); .*float32"):
            trainer.state()


def test_a_loss_that_is_no_number_stops_the_run_at_any_scale(latents: LatentCache) -> None:
    trainer = half_trainer(latents)
    with torch.no_grad():
        trainer.trainable[0][1].fill_(float("nan"))
    trainer.advance()
    with pytest.raises(Diverged, match="stopped at step 1: its loss is nan"):
        trainer.log()


def test_the_scale_is_part_of_the_state(latents: LatentCache) -> None:
    """Restored after a step that was left out, training ends with the same bits and the same scale."""
    whole = half_trainer(latents)
    handle = overflowing(whole)
    whole.advance()
    handle.remove()
    whole.advance()
    tensors, record = whole.state()
    resumed = half_trainer(latents, scale=2.0**16)
    resumed.restore({name: tensor.clone() for name, tensor in tensors.items()}, record)
    for trainer in (whole, resumed):
        trainer.advance()
    assert state(resumed) == state(whole)
    assert resumed.scaler.get_scale() == 2.0**11


def test_other_precisions_have_no_scale(latents: LatentCache) -> None:
    trainer = tiny_trainer(latents, tiny_settings("b"))
    assert not trainer.scaler.is_enabled()
    assert trainer.state()[1]["scaler"] == {}
