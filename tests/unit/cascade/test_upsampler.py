"""The feature upsampler: counts, zero at the start, its formulas worked out slowly, its folder (check 4 and half of check 2)."""

from __future__ import annotations

import itertools
import json

import models
import pytest
import torch
from torch.nn.functional import conv2d, group_norm, interpolate, silu

from selfcascade.cascade.families import spec_of
from selfcascade.cascade.upsampler import FeatureUpsampler, GroupSharedUpsampler, ResidualUpsampler, count_parameters, load_upsampler
from selfcascade.settings import SettingsError

TINY = {"channels": (32, 48, 64, 64), "time_width": 24, "norm_groups": 16, "groups": (8, 8, 16, 16)}


def randomised(upsampler: FeatureUpsampler, seed: int = 0) -> FeatureUpsampler:
    """As if it had been trained: every parameter is moved off its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in upsampler.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return upsampler


def inputs(level: int, batch: int = 2) -> dict:
    generator = torch.Generator().manual_seed(level)
    feature = torch.randn(batch, TINY["channels"][level], 6, 4, generator=generator)
    return {"feature": feature, "t": torch.tensor([681, 1])[:batch], "emb": torch.randn(batch, 24, generator=generator), "size": (12, 9)}


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({"variant": "A"}, 145_457_280),
        ({"variant": "A", "final": "gate"}, 145_457_284),
        ({"variant": "A", "channels": (320,), "groups": (8,)}, 4_510_080),
        ({"variant": "A", "channels": (640,), "groups": (8,)}, 16_392_960),
        ({"variant": "A", "channels": (1280,), "groups": (8,)}, 62_277_120),
        ({"variant": "C"}, 1_824),
        ({"variant": "C", "groups": (8, 8, 8, 8)}, 1_216),
        ({"variant": "C", "groups": (16, 16, 16, 16)}, 2_432),
    ],
)
def test_the_ladder_of_parameter_counts(config, count):
    """Method sections 7.2, 7.4 and 7.6, at the widths of SD 2.1 and SDXL."""
    assert count_parameters(**config) == count


@pytest.mark.parametrize(("variant", "final"), [("A", "residual"), ("A", "gate"), ("C", "residual")])
@pytest.mark.parametrize("level", range(4))
def test_a_fresh_upsampler_adds_exactly_zero(variant, final, level):
    upsampler = FeatureUpsampler(**TINY, variant=variant, final=final)
    out = upsampler(level, **inputs(level))
    assert out.shape == (2, TINY["channels"][level], 12, 9)
    assert torch.count_nonzero(out) == 0


def test_the_identity_start_is_the_enlarged_feature():
    case = inputs(0)
    out = FeatureUpsampler(**TINY, variant="A", final="identity")(0, **case)
    assert torch.equal(out, interpolate(case["feature"], case["size"], mode="bilinear", align_corners=False))


def test_variant_a_is_two_residual_blocks_on_the_enlarged_feature():
    """Method 7.2, spelled out with functions; "residual" leaves out the enlarged feature, "gate" scales the whole."""
    level, case = 1, inputs(1)
    upsampler = randomised(FeatureUpsampler(**TINY, variant="A"))
    grown = u = interpolate(case["feature"], case["size"], mode="bilinear", align_corners=False)
    for block in upsampler.levels[level].blocks:
        v = conv2d(silu(group_norm(u, 16, block.norm1.weight, block.norm1.bias)), block.conv1.weight, block.conv1.bias, padding=1)
        v = v + (silu(case["emb"]) @ block.time.weight.T + block.time.bias)[:, :, None, None]
        u = u + conv2d(silu(group_norm(v, 16, block.norm2.weight, block.norm2.bias)), block.conv2.weight, block.conv2.bias, padding=1)
    torch.testing.assert_close(upsampler(level, **case), u - grown, atol=1e-5, rtol=1e-5)


def test_variant_c_is_its_formula_channel_by_channel():
    """Method 7.4 with one loop a channel: the kernel, the modulation and the output gate of the channel's group."""
    level, case = 1, inputs(1)
    phi = randomised(FeatureUpsampler(**TINY, variant="C")).levels[level]
    channels, groups = 48, 8
    expected = torch.zeros(2, channels, *case["size"])
    for sample, t in enumerate(case["t"].tolist()):
        s = torch.tensor(t / 1000)
        tau = torch.stack([torch.tensor(1.0), s, torch.cos(torch.pi * s), torch.sin(torch.pi * s)])
        u = interpolate(case["feature"][sample : sample + 1], case["size"], mode="bilinear", align_corners=False)
        for b in range(2):
            v = silu(group_norm(u, 16))
            w = torch.zeros_like(v)
            for c in range(channels):
                g = c // (channels // groups)
                filtered = conv2d(v[:, c : c + 1], phi.kernels[b, g][None, None], padding=1)[:, 0]
                w[:, c] = (1 + phi.scale[b, g] @ tau) * filtered + phi.offset[b, g] @ tau
            u = u + w
        for c in range(channels):
            expected[sample, c] = (phi.gamma[c // (channels // groups)] @ tau) * u[0, c]
    out = phi(case["feature"], t=case["t"], emb=case["emb"], size=case["size"])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_variant_c_treats_the_channels_of_a_group_alike():
    """Exchanging two channels that share both groups exchanges them in the result."""
    case = inputs(2)
    phi = randomised(FeatureUpsampler(**TINY, variant="C")).levels[2]
    swapped = case["feature"].clone()
    swapped[:, [0, 1]] = case["feature"][:, [1, 0]]
    out = phi(**case)
    out[:, [0, 1]] = out[:, [1, 0]]
    torch.testing.assert_close(phi(**case | {"feature": swapped}), out, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("variant", "sees"), [("A", "emb"), ("C", "t")])
def test_an_upsampler_is_aware_of_time(variant, sees):
    case = inputs(0)
    upsampler = randomised(FeatureUpsampler(**TINY, variant=variant))
    other = case | {sees: case[sees].flip(0)}
    assert not torch.allclose(upsampler(0, **case), upsampler(0, **other), atol=1e-3)


@pytest.mark.parametrize(("variant", "moving"), [("A", "conv2"), ("C", "gamma")])
def test_the_first_step_moves_only_what_closes_the_gate(variant, moving):
    """At zero output the gradient reaches the last convolution of a block (A) or Gamma (C) alone; so nothing else may decay meanwhile."""
    upsampler = FeatureUpsampler(**TINY, variant=variant)
    upsampler(0, **inputs(0)).square().sum().backward()  # a zero output has no gradient of its own
    assert all(not parameter.grad.any() for parameter in upsampler.levels[0].parameters())
    upsampler.zero_grad()
    upsampler(0, **inputs(0)).sum().backward()
    moved = {name for name, parameter in upsampler.levels[0].named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert moved
    assert all(moving in name for name in moved)


@pytest.mark.parametrize(
    ("variant", "inject", "final"), [*itertools.product("A", ("skip", "main"), ("residual", "identity", "gate")), ("C", "skip", "residual")]
)
def test_an_upsampler_survives_its_folder(tmp_path, variant, inject, final):
    spec = spec_of(models.unet("sd21"))
    made = FeatureUpsampler.for_base(spec, variant=variant, inject=inject, final=final, pivot_t="zero", base="tiny@" + 64 * "a", size=(128, 128), stage=1)
    upsampler = randomised(made)
    upsampler.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    again = load_upsampler(str(tmp_path))
    known = {key: value for key, value in json.loads((tmp_path / "config.json").read_text()).items() if not key.startswith("_")}
    assert known["channels"] == [32, 48, 64, 64]
    assert {key: again.config[key] for key in ("variant", "inject", "final", "pivot_t", "base", "stage")} == {
        "variant": variant,
        "inject": inject,
        "final": final,
        "pivot_t": "zero",
        "base": "tiny@" + 64 * "a",
        "stage": 1,
    }
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in upsampler.state_dict().items())
    again.check_fits(spec, "tiny@" + 64 * "a")


def test_pickled_weights_are_refused(tmp_path):
    FeatureUpsampler(**TINY, variant="C").save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(SettingsError, match="does not load"):
        load_upsampler(str(tmp_path))


def test_a_missing_upsampler_is_named(tmp_path):
    with pytest.raises(SettingsError, match="no-such-folder"):
        load_upsampler(str(tmp_path / "no-such-folder"))


def test_an_upsampler_of_another_base_is_refused_with_the_way_out():
    spec = spec_of(models.unet("small"))
    upsampler = FeatureUpsampler.for_base(spec, variant="C", base="tiny-emoji@9c1e" + 60 * "0")
    with pytest.raises(
        SettingsError, match=r"was trained for base 'tiny-emoji@9c1e00000000' but the pipeline holds 'other@ffffffffffff'; .* pass --base tiny-emoji"
    ):
        upsampler.check_fits(spec, "other@" + 64 * "f")
    upsampler.check_fits(spec, None)
    with pytest.raises(
        SettingsError, match=r"made for skip features of \(16, 48, 64, 64\) channels and time width 128, but the base has \(32, 48, 64, 64\) and 128"
    ):
        FeatureUpsampler(**TINY | {"time_width": 128, "channels": (16, 48, 64, 64)}).check_fits(spec, None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"variant": "B"}, "variant 'B' is not known"),
        ({"variant": "C", "final": "gate"}, "no final='gate'"),
        ({"variant": "C", "groups": (5, 8, 16, 16)}, "32 upsampler channels do not divide"),
        ({"variant": "A", "norm_groups": 5}, "do not divide into 5 norm groups"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(config, message):
    with pytest.raises(SettingsError, match=message):
        FeatureUpsampler(**TINY | config)


@pytest.mark.parametrize("variant", ["A", "C"])
def test_a_half_precision_upsampler_takes_features_of_any_precision(variant):
    case = inputs(0)
    upsampler = randomised(FeatureUpsampler(**TINY, variant=variant))
    expected = upsampler(0, **case)
    out = upsampler.to(torch.bfloat16)(0, **case)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=0.1, rtol=0.1)
    assert isinstance(upsampler.levels[0], ResidualUpsampler if variant == "A" else GroupSharedUpsampler)
