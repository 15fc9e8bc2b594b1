from __future__ import annotations

import math

import pytest
import torch
from tiny_run import synthetic_latents, tiny_settings, tiny_trainer

from selfcascade.adaptation.cache import LatentCache
from selfcascade.adaptation.trainer import Trainer
from selfcascade.adaptation.training_run import TrainingRun
from selfcascade.adaptation.validation import TimestepBin, Validated, Validation, averaged_weights, bins_below, draws
from selfcascade.config import LatentUpscalerSettings, UpsamplerSettings


@pytest.fixture(scope="module")
def latents() -> LatentCache:
    return synthetic_latents(tune=6)


def trained(latents: LatentCache, steps: int = 3, **changes: object) -> Trainer:
    trainer = tiny_trainer(latents, tiny_settings("b", **changes))
    for _ in range(steps):
        trainer.advance()
    return trainer


def state(trainer: Trainer) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in trainer.state()[0].items()}


@pytest.mark.parametrize("below", [1, 3, 5, 7, 200, 700, 1000])
def test_bins_hold_every_timestep_once(below: int) -> None:
    bins = bins_below(below)
    assert [t for bin_ in bins for t in range(bin_.first, bin_.last + 1)] == list(range(below))
    assert len(bins) == min(5, below)
    assert len({(bin_.last - bin_.first) // max(1, below // 5) for bin_ in bins}) <= 2


def test_timesteps_stay_in_their_bin() -> None:
    """Of 300 pictures all are in it, both ends occur, and noise is standard normal."""
    noise, t = draws([f"k{index}" for index in range(300)], (4, 8, 8), TimestepBin(40, 49), 2)
    assert (t.min(), t.max()) == (40, 49)
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(noise.std()) == pytest.approx(1, abs=0.02)


def test_a_picture_has_its_own_noise(latents: LatentCache) -> None:
    """By key and bin alone: among others, in another order, it is the same; another picture's and another bin's are not."""
    bin_ = TimestepBin(0, 99)
    noise, t = draws(["a", "b"], (2, 3), bin_, 0)
    turned, turned_t = draws(["b", "c", "a"], (2, 3), bin_, 0)
    assert torch.equal(noise[0], turned[2])
    assert torch.equal(noise[1], turned[0])
    assert [t[0], t[1]] == [turned_t[2], turned_t[0]]
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise, draws(["a", "b"], (2, 3), bin_, 1)[0])


def test_a_base_that_is_not_changed_costs_what_it_costs_without(latents: LatentCache) -> None:
    """At step 0 every variant of the upsampler has the loss of the frozen base, in every bin, whatever seed and batch train it."""
    found = []
    for changes in ({}, {"upsampler": UpsamplerSettings(variant="C")}, {"seed": 5}, {"batch": 1}):
        validation = Validation(tiny_trainer(latents, tiny_settings("b", **changes)))
        assert validation.look()
        found.append(validation.rows[0])
    first = found[0]
    assert len(first.bins) == 5
    assert first.loss == pytest.approx(sum(first.bins) / 5)
    for other in found[1:]:
        assert other.bins == pytest.approx(first.bins, rel=1e-5)


def test_a_perfect_network_has_no_loss(latents: LatentCache) -> None:
    """One that knows the noise: the error is against the very noise and timestep that were put in."""
    trainer = tiny_trainer(latents, tiny_settings("b"))
    objective = trainer.objective

    def knows(z: torch.Tensor, t: torch.Tensor, batch: object, conditioning: object) -> torch.Tensor:
        signal = objective.alphas_cumprod[t].view(-1, 1, 1, 1)
        clean = batch.target  # type: ignore[attr-defined]
        return (z - signal.sqrt() * clean) / (1 - signal).sqrt()

    objective.predicted = knows
    validation = Validation(trainer)
    validation.look()
    assert max(validation.rows[0].bins) < 1e-6


def test_it_looks_at_the_moving_average(latents: LatentCache) -> None:
    """Inside, the weights are those that would be published; afterwards those that train, the very tensors of the optimizer."""
    trainer = trained(latents)
    before = {name: (parameter.data_ptr(), parameter.detach().clone()) for name, parameter in trainer.trainable}
    average = {name: value.clone() for name, value in trainer.average.values.items()}
    with averaged_weights(trainer):
        for name, parameter in trainer.trainable:
            assert torch.equal(parameter, average[name])
        assert not trainer.trained.training
    assert trainer.trained.training
    for name, parameter in trainer.trainable:
        assert (parameter.data_ptr(), True) == (before[name][0], torch.equal(parameter, before[name][1]))
        assert torch.equal(trainer.average.values[name], average[name])
    validation = Validation(trainer)
    validation.look()
    averaged = tiny_trainer(latents, trainer.settings)
    averaged.trained.load_state_dict(trainer.averaged().state_dict())
    averaged.average.values = {name: parameter.detach().clone() for name, parameter in averaged.trainable}
    other = Validation(averaged)
    other.look()
    assert other.rows[0].bins == validation.rows[0].bins


@pytest.mark.parametrize("kind", ["upsampler", "latent-upscaler"])
def test_training_is_the_same_with_it_and_without(latents: LatentCache, kind: str) -> None:
    """Weights, moving average, optimizer, random numbers and log have the same bits, with a validation after every step and with none."""
    settings = {"trainable": kind, "upscaler": LatentUpscalerSettings(width=8, blocks=1)}
    plain = trained(latents, **settings)
    watched = tiny_trainer(latents, tiny_settings("b", **settings))
    validation = Validation(watched)
    for _ in range(3):
        watched.advance()
        torch.manual_seed(0)
        before = torch.get_rng_state()
        validation.look()
        assert torch.equal(torch.get_rng_state(), before)
    mine, theirs = state(plain), state(watched)
    mine.pop("random/torch"), theirs.pop("random/torch")
    assert mine == theirs
    assert [row.step for row in validation.rows] == [1, 2, 3]
    assert all(math.isfinite(row.loss) and len(row.bins) == (5 if kind == "upsampler" else 0) for row in validation.rows)


def test_when_it_is_due(latents: LatentCache) -> None:
    """Every so many steps and after the last, once each; never where the split is empty or it is off."""
    trainer = tiny_trainer(latents, tiny_settings("b", validation_steps=2, steps=5))
    validation = Validation(trainer)
    due = []
    for step in range(6):
        trainer.step = step
        due.append(validation.due)
        if validation.due:
            validation.rows.append(Validated(step, 1.0, ()))
            assert not validation.due
    assert due == [False, False, True, False, True, True]
    trainer.step = 2
    for other in (tiny_trainer(latents, tiny_settings("b", validation_steps=None)), tiny_trainer(synthetic_latents(tune=0), tiny_settings("b"))):
        other.step = 6
        assert not Validation(other).due


def test_pictures_are_spread_over_the_split(latents: LatentCache) -> None:
    assert Validation(tiny_trainer(latents, tiny_settings("b", validation_samples=3))).keys == ["s08", "s10", "s12"]


def test_one_that_is_told_to_leave_leaves_no_row(latents: LatentCache) -> None:
    trainer = trained(latents, 1)
    before = state(trainer)
    validation = Validation(trainer)
    asked = iter([False, False, True])
    assert not validation.look(stop=lambda: next(asked))
    assert validation.rows == []
    assert state(trainer) == before


def test_it_comes_back_with_the_checkpoint(latents: LatentCache) -> None:
    for rows in ([], [Validated(2, 0.5, (0.1, 0.2, 0.3, 0.4, 1.5)), Validated(4, 0.25, (0.1, 0.2, 0.3, 0.4, 0.25))]):
        validation = Validation(tiny_trainer(latents, tiny_settings("b")))
        validation.rows = list(rows)
        other = Validation(tiny_trainer(latents, tiny_settings("b")))
        other.restore(validation.state())
        assert other.rows == rows


def losses(run: TrainingRun, values: list[float]) -> list[tuple[int, bool]]:
    """Advance and pretend to validate with these losses; steps and whether it is over."""
    found = []
    for value in values:
        run.trainer.advance()
        run.validation.rows.append(Validated(run.trainer.step, value, ()))
        run.early_stop.take()
        found.append((run.early_stop.step, run.early_stop.stopped))
        if run.early_stop.stopped:
            break
    return found


def test_it_stops_after_so_many_without_a_better_one(latents: LatentCache) -> None:
    """Patience 2: an equal loss is no better one; the best step's moving average is what is published, not the last's."""
    run = TrainingRun(tiny_trainer(latents, tiny_settings("b", early_stop=2, validation_steps=1, steps=9)))
    averages = []

    def taken() -> None:
        averages.append({name: value.clone() for name, value in run.trainer.average.values.items()})

    advance = run.trainer.advance
    run.trainer.advance = lambda: (advance(), taken())  # type: ignore[method-assign,assign,func-returns-value]
    assert losses(run, [3.0, 2.0, 2.5, 1.0, 1.0, 4.0, 0.5]) == [(1, False), (2, False), (2, False), (4, False), (4, False), (4, True)]
    assert run.over
    published = dict(run.early_stop.published().named_parameters())
    assert all(torch.equal(published[name], value) for name, value in averages[3].items())
    assert not all(torch.equal(published[name], value) for name, value in averages[5].items())


def test_what_is_best_comes_back_with_the_checkpoint(latents: LatentCache) -> None:
    """A run restored after the best validation stops where the undisturbed one does and publishes the same weights."""
    settings = tiny_settings("b", early_stop=2, validation_steps=1, steps=9)
    whole = TrainingRun(tiny_trainer(latents, settings))
    losses(whole, [3.0, 2.0, 2.5])
    tensors, record = whole.state()
    resumed = TrainingRun(tiny_trainer(latents, settings))
    resumed.trainer.restore(tensors, record)
    resumed.validation.restore(tensors)
    resumed.early_stop.restore(tensors)
    assert losses(resumed, [2.1]) == losses(whole, [2.1]) == [(2, True)]
    mine, theirs = dict(resumed.early_stop.published().named_parameters()), dict(whole.early_stop.published().named_parameters())
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_without_patience_the_last_step_is_published(latents: LatentCache) -> None:
    run = TrainingRun(tiny_trainer(latents, tiny_settings("b", validation_steps=1, steps=9)))
    assert losses(run, [1.0, 2.0, 3.0]) == [(1, False), (2, False), (3, False)]
    assert run.early_stop.state() == {}


def test_stopping_without_looking_is_refused() -> None:
    with pytest.raises(ValueError, match="early_stop is set but validation_steps is not"):
        tiny_settings("b", early_stop=2, validation_steps=None)
