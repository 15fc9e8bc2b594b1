"""Upsamplers in the cascade: one a stage or one for all, how strongly and until when they guide, and that they start as the tuning-free cascade."""

from __future__ import annotations

import json

import models
import pytest
import torch
from test_upsampler import CONFIGS, ZERO, randomised

from selfcascade import SelfCascadePipeline
from selfcascade.cascade.families import spec_of
from selfcascade.cascade.injection import pivot_features, unet_with_pivot
from selfcascade.cascade.upsampler import FeatureUpsampler, load_upsampler
from selfcascade.cascade.upsampler_set import UpsamplerSet, gather
from selfcascade.settings import SettingsError

CALL = {"prompt": "a red cat", "num_inference_steps": 4, "output_type": "latent"}


@pytest.fixture(scope="module")
def small():
    pipeline = SelfCascadePipeline.from_pipe(models.base("small"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def phi(pipeline, seed=0, **config):
    """As after training; with the given stage."""
    return randomised(FeatureUpsampler.for_base(pipeline.spec, **{"variant": "C"} | config), seed)


def sample(pipeline, upsampler=None, side=128, **changes):
    tuned = SelfCascadePipeline.from_pipe(pipeline, upsampler=upsampler)
    tuned.set_progress_bar_config(disable=True)
    arguments = {"generator": torch.Generator().manual_seed(3), "height": side, "width": side}
    return tuned(**CALL | arguments | changes).images


def test_a_stage_is_guided_by_its_own_upsampler(small):
    """Three stages in one call = the upper two by hand, each with its upsampler alone; and either of them matters."""
    first, second = phi(small, 1, stage=1), phi(small, 2, stage=2, variant="D")
    whole = sample(small, [first, second], 256)
    below = sample(small, first, 128, sizes=small.sizes(256, 256)[:2])
    assert torch.equal(sample(small, second, 256, pivot=below), whole)
    assert torch.equal(sample(small, {2: second, 1: first}, 256), whole)
    for other in ([first, None], [None, second], None):
        assert not torch.allclose(sample(small, other, 256), whole, atol=1e-3)


def test_a_stage_without_an_upsampler_is_tuning_free(small):
    """An upsampler that was trained for stage 1 leaves stage 2 as it is, whether it comes alone or in a list."""
    first = phi(small, stage=1)
    whole = sample(small, first, 256)
    assert torch.equal(sample(small, [first], 256), whole)
    below = sample(small, first, sizes=small.sizes(256, 256)[:2])
    assert torch.equal(sample(small, None, 256, pivot=below), whole)


@pytest.mark.parametrize("config", [{"stage": 1, "shared": True}, {"stage": None}], ids=str)
def test_a_shared_upsampler_guides_every_stage(small, config):
    """As a list does in which it is given for every stage; there each stage has weights of its own."""
    shared = phi(small, **config)
    several = gather([shared, shared])
    assert several.of(1) is shared
    assert several.of(2) is not shared
    assert torch.equal(sample(small, shared, 256), sample(small, several, 256))
    assert not torch.allclose(sample(small, shared, 256), sample(small, [shared], 256), atol=1e-3)


def test_a_set_is_an_ordinary_component(small, tmp_path):
    """A pipeline is saved with it and loaded again by diffusers' own means: the same pictures; one folder, one file of weights; moved as a whole."""
    members = {1: phi(small, 1, stage=1), 2: phi(small, 2, stage=2, variant="D", inject="main", pivot_t="zero")}
    pipeline = SelfCascadePipeline.from_pipe(small, upsampler=members)
    pipeline.save_pretrained(tmp_path)
    assert sorted(path.name for path in (tmp_path / "upsampler").iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert json.loads((tmp_path / "model_index.json").read_text())["upsampler"] == ["selfcascade.cascade.upsampler_set", "UpsamplerSet"]
    again = SelfCascadePipeline.from_pretrained(tmp_path)
    assert torch.equal(sample(again, None, 256), sample(small, members, 256))
    loaded = load_upsampler(str(tmp_path / "upsampler"))
    assert isinstance(loaded, UpsamplerSet)
    for stage, member in members.items():
        known = {name: value for name, value in member.config.items() if not name.startswith("_")}
        assert {name: loaded.of(stage).config[name] for name in known} == {name: list(v) if isinstance(v, tuple) else v for name, v in known.items()}
        assert all(torch.equal(value, loaded.of(stage).state_dict()[name]) for name, value in member.state_dict().items())
    assert {tensor.dtype for tensor in again.to(torch.bfloat16).upsampler.state_dict().values()} == {torch.bfloat16}


def test_a_list_may_hold_folders(small, tmp_path):
    upsampler = phi(small, stage=2)
    upsampler.save_pretrained(tmp_path)
    assert torch.equal(sample(small, [None, tmp_path], 256), sample(small, [None, upsampler], 256))


@pytest.mark.parametrize(
    ("given", "side", "message"),
    [
        ({1: {"stage": 2}}, 256, r"upsampler was trained for stage 2 but is given for stage 1; put it there"),
        ({0: {}}, 256, "by the number of their stage, from 1, not by '0'"),
        ({2: {"stage": 2}}, 128, "the upsamplers are for stage 2 but this cascade has 1 above the base"),
        ({"alone": {"stage": 2, "size": (256, 256)}}, 128, r"was trained for stage 2 \(256x256 pixels\) but this cascade has stage 1 alone"),
        ({"alone": {"stage": 3}}, 256, "was trained for stage 3 but this cascade has stages 1 to 2; choose one of these stages, a larger size, or"),
    ],
    ids=str,
)
def test_an_upsampler_of_another_stage_is_refused_before_any_network_runs(small, monkeypatch, given, side, message):
    monkeypatch.setattr(small.unet, "forward", None)
    monkeypatch.setattr(small.text_encoder, "forward", None)
    made = {stage: phi(small, **config) for stage, config in given.items()}
    with pytest.raises(SettingsError, match=message):
        sample(small, made.get("alone", made), side)


def test_what_is_no_upsampler_is_refused(small):
    with pytest.raises(SettingsError, match="upsampler is a int; give an upsampler, where one is, or a list or mapping"):
        gather(3)
    with pytest.raises(SettingsError, match="family 'sd', but this one is of family 'small'"):
        sample(small, [FeatureUpsampler.for_base(spec_of(models.unet("sd21")), variant="C")])


def test_the_base_alone_needs_no_upsampler_of_its_stage(small):
    upsampler = phi(small, stage=2)
    assert torch.equal(sample(small, upsampler, 64), sample(small, None, 64))


@pytest.mark.parametrize("config", ZERO, ids=str)
@pytest.mark.parametrize("kind", models.KINDS)
def test_an_upsampler_that_starts_at_zero_changes_no_bit(kind, config):
    """Check 2 for every variant and family: fresh, the tuned prediction is the UNet's own, at skips and on the main path."""
    unet, call = models.unet(kind), case(kind)
    own = unet(call["z"], call["t"], call["encoder_hidden_states"], **rest(call), return_dict=False)[0]
    for inject in ("skip", "main"):
        upsampler = FeatureUpsampler.for_base(spec_of(unet), **{"inject": inject} | config)
        assert torch.equal(unet_with_pivot(unet, upsampler=upsampler, **call), own)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_no_strength_is_the_tuning_free_cascade_bit_for_bit(small, config):
    """Also for those that do not start at zero, trained as they may be; with some strength they differ."""
    upsampler = phi(small, **config)
    free = sample(small)
    assert torch.equal(sample(small, upsampler, strength=0.0), free)
    assert not torch.equal(sample(small, upsampler, strength=0.05), free)


@pytest.mark.parametrize("config", [config for config in CONFIGS if config["variant"] != "B"], ids=str)
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_what_is_added_is_linear_in_the_strength(config, strength):
    """Of every skip that reaches the decoder, h + strength * phi: equation 8 with a factor."""
    unet, call = models.unet("sd21"), case("sd21")
    upsampler = randomised(FeatureUpsampler.for_base(spec_of(unet), **config))
    own = decoder_skips(unet, lambda: unet(call["z"], call["t"], call["encoder_hidden_states"]))
    features = pivot_features(unet, call["pivot"], call["t"], call["encoder_hidden_states"])
    emb = unet.time_embedding(unet.time_proj(call["t"].expand(2)))
    found = decoder_skips(unet, lambda: unet_with_pivot(unet, upsampler=upsampler, strength=strength, **call))
    expected = list(own)
    for level, index in enumerate((2, 5, 8, 11)):
        expected[index] = own[index] + strength * upsampler(level, features[level], t=call["t"].expand(2), emb=emb, size=own[index].shape[-2:])
    for seen, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(seen, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("t_min", [0, 100, 101, 999])
def test_an_upsampler_guides_while_t_is_above_t_min(small, t_min):
    """Counted: at the steps of the later stage whose timestep is above it, and at none where it is above all."""
    upsampler, times = phi(small), []
    handle = upsampler.levels[0].register_forward_hook(lambda *_: times.append(None))
    latent = sample(small, upsampler, num_inference_steps=10, t_min=t_min)
    handle.remove()
    steps = [t for t in range(1, 1001, 100) if t <= 700]
    assert len(times) == sum(t > t_min for t in steps)
    if t_min == 999:
        assert torch.equal(latent, sample(small, num_inference_steps=10))


def case(kind):
    """What one call takes besides UNet and upsampler."""

    def normal(*shape, seed):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    call = {"z": normal(2, 4, 16, 16, seed=1), "pivot": normal(2, 4, 8, 8, seed=2), "t": torch.tensor(501)}
    if kind == "sdxl":
        ids = torch.tensor([[128.0, 128, 0, 0, 128, 128]] * 2)
        extra = {"added_cond_kwargs": {"text_embeds": normal(2, models.TEXT, seed=3), "time_ids": ids}}
        return call | {"encoder_hidden_states": normal(2, 12, 2 * models.TEXT, seed=4)} | extra
    return call | {"encoder_hidden_states": normal(2, 12, models.TEXT, seed=4)}


def rest(call):
    return {name: value for name, value in call.items() if name == "added_cond_kwargs"}


def decoder_skips(unet, run):
    """The skips that the decoder is handed, by their index."""
    seen = []
    handles = [
        block.register_forward_pre_hook(lambda block, args, kwargs: seen.append(kwargs["res_hidden_states_tuple"]), with_kwargs=True)
        for block in unet.up_blocks
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return [skip for skips in reversed(seen) for skip in skips]
