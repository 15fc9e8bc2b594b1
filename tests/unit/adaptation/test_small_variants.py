"""Training of the upsamplers with few parameters: variant D's basis, no decay, what the first step moves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_adapt import bytes_of
from tiny_run import synthetic_latents, tiny_settings, tiny_trainer

from selfcascade.adaptation import adapt as stage
from selfcascade.adaptation.adapt import TrainingStep, adapt
from selfcascade.adaptation.basis import fit_basis
from selfcascade.adaptation.cache import LatentCache
from selfcascade.adaptation.trainer import Trainer
from selfcascade.cascade.injection import pivot_features
from selfcascade.cascade.upsampler import load_upsampler
from selfcascade.config import UpsamplerSettings
from selfcascade.storage import Artifact, Store

D = UpsamplerSettings(variant="D")


@pytest.fixture(scope="module")
def latents() -> LatentCache:
    return synthetic_latents()


def fitted(latents: LatentCache, **changes: object) -> list[torch.Tensor]:
    trainer = tiny_trainer(latents, tiny_settings("b", **({"upsampler": D} | changes)))
    fit_basis(trainer.objective, latents)
    return [level.basis for level in trainer.trained.levels]


@pytest.mark.parametrize("inject", ["skip", "main"])
def test_the_basis_is_the_first_singular_vectors_of_pivot_features(latents: LatentCache, inject: str) -> None:
    """Of the whole train split where that has fewer pictures than are asked for, each passed by itself at t = 0; the tune split stays unread."""
    upsampler = UpsamplerSettings(variant="D", inject=inject, pivot_t="zero")
    trainer = tiny_trainer(latents, tiny_settings("b", upsampler=upsampler))
    batch = latents.batch(latents.keys("train"))
    features = pivot_features(trainer.objective.unet, batch.pivot, 0, batch.text.text, inject=inject)
    for found, feature in zip(fitted(latents, upsampler=upsampler), features, strict=True):
        rows = feature.double().permute(0, 2, 3, 1).reshape(-1, feature.shape[1])
        expected = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[:4].T.float()
        torch.testing.assert_close(found, expected * (found * expected).sum(0).sign(), atol=1e-4, rtol=1e-4)


def test_the_basis_follows_the_seed_alone(latents: LatentCache) -> None:
    """Twice the same bits, whatever torch's own generator did; another seed draws other pictures and timesteps, another pivot time other features."""
    first = fitted(latents, basis_samples=3)
    torch.rand(5)
    before = torch.get_rng_state()
    again = fitted_after(latents, before)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    for changes in ({"seed": 1}, {"basis_samples": 4}, {"upsampler": UpsamplerSettings(variant="D", pivot_t="zero")}):
        other = fitted(latents, **{"basis_samples": 3} | changes)
        assert not any(torch.equal(one, other) for one, other in zip(first, other, strict=True))


def fitted_after(latents: LatentCache, state: torch.Tensor) -> list[torch.Tensor]:
    """A fit, which leaves torch's generator and the trainer's where they were."""
    trainer = tiny_trainer(latents, tiny_settings("b", upsampler=D, basis_samples=3))
    torch.set_rng_state(state)
    draws = trainer.generator.get_state()
    fit_basis(trainer.objective, latents)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(trainer.generator.get_state(), draws)
    return [level.basis for level in trainer.trained.levels]


@pytest.mark.parametrize(("variant", "first"), [("C", {"gamma"}), ("D", {"gamma", "mixed_gamma"})])
def test_no_decay_and_no_gradient_but_of_the_gate_in_the_first_step(latents: LatentCache, variant: str, first: set[str]) -> None:
    """With a decay that would halve every weight: through the whole UNet only Gamma (C), gamma and Gamma (D) move; then all but the basis."""
    trainer = tiny_trainer(latents, tiny_settings("b", upsampler=UpsamplerSettings(variant=variant), weight_decay=50.0, lr=1e-2, warmup=0))
    if variant == "D":
        fit_basis(trainer.objective, latents)
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.0]
    states = [{name: tensor.clone() for name, tensor in trainer.trained.state_dict().items()}]
    for _ in range(2):
        trainer.advance()
        states.append({name: tensor.clone() for name, tensor in trainer.trained.state_dict().items()})
    assert moved(states[0], states[1]) == first
    assert moved(states[1], states[2]) == first | {"kernels", "scale", "offset"}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in before if not torch.equal(before[name], after[name])}


def test_a_checkpoint_holds_the_basis(latents: LatentCache) -> None:
    """Restored into a trainer that has fitted none, training ends with the same bits, moving average and basis included."""
    settings = tiny_settings("b", upsampler=D, steps=4)
    whole = tiny_trainer(latents, settings)
    fit_basis(whole.objective, latents)
    whole.advance()
    tensors, record = whole.state()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    resumed = tiny_trainer(latents, settings)
    resumed.restore(tensors, record)
    for trainer in (whole, resumed):
        while trainer.step < settings.steps:
            trainer.advance()
    averages = [trainer.averaged().state_dict() for trainer in (whole, resumed)]
    assert all(torch.equal(value, averages[1][name]) for name, value in averages[0].items())
    assert any("basis" in name for name in averages[0])


def test_an_interrupted_run_of_variant_d_ends_with_the_same_bytes(fresh: Callable[[], Store], tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before the first checkpoint (the basis is fitted again) and after it (it is not); the artifact tells both counts."""
    settings = tiny_settings(tiny_base, upsampler=D)
    undisturbed, store = fresh(), fresh()
    ref = adapt(settings, undisturbed)
    fits: list[int] = []

    def counted(*args: object) -> None:
        fits.append(1)
        fit_basis(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(stage, "fit_basis", counted)
    for step, expected in ((1, 1), (3, 2)):
        with pytest.raises(KeyboardInterrupt):
            adapt(settings, store, progress=_interrupt_at(step))
        assert len(fits) == expected
    adapt(settings, store)
    assert len(fits) == 2
    assert bytes_of(store, settings) == bytes_of(undisturbed, settings)

    artifact = Artifact(undisturbed, ref)
    counts = artifact.manifest().counts
    assert (counts["parameters"], counts["fitted"]) == (1488, 4 * (32 + 48 + 64 + 64))
    assert "It holds 1,488 trained and 832 fitted numbers on features of 32, 48, 64, 64 channels" in artifact.read("README.md").decode()
    trained = load_upsampler(str(ref.uri), undisturbed)
    for level in trained.levels:
        torch.testing.assert_close(level.basis.T @ level.basis, torch.eye(4), atol=1e-5, rtol=0)
        assert not torch.equal(level.basis, torch.eye(len(level.basis), 4))
        assert level.gamma.any()


def _interrupt_at(step: int) -> Callable[[TrainingStep], None]:
    def progress(report: TrainingStep) -> None:
        if report.step >= step:
            raise KeyboardInterrupt

    return progress


def test_the_released_variant_trains_from_its_identity(latents: LatentCache) -> None:
    """Its first loss is not the base's own: the enlarged features are added at full strength."""
    losses = []
    for upsampler in (UpsamplerSettings(variant="B", inject="main", final="identity"), UpsamplerSettings(variant="A", inject="main")):
        trainer: Trainer = tiny_trainer(latents, tiny_settings("b", upsampler=upsampler))
        trainer.advance()
        losses.append(trainer.log()[0][0])
    assert abs(losses[0] - losses[1]) > 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "B"}, "set inject to 'main' and final to 'identity'"),
        ({"variant": "D", "final": "gate"}, "variant D has no final='gate'"),
        ({"variant": "E"}, "'A', 'B', 'C' or 'D'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UpsamplerSettings(**changes)
