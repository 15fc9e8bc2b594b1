"""The tuned baselines train by the same loop: LoRA moves its own numbers alone, full fine-tuning the UNet, both on the base's own loss over all of T."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pyarrow.parquet as pq
import pytest
import torch
from test_adapt import _interrupt_at
from test_trainer import state, weights
from tiny_run import SIDE, synthetic_latents, tiny_settings
from torch.nn.functional import mse_loss

from selfcascade import SelfCascadePipeline
from selfcascade.adaptation.adapt import TrainingStep, adapt, plan_adaptation
from selfcascade.adaptation.cache import Batch, LatentCache
from selfcascade.adaptation.loss import diffuse
from selfcascade.adaptation.start import trainer_of
from selfcascade.adaptation.trainer import Trainer
from selfcascade.baselines import full, lora
from selfcascade.baselines.finetune import FILES, KINDS, RECORD
from selfcascade.bases import load_pipeline, resolve_base
from selfcascade.config import AdaptationSettings, ComputeSettings
from selfcascade.storage import Store, resolve

WAYS = pytest.mark.parametrize("way", ["lora", "full"])


@pytest.fixture(scope="module")
def latents() -> LatentCache:
    return synthetic_latents()


@pytest.fixture(scope="module")
def velocity_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.saved_base(tmp_path_factory.mktemp("velocity") / "v", "sd21v")


def tuner(latents: LatentCache, settings: AdaptationSettings) -> tuple[Trainer, SelfCascadePipeline]:
    """A trainer at step 0 and the pipeline of the base."""
    base = resolve_base(settings.base)
    pipeline = SelfCascadePipeline.from_pipe(load_pipeline(base, getattr(torch, settings.compute.dtype)))
    return trainer_of(settings, pipeline, latents, base, torch.device("cpu")), pipeline


@WAYS
@pytest.mark.parametrize("predicts", ["epsilon", "velocity"])
def test_the_first_loss_is_the_bases_own_at_the_target_size(latents: LatentCache, tiny_base: Path, velocity_base: Path, way: str, predicts: str) -> None:
    """Worked out by hand from the stock UNet and the run's generator: timesteps over all of T, then noise, then which captions are dropped; no pivot."""
    folder = tiny_base if predicts == "epsilon" else velocity_base
    settings = tiny_settings(folder, trainable=way, caption_dropout=0.5, start=0.01)
    trainer, pipeline = tuner(latents, settings)
    batch = latents.batch(trainer.order.batch(0, 4))
    draws = torch.Generator().manual_seed(settings.seed)
    t = torch.randint(0, 1000, (4,), generator=draws)
    noise = torch.randn(batch.target.shape, generator=draws)
    text = batch.without_captions(torch.rand(4, generator=draws) < 0.5, latents.empty()).text.text
    abar = pipeline.scheduler.alphas_cumprod
    with torch.no_grad():
        predicted = pipeline.unet(diffuse(batch.target, noise, t, abar), t, text)[0]
    signal = abar[t].view(-1, 1, 1, 1)
    wanted = noise if predicts == "epsilon" else signal.sqrt() * noise - (1 - signal).sqrt() * batch.target
    assert (t > 10).any()
    trainer.advance()
    assert trainer.log()[0][0] == pytest.approx(mse_loss(predicted, wanted).item(), rel=1e-5)


def test_lora_moves_alone(latents: LatentCache, tiny_base: Path) -> None:
    """Every weight of the base has the bytes it had, in the UNet that trains and in the one that it shares them with, and no gradient; A and B have moved."""
    trainer, pipeline = tuner(latents, tiny_settings(tiny_base, trainable="lora"))
    unet = trainer.objective.unet
    before, own = weights(unet), weights(pipeline.unet)
    for _ in range(3):
        trainer.advance()
    after = weights(unet)
    moved = {name for name in before if after[name] != before[name]}
    assert moved == {name for name in before if ".lora_" in name}
    assert weights(pipeline.unet) == own
    assert all(parameter.grad is None for name, parameter in unet.named_parameters() if ".lora_" not in name)
    frozen = dict(unet.named_parameters())["conv_in.weight"]
    assert frozen.data_ptr() == pipeline.unet.conv_in.weight.data_ptr()


def test_full_moves_everything_but_the_pipelines_own(latents: LatentCache, tiny_base: Path) -> None:
    """The UNet that trains starts as the base's; after three steps every one of its weights has moved, and none of the pipeline's, which previews compare."""
    trainer, pipeline = tuner(latents, tiny_settings(tiny_base, trainable="full"))
    before = weights(trainer.trained)
    assert before == weights(pipeline.unet)
    for _ in range(3):
        trainer.advance()
    after = weights(trainer.trained)
    assert all(after[name] != before[name] for name in before)
    assert weights(pipeline.unet) == before


@WAYS
def test_the_pivot_has_no_part(latents: LatentCache, tiny_base: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other pivots in the cache the steps are the same."""
    losses = []
    for scale in (1.0, 5.0):
        trainer, _ = tuner(latents, tiny_settings(tiny_base, trainable=way))
        inner = latents.batch

        def scaled(keys: Iterable[str], inner: Any = inner, scale: float = scale) -> Batch:
            return replace(inner(keys), pivot=scale * inner(keys).pivot)

        monkeypatch.setattr(latents, "batch", scaled)
        for _ in range(2):
            trainer.advance()
        losses.append(trainer.log()[:2])
        monkeypatch.undo()
    assert losses[0] == losses[1]


@WAYS
def test_loss_decreases_on_one_fixed_batch(tiny_base: Path, way: str) -> None:
    """The same four samples, timesteps and noise in every step: by 5 percent in eight steps."""
    trainer, _ = tuner(synthetic_latents(train=4), tiny_settings(tiny_base, trainable=way, lr=3e-3, caption_dropout=0.0))
    start = trainer.generator.get_state()
    trainer.order.batch = lambda position, count: ["s00", "s01", "s02", "s03"]  # type: ignore[method-assign]
    for _ in range(8):
        trainer.generator.set_state(start)
        trainer.advance()
    losses = [row[0] for row in trainer.log()]
    print(losses)
    assert losses[-1] < losses[0] * 0.95


@WAYS
@pytest.mark.parametrize("changes", [{}, {"schedule": "cosine", "accumulation": 2, "snr_gamma": 5.0, "timesteps": "stratified"}], ids=["paper", "others"])
def test_interrupted_equals_uninterrupted(latents: LatentCache, tiny_base: Path, way: str, changes: dict[str, object]) -> None:
    """Restored into fresh objects after the first step or the third, training ends with the same state, moving average and optimizer included."""
    settings = tiny_settings(tiny_base, trainable=way, steps=4, **changes)
    whole, _ = tuner(latents, settings)
    saved = []
    for _ in range(settings.steps):
        tensors, record = whole.state()
        saved.append(({name: tensor.clone() for name, tensor in tensors.items()}, record))
        whole.advance()
    for tensors, record in saved[1::2]:
        resumed, _ = tuner(latents, settings)
        resumed.restore(tensors, record)
        while resumed.step < settings.steps:
            resumed.advance()
        assert state(resumed) == state(whole)


@WAYS
def test_bfloat16_trains_float32_weights(latents: LatentCache, tiny_base: Path, way: str) -> None:
    """The base computes in bfloat16; what trains starts from the base's float32 weights and stays in float32, as do moving average and optimizer."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        trainer, pipeline = tuner(latents, tiny_settings(tiny_base, trainable=way, compute=ComputeSettings(dtype=dtype, threads=1)))
        start = weights(trainer.trained)
        assert way == "lora" or start == weights(load_pipeline(resolve_base(str(tiny_base))).unet)
        for _ in range(2):
            trainer.advance()
        tensors, _ = trainer.state()
        assert {tensor.dtype for name, tensor in tensors.items() if name.startswith(("weights/", "ema/", "optimizer/"))} == {torch.float32}
        assert {parameter.dtype for parameter in pipeline.unet.parameters()} == {getattr(torch, dtype)}
        losses[dtype] = trainer.log()[0][0]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


def test_rank_and_seed_make_the_initial_weights(latents: LatentCache, tiny_base: Path) -> None:
    """A is drawn from the run's seed, with standard deviation 1 / rank, B is zero; torch's own generator is left alone."""
    common = torch.get_rng_state()
    drawn = {seed: tuner(latents, tiny_settings(tiny_base, trainable="lora", rank=8, seed=seed))[0].trained.weights() for seed in (0, 1)}
    again = tuner(latents, tiny_settings(tiny_base, trainable="lora", rank=8, seed=1))[0].trained.weights()
    assert torch.equal(torch.get_rng_state(), common)
    assert all(torch.equal(again[name], drawn[1][name]) for name in again)
    into = [name for name in again if "lora_A" in name]
    assert not any(torch.equal(drawn[0][name], drawn[1][name]) for name in into)
    assert torch.cat([again[name].flatten() for name in into]).std().item() == pytest.approx(1 / 8, rel=0.02)
    assert {again[name].shape[0] for name in into} == {8}
    assert not any(tensor.any() for name, tensor in again.items() if "lora_B" in name)


@WAYS
def test_the_folder_holds_what_others_read(world: Store, tiny_base: Path, way: str) -> None:
    """An artifact of its own kind; a stock diffusers pipeline takes it; counts, log, card and previews tell what it is; nothing tells the machine."""
    settings = tiny_settings(tiny_base, name="tuned", trainable=way, previews=1)
    steps: list[TrainingStep] = []
    ref = adapt(settings, world, progress=steps.append)
    artifact = resolve(world, f"{KINDS[way]}/tuned")
    assert (artifact.ref, ref.kind) == (ref, KINDS[way])
    names = {entry.key for entry in artifact.manifest().objects}
    assert names == {*FILES[way], RECORD, "README.md", "loss.parquet", "previews/sheet.png", *(name for name in names if name.startswith("previews/"))}
    assert len(names) == len(FILES[way]) + 5
    assert [step.step for step in steps if step.preview is not None] == [4]

    stock = load_pipeline(resolve_base(str(tiny_base)))
    base = str(resolve_base(str(tiny_base)))
    found = lora.find_finetune(f"{KINDS[way]}/tuned", way, world)
    assert found.record.model_dump() == {"way": way, "base": base, "size": (SIDE, SIDE), "rank": 4 if way == "lora" else None}
    tuned = (lora if way == "lora" else full).adapted(stock.unet, found)
    z, text = torch.randn(1, 4, 16, 16), torch.randn(1, 12, models.TEXT)
    before = stock.unet(z, 5, text)[0]
    assert not torch.equal(tuned(z, 5, text)[0], before)
    if way == "lora":
        stock.load_lora_weights(found.folder)
        torch.testing.assert_close(stock.unet(z, 5, text)[0], tuned(z, 5, text)[0])
        count = sum(4 * (m.in_features + m.out_features) for m in models.unet("small").modules() if isinstance(m, torch.nn.Linear))
    else:
        assert json.loads((found.folder / "config.json").read_text())["_name_or_path"] == base
        count = sum(parameter.numel() for parameter in stock.unet.parameters())
    assert artifact.manifest().counts["parameters"] == count

    assert pq.read_table(io.BytesIO(artifact.read("loss.parquet")))["step"].to_pylist() == [1, 2, 3, 4, 5, 6]
    card = artifact.read("README.md").decode()
    for told in (f"{count:,} numbers", f"{way}.sample(pipe, ", "over all of T", "the base asked for the target size at once", base):
        assert told in card
    for name in names:
        assert str(tiny_base.parent).encode() not in artifact.read(name)


def test_an_interrupted_run_writes_the_same_manifest(fresh: Callable[[], Store], tiny_base: Path) -> None:
    """Stopped after the third step, gone on from the second, with other checkpoints and logs: every byte is equal."""
    settings = tiny_settings(tiny_base, name="again", trainable="lora", steps=4)
    manifests = []
    for interrupted in (False, True):
        store = fresh()
        if interrupted:
            changed = settings.model_copy(update={"checkpoint_steps": 2, "log_steps": 1})
            with pytest.raises(KeyboardInterrupt):
                adapt(changed, store, progress=_interrupt_at(3))
            assert plan_adaptation(settings, store).step == 2
        ref = adapt(settings, store)
        manifests.append(hashlib.sha256(store.read(f"{ref.prefix}/manifest.json")).hexdigest())
    assert manifests[0] == manifests[1]
