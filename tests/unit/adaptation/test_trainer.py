from __future__ import annotations

import hashlib

import models
import pytest
import torch
from tiny_run import synthetic_latents, tiny_settings, tiny_trainer

from selfcascade.adaptation.cache import LatentCache
from selfcascade.adaptation.optimizer import learning_rate
from selfcascade.adaptation.trainer import Diverged, Trainer
from selfcascade.config import UpsamplerSettings

A, C = UpsamplerSettings(variant="A"), UpsamplerSettings(variant="C")


@pytest.fixture(scope="module")
def latents() -> LatentCache:
    return synthetic_latents()


def weights(module: torch.nn.Module) -> dict[str, bytes]:
    return {name: hashlib.sha256(tensor.numpy().tobytes()).digest() for name, tensor in module.state_dict().items()}


def state(trainer: Trainer) -> tuple[dict[str, bytes], dict[str, object]]:
    tensors, record = trainer.state()
    return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}, record


@pytest.mark.parametrize("upsampler", [A, C, UpsamplerSettings(inject="main"), UpsamplerSettings(pivot_t="zero"), UpsamplerSettings(final="gate")], ids=str)
def test_only_the_upsampler_moves(latents: LatentCache, upsampler: UpsamplerSettings) -> None:
    """After three steps every weight of the base has the bytes it had and no gradient; the upsampler has changed."""
    trainer = tiny_trainer(latents, tiny_settings("b", upsampler=upsampler))
    base, phi = weights(trainer.objective.unet), weights(trainer.trained)
    for _ in range(3):
        trainer.advance()
    assert weights(trainer.objective.unet) == base
    assert all(parameter.grad is None for parameter in trainer.objective.unet.parameters())
    assert weights(trainer.trained) != phi


def test_first_step_of_variant_c_moves_only_gamma(latents: LatentCache) -> None:
    """What multiplies Gamma = 0 has no gradient yet, and decay does not touch it; from the second step on all of it moves."""
    trainer = tiny_trainer(latents, tiny_settings("b", upsampler=C, weight_decay=0.5))
    before = weights(trainer.trained)
    trainer.advance()
    after = weights(trainer.trained)
    assert {name.rsplit(".")[-1] for name in before if before[name] != after[name]} == {"gamma"}
    trainer.advance()
    second = weights(trainer.trained)
    assert {name.rsplit(".")[-1] for name in before if after[name] != second[name]} == {"gamma", "kernels", "scale", "offset"}


def test_the_first_loss_is_that_of_the_frozen_base(latents: LatentCache) -> None:
    """An upsampler that starts at zero costs what the base costs without it."""
    losses = []
    for upsampler in (A, C, UpsamplerSettings(inject="main")):
        trainer = tiny_trainer(latents, tiny_settings("b", upsampler=upsampler))
        trainer.advance()
        losses.append(trainer.log()[0][0])
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("upsampler", [A, C], ids=["A", "C"])
def test_loss_decreases_on_one_fixed_batch(upsampler: UpsamplerSettings) -> None:
    """The same four samples, timesteps and noise in every step: it falls from step to step, and by half a percent in all."""
    trainer = tiny_trainer(synthetic_latents(train=4), tiny_settings("b", upsampler=upsampler, lr=3e-3, caption_dropout=0.0, seed=3))
    start = trainer.generator.get_state()
    trainer.order.batch = lambda position, count: ["s00", "s01", "s02", "s03"]  # type: ignore[method-assign]
    for _ in range(12):
        trainer.generator.set_state(start)
        trainer.advance()
    losses = [row[0] for row in trainer.log()]
    print(losses)
    assert losses[-1] < losses[0] * 0.995


OPTIONS: dict[str, dict[str, object]] = {
    "A": {"upsampler": A},
    "C": {"upsampler": C},
    "cosine-parts-weighted": {"schedule": "cosine", "accumulation": 2, "snr_gamma": 5.0, "timesteps": "stratified"},
    "linear-main-recomputed": {"schedule": "linear", "upsampler": UpsamplerSettings(inject="main"), "gradient_checkpointing": True},
}


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)
def test_interrupted_equals_uninterrupted(latents: LatentCache, changes: dict[str, object]) -> None:
    """Restored into fresh objects after the first step or the third, with torch's own generator disturbed, training ends with the same state."""
    settings = tiny_settings("b", steps=4, **changes)
    whole = tiny_trainer(latents, settings)
    saved = []
    for _ in range(settings.steps):
        tensors, record = whole.state()
        saved.append(({name: tensor.clone() for name, tensor in tensors.items()}, record))
        whole.advance()
    for tensors, record in saved[1::2]:
        torch.rand(3)
        resumed = tiny_trainer(latents, settings)
        resumed.restore(tensors, record)
        while resumed.step < settings.steps:
            resumed.advance()
        resumed_state, whole_state = state(resumed), state(whole)
        resumed_state[0].pop("random/torch"), whole_state[0].pop("random/torch")
        assert resumed_state == whole_state


def test_the_weighted_loss_is_that_of_one_sample(latents: LatentCache) -> None:
    """A batch of one costs its weight, min(SNR, 2) / SNR at its own timestep, times what it costs unweighted."""
    seen: list[torch.Tensor] = []
    losses = []
    for gamma in (None, 2.0):
        trainer = tiny_trainer(latents, tiny_settings("b", batch=1, seed=5, snr_gamma=gamma))
        seen.append(trainer.objective.draw((1, *latents.shape("s00")), torch.Generator().manual_seed(5))[0])
        trainer.advance()
        losses.append(trainer.log()[0][0])
    abar = trainer.objective.alphas_cumprod[seen[0]].item()
    snr = abar / (1 - abar)
    assert torch.equal(*seen)
    assert snr > 2
    assert losses[1] == pytest.approx(losses[0] * 2 / snr, rel=1e-5)


def test_strata_are_those_of_the_whole_step(latents: LatentCache) -> None:
    """With 4 samples in 2 parts, the UNet sees a timestep in every quarter of [0, 700) in each step."""
    trainer = tiny_trainer(latents, tiny_settings("b", batch=4, accumulation=2, timesteps="stratified", upsampler=UpsamplerSettings(pivot_t="zero")))
    seen: list[int] = []
    trainer.objective.unet.register_forward_pre_hook(lambda _, args: seen.extend(args[1].tolist()) if args[0].shape[-1] == 16 else None)
    for step in range(3):
        trainer.advance()
        assert sorted(t // 175 for t in seen[4 * step :]) == [0, 1, 2, 3]


def test_nothing_draws_from_torchs_own_generator(latents: LatentCache) -> None:
    """A step leaves the global generator alone, so that whatever else a process does cannot change a run."""
    trainer = tiny_trainer(latents, tiny_settings("b"))
    before = torch.get_rng_state()
    trainer.advance()
    assert torch.equal(torch.get_rng_state(), before)


def test_captions_are_dropped_at_their_rate(latents: LatentCache) -> None:
    """The UNet sees the empty caption in a share of 0.3 of 2,000 samples, within 3 standard deviations; otherwise the sample's own."""
    trainer = tiny_trainer(latents, tiny_settings("b", caption_dropout=0.3, batch=8))
    own = {latents.batch([key]).text.text[0].numpy().tobytes() for key in latents.keys("train")}
    empty = latents.empty().text[0].numpy().tobytes()
    seen: list[bytes] = []

    def unet(self: object, z: torch.Tensor, t: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor]:
        seen.extend(text.numpy().tobytes() for text in encoder_hidden_states)
        raise _Seen

    trainer.objective.unet.forward = unet.__get__(trainer.objective.unet)  # type: ignore[method-assign]
    for _ in range(250):
        with pytest.raises(_Seen):
            trainer.advance()
    assert set(seen) == own | {empty}
    assert abs(seen.count(empty) / len(seen) - 0.3) < 3 * (0.3 * 0.7 / len(seen)) ** 0.5


class _Seen(Exception):
    pass


def test_the_learning_rate_is_the_schedules(latents: LatentCache) -> None:
    """What the optimizer steps with and the log holds is the schedule's rate of that step, after a restart too; at a rate of zero nothing moves."""
    settings = tiny_settings("b", steps=4, lr=1e-3, warmup=2, schedule="cosine")
    trainer = tiny_trainer(latents, settings)
    for step in range(3):
        trainer.advance()
        assert trainer.optimizer.param_groups[0]["lr"] == learning_rate(step, settings)
    resumed = tiny_trainer(latents, settings)
    resumed.restore(*trainer.state())
    before = weights(resumed.trained)
    resumed.advance()
    assert weights(resumed.trained) == before
    assert [row[1] for row in resumed.log()] == pytest.approx([learning_rate(step, settings) for step in range(4)])


@pytest.mark.parametrize("poisoned", [2, 3])
def test_a_loss_that_is_no_number_stops_with_the_step_named(latents: LatentCache, poisoned: int) -> None:
    """The message names the step and the way out, and no state of it can be taken."""
    trainer = tiny_trainer(latents, tiny_settings("b"))
    for step in range(1, 4):
        if step == poisoned:
            with torch.no_grad():
                next(trainer.trained.parameters()).fill_(float("nan"))
        trainer.advance()
    for _ in range(2):
        with pytest.raises(Diverged, match=rf"stopped at step {poisoned}: its loss is nan.*lower adaptation\.lr"):
            trainer.state()


def test_bfloat16_trains_float32_weights(latents: LatentCache) -> None:
    """The base computes in bfloat16; weights, moving average and optimizer of the upsampler stay in float32; the loss is near that of float32."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        settings = tiny_settings("b").model_copy(update={"compute": tiny_settings("b").compute.model_copy(update={"dtype": dtype})})
        trainer = tiny_trainer(latents, settings)
        for _ in range(2):
            trainer.advance()
        tensors, _ = trainer.state()
        assert {tensor.dtype for name, tensor in tensors.items() if name.startswith(("weights/", "ema/", "optimizer/"))} == {torch.float32}
        losses[dtype] = trainer.log()[0][0]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    assert models.base().unet.dtype == torch.float32
