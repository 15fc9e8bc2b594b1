"""Pretraining of the small base: exact resume, exact normalisation of latents, and a folder that diffusers loads unchanged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from selfcascade.adaptation import pretrain
from selfcascade.adaptation.autoencoder_training import AutoencoderTraining, build_autoencoder, cosine, encode_all, encode_crops, fold_statistics
from selfcascade.adaptation.denoiser_training import DenoiserTraining, build_tokenizer, tokenize
from selfcascade.config import AutoencoderSettings, ComputeSettings, CurationSettings, DenoiserSettings, PretrainingSettings, TwemojiSource
from selfcascade.curation.curate import curate_unit, plan_curation, publish_curation, stage_listing
from selfcascade.generation import precision
from selfcascade.settings import SettingsError

AUTOENCODER = AutoencoderSettings(channels=(8, 8, 8, 8), crop=16, batch=4, steps=4, refine_steps=2, equivariance=0.5)
DENOISER = DenoiserSettings(channels=(16, 16), text_width=16, text_layers=1, batch=8, steps=6, ema=0.9)
CROPPED = DENOISER.model_copy(update={"crops": 0.5})


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)


@pytest.fixture
def dataset(store):
    curation = CurationSettings(name="emoji", source=TwemojiSource(backgrounds=("white", "navy"), limit=16), size=64, tune=0.2, test=0.2, shard_inputs=16)
    plan = plan_curation(curation, store)
    stage_listing(curation, store, plan)
    for unit in plan.todo:
        curate_unit(curation, store, plan, unit)
    return publish_curation(curation, store, plan)


def run(training, steps):
    return [training.advance() for _ in range(steps)]


def test_folding_statistics_changes_the_latent_and_not_the_picture(pictures):
    """Channels of the folded latent have mean 0 and standard deviation 1; decode(encode(x)) is what it was, to 1e-4."""
    model = build_autoencoder(AUTOENCODER, side=32, seed=1).eval()
    with torch.no_grad():
        model.quant_conv.bias[:4] += torch.tensor([3.0, -2.0, 0.5, 0.0])
        pixels = torch.rand(2, 3, 32, 32) * 2 - 1
        posterior = model.encode(pixels).latent_dist
        before = model.decode(posterior.mean).sample
        mean, std = posterior.mean.clone(), posterior.std.clone()
        latents = encode_all(model, pictures).clone()
        fold_statistics(model, latents)
        posterior = model.encode(pixels).latent_dist
        after = model.decode(posterior.mean).sample
    folded = encode_all(model, pictures)
    spread, offset = latents.std(dim=(0, 2, 3)), latents.mean(dim=(0, 2, 3))
    torch.testing.assert_close(folded.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(folded.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(posterior.mean, (mean - offset.view(1, -1, 1, 1)) / spread.view(1, -1, 1, 1), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(posterior.std, std / spread.view(1, -1, 1, 1), atol=1e-4, rtol=1e-3)


def test_autoencoder_learns(pictures):
    configuration = AUTOENCODER.model_copy(update={"steps": 60, "refine_steps": 0, "equivariance": 0.0})
    training = AutoencoderTraining(configuration, pictures[:1], seed=0, dtype=torch.float32)
    losses = run(training, 60)
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])


def test_denoiser_learns_and_its_average_follows():
    """Noise MSE falls on a handful of latents; the average is the closed form of its weights' path."""
    tokenizer = build_tokenizer(["a cat", "two dogs"], max_tokens=8)
    latents = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens = tokenize(tokenizer, ["a cat", "two dogs"] * 4)
    configuration = DENOISER.model_copy(update={"steps": 40, "caption_dropout": 0.0, "lr": 1e-2})
    training = DenoiserTraining(configuration, latents, tokens, tokenize(tokenizer, [""]), vocabulary=len(tokenizer), seed=0, dtype=torch.float32)
    expected = training.parameters[0].detach().double().clone()
    losses = []
    for step in range(40):
        losses += run(training, 1)
        decay = min(0.9, (2 + step) / (11 + step))
        expected = decay * expected + (1 - decay) * training.parameters[0].detach().double()
    assert np.mean(losses[-8:]) < 0.9 * np.mean(losses[:8])
    torch.testing.assert_close(training.average[0].double(), expected, atol=1e-5, rtol=1e-5)
    unet, _ = training.averaged()
    torch.testing.assert_close(next(unet.parameters()), training.average[0])


def test_hidden_weights_step_by_muon_at_the_size_of_adamw():
    """Hidden weights move by an orthogonalised step: its root mean square is 0.2 of the rate (arXiv 2502.16982), whatever the gradient's."""
    tokenizer = build_tokenizer(["a cat", "two dogs"], max_tokens=8)
    tokens = tokenize(tokenizer, ["a cat", "two dogs"] * 4)
    latents = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    training = DenoiserTraining(DENOISER, latents, tokens, tokenize(tokenizer, [""]), vocabulary=len(tokenizer), seed=0, dtype=torch.float32)
    names = {id(parameter): name for name, parameter in training.unet.named_parameters()}
    before = {name: parameter.detach().clone() for name, parameter in training.unet.named_parameters()}
    training.advance()
    rate = training.optimizers[0].param_groups[0]["lr"]
    assert 0 < rate < DENOISER.lr
    assert not {"conv_in.weight", "conv_out.weight"} & {names[id(parameter)] for parameter in training.matrices.values()}
    for matrix, parameter in training.matrices.items():
        assert matrix.data_ptr() == parameter.data_ptr()
        if parameter.grad.norm() > 1e-6:  # keys of an attention whose values are still zero have none
            moved = (parameter.detach() - before[names[id(parameter)]]).square().mean().sqrt()
            assert 0.5 < moved / (0.2 * rate) < 1.3, names[id(parameter)]


def test_every_sample_is_seen_once_an_epoch():
    tokenizer = build_tokenizer(["a"], max_tokens=4)
    latents = torch.randn(24, 4, 8, 8)
    training = DenoiserTraining(DENOISER, latents, tokenize(tokenizer, ["a"] * 24), tokenize(tokenizer, [""]), vocabulary=5, seed=3, dtype=torch.float32)
    epochs = []
    for _ in range(2):
        seen = []
        for _ in range(3):
            seen += training._batch().tolist()
            training.step += 1
        epochs.append(seen)
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(24))
    assert epochs[0] != epochs[1]


def cropped(latents, crops, *, below=0.7):
    tokenizer = build_tokenizer(["a"], max_tokens=4)
    configuration = CROPPED.model_copy(update={"crops_below": below})
    tokens = tokenize(tokenizer, ["a"] * len(latents))
    return DenoiserTraining(configuration, latents, tokens, tokenize(tokenizer, [""]), vocabulary=5, seed=3, dtype=torch.float32, crops=crops)


def test_crops_are_a_share_of_what_is_at_low_noise_and_none_above(monkeypatch):
    """Over 200 steps half of the samples below 0.7 T are crops, each of a picture's as often as the other, and none at or above."""
    training = cropped(torch.zeros(24, 4, 8, 8), torch.zeros(24, 2, 4, 8, 8))
    drawn = []
    monkeypatch.setattr(training, "recorded", lambda **draws: drawn.append(draws) or torch.zeros(()))
    for _ in range(200):
        training.advance()
    cut, timesteps, which = (torch.cat([draws[name] for draws in drawn]) for name in ("cut", "timesteps", "which"))
    assert not cut[timesteps >= 700].any()
    assert cut[timesteps < 700].float().mean() == pytest.approx(0.5, abs=0.05)
    assert which[cut].float().mean() == pytest.approx(0.5, abs=0.06)


def test_a_crop_stands_in_for_its_picture():
    """With all samples cut, the loss is that of latents that are the crops; with none, that of the pictures."""
    generator = torch.Generator().manual_seed(0)
    latents, crops = torch.randn(8, 4, 8, 8, generator=generator), torch.randn(8, 2, 4, 8, 8, generator=generator)
    which = torch.tensor([0, 1] * 4)

    def loss(whole, cut):
        draws = {"chosen": torch.arange(8), "dropped": torch.zeros(8, dtype=torch.bool), "timesteps": torch.arange(8) * 100}
        scalars = {"factor": torch.tensor(1.0), "decay": torch.tensor(0.9)}
        return cropped(whole, crops).learn(**draws, **scalars, noise=torch.ones(8, 4, 8, 8), cut=torch.full((8,), cut), which=which)

    assert loss(latents, cut=True) == loss(crops[torch.arange(8), which], cut=False)
    assert loss(latents, cut=True) != loss(latents, cut=False)


def test_crops_are_encoded_from_the_pictures_at_their_full_size(pictures):
    """Every crop has the native side and is a part of its picture, and is encoded as the autoencoder encodes that part."""
    model = build_autoencoder(AUTOENCODER, side=32, seed=1).eval()
    seen = []
    encode = model.encode
    model.encode = lambda block: seen.append(block) or encode(block)
    found = encode_crops(model, pictures[:4], count=3, seed=5, batch=5)
    cut = torch.cat(seen)
    assert found.shape == (4, 3, 4, 4, 4)
    with torch.inference_mode():
        torch.testing.assert_close(found.flatten(0, 1), encode(cut).latent_dist.mean, atol=1e-5, rtol=1e-4)
    for number, block in enumerate(((cut + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()):
        windows = np.lib.stride_tricks.sliding_window_view(pictures[number // 3], (32, 32, 3))[:, :, 0]
        assert (windows == block).all(axis=(2, 3, 4)).sum() == 1


def test_crops_and_their_share_go_together():
    with pytest.raises(ValueError, match="crops are missing"):
        cropped(torch.zeros(8, 4, 8, 8), None)


@given(st.integers(2, 500), st.integers(1, 50), st.floats(0, 0.9))
def test_learning_rate_rises_holds_and_ends_at_zero(steps, warmup, hold):
    rates = [cosine(step, steps, warmup=warmup, hold=hold) for step in range(steps + 1)]
    assert all(0 <= rate <= 1 for rate in rates)
    falling = rates[min(warmup, steps) :]
    assert falling == sorted(falling, reverse=True)
    if warmup < steps:
        assert rates[-1] == pytest.approx(0, abs=1e-9)


@settings(max_examples=50)
@given(st.lists(st.text("abcxyz ", min_size=1, max_size=20), min_size=1, max_size=6))
def test_known_words_survive_the_tokenizer(captions):
    tokenizer = build_tokenizer(captions, max_tokens=32)
    for caption in captions:
        ids = tokenize(tokenizer, [caption])[0].tolist()
        words = caption.split()
        assert tokenizer.convert_ids_to_tokens(ids[: len(words) + 2]) == ["<start>", *words, "<end>"]
        assert set(ids[len(words) + 2 :]) <= {2}
    assert 3 in tokenize(tokenizer, ["quite unknown"])[0].tolist()


def base_settings(**changes):
    return PretrainingSettings(
        name="small", dataset="datasets/emoji", size=32, autoencoder=AUTOENCODER, denoiser=DENOISER, checkpoint_steps=2, compute=ComputeSettings(), **changes
    )


def bytes_of(artifact):
    return {entry.key: entry.sha256 for entry in artifact.manifest().objects}


@pytest.mark.parametrize("stop_at", [("autoencoder", 3), ("autoencoder", 6), ("denoiser", 1), ("denoiser", 5)])
def test_interrupted_equals_uninterrupted(store, dataset, monkeypatch, stop_at):
    """Stopped by an error at a step of either phase and run again: every file of the base has the SHA-256 of an undisturbed run."""
    undisturbed = base_settings()
    plan = pretrain.plan_pretraining(undisturbed, store)
    pretrain.train_base(undisturbed, store, plan)
    expected = bytes_of(pretrain.resolve(store, pretrain.publish_pretraining(undisturbed, store, plan).uri))

    disturbed = base_settings().model_copy(update={"name": "other"})
    plan = pretrain.plan_pretraining(disturbed, store)
    phase, step = stop_at
    owner = AutoencoderTraining if phase == "autoencoder" else DenoiserTraining
    advance = owner.advance

    def stopping(self):
        if self.step == step - 1:
            raise KeyboardInterrupt
        return advance(self)

    monkeypatch.setattr(owner, "advance", stopping)
    with pytest.raises(KeyboardInterrupt):
        pretrain.train_base(disturbed, store, plan)
    monkeypatch.undo()
    plan = pretrain.plan_pretraining(disturbed, store)
    assert not plan.published
    pretrain.train_base(disturbed, store, plan)
    ref = pretrain.publish_pretraining(disturbed, store, plan)
    found = bytes_of(pretrain.resolve(store, ref.uri))
    assert {key: value for key, value in found.items() if key != "README.md"} == {key: value for key, value in expected.items() if key != "README.md"}
    assert pretrain.plan_pretraining(disturbed, store).published


def test_diffusers_loads_the_base_unchanged(store, dataset, tmp_path):
    configuration = base_settings()
    plan = pretrain.plan_pretraining(configuration, store)
    pretrain.train_base(configuration, store, plan)
    artifact = pretrain.resolve(store, pretrain.publish_pretraining(configuration, store, plan).uri)
    for entry in artifact.manifest().objects:
        (tmp_path / entry.key).parent.mkdir(parents=True, exist_ok=True)
        artifact.download(entry.key, tmp_path / entry.key)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("grinning face", height=32, width=32, num_inference_steps=2).images[0]
    assert image.size == (32, 32)
    assert "selfcascade pretrain" in (tmp_path / "README.md").read_text()
    assert artifact.manifest().counts["psnr_held_out_db"] > 0


def test_pictures_of_another_size_are_refused(store, dataset):
    wrong = base_settings().model_copy(update={"size": 64})
    with pytest.raises(SettingsError, match="curate with size 128"):
        pretrain.train_base(wrong, store, pretrain.plan_pretraining(wrong, store))


def made(configuration, store):
    plan = pretrain.plan_pretraining(configuration, store)
    pretrain.train_base(configuration, store, plan)
    return pretrain.resolve(store, pretrain.publish_pretraining(configuration, store, plan).uri)


def pulled(artifact, folder):
    for entry in artifact.manifest().objects:
        (folder / entry.key).parent.mkdir(parents=True, exist_ok=True)
        artifact.download(entry.key, folder / entry.key)
    return folder


def test_training_goes_on_from_a_base(store, dataset, tmp_path, monkeypatch):
    """Autoencoder and tokenizer stay as they are; at step 0 weights and average are the base's; an interrupted run equals an undisturbed one."""
    first = made(base_settings(), store)
    folder = pulled(first, tmp_path / "first")
    longer = base_settings(init="bases/small").model_copy(update={"name": "longer", "denoiser": CROPPED})
    assert pretrain.steps_planned(longer) == {"autoencoder": 0, "denoiser": DENOISER.steps}
    trained = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    advance, seen = DenoiserTraining.advance, []

    def stopping(self):
        if self.step == 0:
            seen.append([parameter.detach().clone() for parameter in self.parameters])
            assert all(map(torch.equal, self.average, self.parameters))
        if self.step == 3:
            raise KeyboardInterrupt
        return advance(self)

    monkeypatch.setattr(DenoiserTraining, "advance", stopping)
    plan = pretrain.plan_pretraining(longer, store)
    assert plan.init.startswith("bases/small@") or plan.init.startswith("small@")
    with pytest.raises(KeyboardInterrupt):
        pretrain.train_base(longer, store, plan)
    assert all(map(torch.equal, seen[0], [*trained.unet.parameters(), *trained.text_encoder.parameters()]))
    monkeypatch.undo()
    plan = pretrain.plan_pretraining(longer, store)
    assert pretrain.steps_done(longer, store, plan) == {"autoencoder": 0, "denoiser": 2}

    second = made(longer, store)
    undisturbed = made(longer.model_copy(update={"name": "undisturbed", "init": str(folder)}), store)
    kept = ("vae/", "tokenizer/")
    assert {key: digest for key, digest in bytes_of(first).items() if key.startswith(kept)} == {
        key: digest for key, digest in bytes_of(second).items() if key.startswith(kept)
    }
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert bytes_of(second)[weights] == bytes_of(undisturbed)[weights] != bytes_of(first)[weights]
    card = second.read("README.md").decode()
    assert f"Trained on from `{plan.init}`" in card
    assert "autoencoder.steps" not in card
    assert "50% of its samples are native-size crops" in card
    assert "crops" not in first.read("README.md").decode()


def test_a_base_of_another_shape_is_refused(store, dataset):
    made(base_settings(), store)
    wider = base_settings(init="bases/small").model_copy(update={"denoiser": DENOISER.model_copy(update={"channels": (16, 32)})})
    with pytest.raises(SettingsError, match=r"pretraining.denoiser.*\[16, 16\]"):
        pretrain.train_base(wider, store, pretrain.plan_pretraining(wider, store))


def test_a_slow_precision_is_told_before_the_first_step(store, dataset, monkeypatch, caplog):
    """And nothing is told of a base that is trained already."""
    monkeypatch.setattr(precision, "slowdown", lambda dtype: 3.0)
    settings = base_settings().model_copy(update={"compute": ComputeSettings(dtype="bfloat16")})
    for warnings in (1, 0):
        caplog.clear()
        plan = pretrain.plan_pretraining(settings, store)
        with caplog.at_level("WARNING"):
            pretrain.train_base(settings, store, plan)
        assert sum(line.startswith("pretraining.compute.dtype=bfloat16 is 3.0 times slower") for line in caplog.messages) == warnings
        pretrain.publish_pretraining(settings, store, plan)
