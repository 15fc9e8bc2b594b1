"""The ladder of parameter counts on the real configurations of published bases, on the meta device (check 4)."""

from __future__ import annotations

import models
import pytest
import torch
from torch import nn

from selfcascade.cascade.ladder import ladder, lora_parameters
from selfcascade.cascade.published import PUBLISHED, published_unet
from selfcascade.cascade.upsampler import count_parameters
from selfcascade.settings import SettingsError


@pytest.fixture(scope="module")
def ladders():
    with torch.device("meta"):
        return {name: {rung.name: rung for rung in ladder(published_unet(name))} for name in PUBLISHED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_upsamplers_of_all_published_bases_have_the_same_counts(ladders, name):
    """Method 7.6: their four features have the same channels and their time embedding the same width; variant A is 145,457,280 everywhere."""
    rungs = ladders[name]
    counts = {rung.name: (rung.trained, rung.fitted) for rung in rungs.values() if not rung.name.startswith(("LoRA", "full"))}
    assert counts == {
        "A, the paper's layers": (145_457_280, 0),
        "B, the released code": (145_457_280, 0),
        "A without time linears": (136_439_040, 0),
        "A with depthwise convolutions alone": (126_720, 0),
        "norm scales and offsets of A alone": (28_160, 0),
        "one scale a channel, nothing else": (3_520, 0),
        "C, group-shared": (1_824, 0),
        "D, fixed subspace": (1_488, 14_080),
        "C with fewer groups": (1_216, 0),
    }
    assert rungs["full fine-tuning"].trained == PUBLISHED[name].parameters
    assert [rung.trained for rung in rungs.values()] == sorted((rung.trained for rung in rungs.values()), reverse=True)


def test_lora_on_every_linear_layer_of_sd21_is_what_the_paper_prints(ladders):
    """1.9M and 15M in its table 1."""
    for name in ("sd-2.1-base", "sd-2.1"):
        assert ladders[name]["LoRA rank 4, every linear layer"].trained == 1_938_432
        assert ladders[name]["LoRA rank 32, every linear layer"].trained == 15_507_456


def test_the_claim_is_below_one_scale_a_channel(ladders):
    """72,729 times the claim for the layers of the paper; only C and D are within it, at any published base."""
    for rungs in ladders.values():
        assert round(rungs["A, the paper's layers"].against_the_claim) == 72_729
        assert {rung.name for rung in rungs.values() if rung.against_the_claim <= 1} == {"C, group-shared", "D, fixed subspace", "C with fewer groups"}


def test_a_ladder_counts_what_is_there():
    """A small base whose modules are built: its UNet, and adapters of rank 3 attached to every linear layer by hand."""
    unet = models.unet("sdxl")
    linear = [module for module in unet.modules() if isinstance(module, nn.Linear)]
    adapters = [(nn.Linear(layer.in_features, 3, bias=False), nn.Linear(3, layer.out_features, bias=False)) for layer in linear]
    assert lora_parameters(unet, 3) == sum(parameter.numel() for pair in adapters for half in pair for parameter in half.parameters())
    rungs = {rung.name: rung for rung in ladder(unet)}
    assert rungs["full fine-tuning"].trained == sum(parameter.numel() for parameter in unet.parameters())
    assert rungs["one scale a channel, nothing else"].trained == 32 + 48 + 64 + 64


@pytest.mark.parametrize(
    ("config", "trained"),
    [
        ({"variant": "A", "final": "gate"}, 145_457_284),
        ({"variant": "A", "channels": (320,), "groups": (8,)}, 4_510_080),
        ({"variant": "A", "channels": (640,), "groups": (8,)}, 16_392_960),
        ({"variant": "A", "channels": (1280,), "groups": (8,)}, 62_277_120),
        ({"variant": "C", "groups": (10, 10, 10, 10), "norm_groups": 10}, 1_520),
        ({"variant": "C", "groups": (16, 16, 16, 16)}, 2_432),
    ],
)
def test_counts_by_level_and_by_groups(config, trained):
    """Method sections 7.4 and 7.6."""
    assert count_parameters(**config) == (trained, 0)


def test_a_base_of_another_kind_has_no_ladder():
    with pytest.raises(SettingsError, match="this base is a Linear"):
        ladder(nn.Linear(2, 2))
