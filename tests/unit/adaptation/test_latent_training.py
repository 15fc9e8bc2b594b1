"""The latent upscaler trains by the loop of the feature upsampler: from the same latents, to an artifact of its own, exactly again after an interruption."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from test_adapt import _interrupt_at
from test_trainer import state, weights
from tiny_run import SIDE, synthetic_latents, tiny_settings, tiny_trainer
from torch.nn.functional import avg_pool2d, interpolate, l1_loss, mse_loss

from selfcascade import SelfCascadePipeline
from selfcascade.adaptation.adapt import TrainingStep, adapt, plan_adaptation
from selfcascade.adaptation.cache import Batch, LatentCache
from selfcascade.adaptation.checkpoint import newest_step
from selfcascade.adaptation.latent_error import latent_errors
from selfcascade.cascade.latent_upscaler import LatentUpscaler, load_latent_upscaler
from selfcascade.cascade.upsampler import load_upsampler
from selfcascade.config import AdaptationSettings, LatentUpscalerSettings
from selfcascade.settings import SettingsError
from selfcascade.storage import Store, resolve

SMALL = LatentUpscalerSettings(width=8, blocks=1)


def upscaler_settings(folder: Path | str, **changes: object) -> AdaptationSettings:
    """As :func:`tiny_run.tiny_settings`, of a latent upscaler."""
    return tiny_settings(folder, **({"trainable": "latent-upscaler", "upscaler": SMALL} | changes))


@pytest.fixture(scope="module")
def latents() -> LatentCache:
    return synthetic_latents()


@pytest.mark.parametrize(("loss", "distance"), [("l2", mse_loss), ("l1", l1_loss)])
def test_the_first_loss_is_that_of_bilinear_enlargement(latents: LatentCache, loss: str, distance: Callable[..., torch.Tensor]) -> None:
    """Worked out from the cached latents themselves, of the very samples that the order gives first; all of it, and no noise."""
    trainer = tiny_trainer(latents, upscaler_settings("b", upscaler=SMALL.model_copy(update={"loss": loss})))
    batch = latents.batch(trainer.order.batch(0, 4))
    trainer.advance()
    expected = distance(interpolate(batch.pivot, scale_factor=2, mode="bilinear"), batch.target).item()
    assert trainer.log()[0][0] == pytest.approx(expected, rel=1e-6)


def test_only_the_upscaler_moves_and_nothing_is_drawn(latents: LatentCache) -> None:
    """After three steps all of its weights have moved; no generator has, neither torch's nor the run's."""
    trainer = tiny_trainer(latents, upscaler_settings("b"))
    before, own, common = weights(trainer.trained), trainer.generator.get_state(), torch.get_rng_state()
    for _ in range(3):
        trainer.advance()
    after = weights(trainer.trained)
    assert all(after[name] != before[name] for name in before)
    assert torch.equal(trainer.generator.get_state(), own)
    assert torch.equal(torch.get_rng_state(), common)


def test_interrupted_equals_uninterrupted(latents: LatentCache) -> None:
    """Restored into fresh objects after the first step or the third, training ends with the same state."""
    settings = upscaler_settings("b", steps=4)
    whole = tiny_trainer(latents, settings)
    saved = []
    for _ in range(settings.steps):
        tensors, record = whole.state()
        saved.append(({name: tensor.clone() for name, tensor in tensors.items()}, record))
        whole.advance()
    for tensors, record in saved[1::2]:
        resumed = tiny_trainer(latents, settings)
        resumed.restore(tensors, record)
        while resumed.step < settings.steps:
            resumed.advance()
        assert state(resumed) == state(whole)


def linear_latents(count: int) -> LatentCache:
    """Latents in which the big one follows from the small one: smooth random fields, so that interpolation errs and a network need not."""
    cache = synthetic_latents(train=count, tune=8)
    generator = torch.Generator().manual_seed(7)
    keys = cache.keys("train") + cache.keys("tune")
    fields = dict(zip(keys, 5 * avg_pool2d(avg_pool2d(torch.randn(len(keys), 4, 20, 20, generator=generator), 3, 1), 3, 1), strict=True))
    inner = cache.batch

    def batch(keys: list[str]) -> Batch:
        target = torch.stack([fields[key] for key in keys])
        return replace(inner(keys), target=target, pivot=avg_pool2d(target, 2))

    cache.batch = batch  # type: ignore[assignment, method-assign]
    return cache


def test_it_learns_what_interpolation_cannot_know() -> None:
    """On fields whose small version is their mean over 2 x 2, 150 steps take a third off bilinear's error on samples that were not trained on."""
    latents = linear_latents(32)
    settings = upscaler_settings("b", steps=150, batch=8, lr=5e-3, upscaler=LatentUpscalerSettings(width=16, blocks=1))
    trainer = tiny_trainer(latents, settings)
    while trainer.step < settings.steps:
        trainer.advance()
    errors = latent_errors(trainer.averaged(), latents)
    print(errors)
    assert errors["learned"] < errors["bilinear"] * 2 / 3


def test_errors_are_root_mean_squares_over_the_tune_split(latents: LatentCache) -> None:
    """Of a fresh upscaler both are bilinear's; with a constant added they part by its square; an empty split has none."""
    upscaler = LatentUpscaler(4, width=4, blocks=1)
    batch = latents.batch(latents.keys("tune"))
    grown = interpolate(batch.pivot, scale_factor=2, mode="bilinear")
    expected = mse_loss(grown, batch.target).sqrt().item()
    assert latent_errors(upscaler, latents) == pytest.approx({"learned": expected, "bilinear": expected}, rel=1e-5)
    torch.nn.init.constant_(upscaler.leave.bias, 0.5)
    assert latent_errors(upscaler, latents)["learned"] == pytest.approx(mse_loss(grown + 0.5, batch.target).sqrt().item(), rel=1e-5)
    assert latent_errors(upscaler, synthetic_latents(tune=0)) == {}


def test_the_folder_holds_what_others_read(world: Store, tiny_base: Path) -> None:
    """An artifact of kind upscalers, beside an upsampler of the same name; the cascade takes it; card, log, counts and previews tell what it is."""
    settings = upscaler_settings(tiny_base, name="both", previews=1)
    steps: list[TrainingStep] = []
    ref = adapt(settings, world, progress=steps.append)
    other = adapt(tiny_settings(tiny_base, name="both", steps=1), world)
    assert (ref.kind, other.kind, ref.name) == ("upscalers", "upsamplers", other.name)
    assert resolve(world, "upscalers/both").ref == ref
    artifact = resolve(world, f"upscalers/both@{ref.short}")
    names = {entry.key for entry in artifact.manifest().objects}
    assert names > {"README.md", "config.json", "diffusion_pytorch_model.safetensors", "loss.parquet", "previews/sheet.png"}
    assert [step.step for step in steps if step.preview is not None] == [4]

    counts = artifact.manifest().counts
    upscaler = load_latent_upscaler("upscalers/both", world)
    assert counts["parameters"] == sum(p.numel() for p in upscaler.parameters())
    assert 0 < counts["tune_rmse_learned"] != counts["tune_rmse_bilinear"] > 0
    pipe = SelfCascadePipeline.from_pretrained(str(tiny_base), latent_upscaler="upscalers/both", store=world)
    assert pipe("a red cat", SIDE, SIDE, num_inference_steps=2, upscale="learned", output_type="pt").images.shape == (1, 3, SIDE, SIDE)
    assert (upscaler.config.base, tuple(upscaler.config.size)) == (pipe.config.base, (SIDE, SIDE))

    table = pq.read_table(io.BytesIO(artifact.read("loss.parquet")))
    assert table["step"].to_pylist() == [1, 2, 3, 4, 5, 6]
    card = artifact.read("README.md").decode()
    for told in (
        "Latent upscaler for Self-Cascade",
        'upscale="learned"',
        'latent_upscaler="this folder"',
        f"{counts['tune_rmse_learned']:.4f}",
        "mean squared error",
    ):
        assert told in card
    with pytest.raises(SettingsError, match="is not an artifact; write upsamplers/NAME"):
        load_upsampler(ref.uri, world)


def test_an_interrupted_run_writes_the_same_manifest(fresh: Callable[[], Store], tiny_base: Path) -> None:
    """Stopped after the third step, gone on from the second, with other checkpoints and logs: every byte is equal."""
    settings = upscaler_settings(tiny_base, name="again")
    manifests = []
    for interrupted in (False, True):
        store = fresh()
        if interrupted:
            changed = settings.model_copy(update={"checkpoint_steps": 2, "log_steps": 1})
            with pytest.raises(KeyboardInterrupt):
                adapt(changed, store, progress=_interrupt_at(3))
            plan = plan_adaptation(settings, store)
            assert (plan.ref.kind, plan.step, newest_step(store, plan.ref.version)) == ("upscalers", 2, 2)
        ref = adapt(settings, store)
        manifests.append(hashlib.sha256(store.read(f"{ref.prefix}/manifest.json")).hexdigest())
    assert manifests[0] == manifests[1]
