"""ScaleCrafter's tables on the real UNets: which convolutions are meant, how much and for how long."""

from __future__ import annotations

import models
import pytest
import torch

from selfcascade.baselines.dilation_tables import RECIPES, DilationRecipe, recipe_for, resolve_table
from selfcascade.cascade.families import spec_of
from selfcascade.cascade.published import published_unet
from selfcascade.config import ScaleCrafterSettings
from selfcascade.settings import SettingsError

REAL = {"sd": "sd-2.1-base", "sdxl": "sdxl"}


@pytest.fixture(scope="module")
def unets():
    with torch.device("meta"):
        found = {family: published_unet(name) for family, name in REAL.items()}
    return found | {"small": models.unet("small")}


def by_block(layers: dict[str, float]) -> dict[str, set[float]]:
    found: dict[str, set[float]] = {}
    for name, dilation in layers.items():
        parts = name.split(".")
        block = "mid" if parts[0] == "mid_block" else f"{parts[0].removesuffix('_blocks')} {parts[1]}" + (" down" if "downsamplers" in parts else "")
        found.setdefault(block, set()).add(dilation)
    return found


EXPECTED = {
    ("sd", 2): {"down 1": {2}, "down 1 down": {2}, "down 2": {2}, "down 2 down": {2}, "down 3": {2}, "mid": {2}, "up 0": {2}, "up 1": {2}, "up 2": {2}},
    ("sd", 4): {"down 2": {3}, "down 2 down": {4}, "down 3": {4}, "mid": {4}, "up 0": {4}, "up 1": {4}, "up 2": {3}, "up 3": {2}},
    ("sdxl", 2): {"mid": {2}, "up 0": {2}},
    ("sdxl", 4): {"down 2": {4}, "mid": {4}, "up 0": {4}, "up 1": {3}, "up 2": {2}},
    ("small", 2): {"down 1": {2}, "down 1 down": {2}, "down 2": {2}, "mid": {2}, "up 0": {2}, "up 1": {2}},
    ("small", 4): {"down 1": {3}, "down 1 down": {4}, "down 2": {4}, "mid": {4}, "up 0": {4}, "up 1": {3}, "up 2": {2}},
}
DAMPED = {
    ("sd", 4): {block: d for block, d in EXPECTED["sd", 4].items() if block != "up 3"},
    ("sdxl", 4): {"mid": {2}, "up 0": {2}},
    ("small", 4): {block: d for block, d in EXPECTED["small", 4].items() if block != "up 2"},
}
SCHEDULES = {("sd", 2): (20, 0, False), ("sd", 4): (37, 37, True), ("sdxl", 2): (30, 0, False), ("sdxl", 4): (35, 35, True)}


@pytest.mark.parametrize("key", RECIPES, ids=str)
def test_the_tables_name_the_convolutions_of_the_real_networks(unets, key):
    """Method section 11, block by block. All 3x3 convolutions of a listed block are meant, the resampling ones too."""
    family, factor = key
    unet = unets[family]
    spec = spec_of(unet)
    recipe = recipe_for(spec, spec.native[0] * factor, spec.native[1] * factor, ScaleCrafterSettings())
    assert recipe == RECIPES[key]
    layers = resolve_table(unet, recipe.dilations)
    assert by_block(layers) == EXPECTED[key]
    assert by_block(resolve_table(unet, recipe.damped)) == DAMPED.get(key, {})
    assert SCHEDULES.get(key, (recipe.tau, recipe.tau_damped, recipe.progressive)) == (recipe.tau, recipe.tau_damped, recipe.progressive)
    listed = tuple(f"{entry}." for entry in recipe.dilations)
    assert set(layers) == {name for name, module in unet.named_modules() if name.startswith(listed) and getattr(module, "kernel_size", 0) == (3, 3)}
    if family == "sd" and factor == 2:
        assert len(layers) == 2 * (2 + 2 + 2 + 2 + 3 + 3 + 3) + 2 + 3  # residual blocks of two each, two down-samplers, three up-samplers


@pytest.mark.parametrize(("family", "spared"), [("sd", {"up 2", "up 3", "down 2"}), ("small", {"up 1", "up 2", "down 1"})])
def test_dispersed_layers_are_the_dilated_ones_of_the_deepest_levels(unets, family, spared):
    recipe = RECIPES[family, 4]
    found = by_block(resolve_table(unets[family], dict.fromkeys(recipe.dispersed, 1.0)))
    assert set(found) == set(EXPECTED[family, 4]) - spared


@pytest.mark.parametrize("full", [2, 3, 4])
@pytest.mark.parametrize("tau", [20, 35, 37])
def test_progressive_dilations_shrink_to_two(full, tau):
    """``max(ceil(d (tau - i) / tau), 2)`` in whole numbers for i < tau, and none from tau on."""
    recipe = DilationRecipe({}, tau=tau, progressive=True)
    assert [recipe.dilation(full, i) for i in range(50)] == [max(-(-full * (tau - i) // tau), 2) if i < tau else 1 for i in range(50)]
    steady = DilationRecipe({}, tau=tau)
    assert [steady.dilation(full, i) for i in range(50)] == [full] * tau + [1] * (50 - tau)


def test_damping_ends_with_its_own_tau_or_with_the_dilation():
    assert [DilationRecipe({}, tau=20, tau_damped=5).damps(step) for step in (0, 4, 5, 30)] == [True, True, False, False]
    assert [DilationRecipe({}, tau=3, tau_damped=50).damps(step) for step in (2, 3)] == [True, False]
    assert not DilationRecipe({}).damps(0)


def test_sizes_between_the_tables_have_fractions():
    """Half way to 2x a side, a dilation of 2 is 1.5; at three times, one of 4 is 3 and one of 3 is 2 1/3; the base's own size has none."""
    spec = spec_of(models.unet("small"))
    side = spec.native[0]
    between = recipe_for(spec, side * 3 // 2, side * 3 // 2, ScaleCrafterSettings())
    assert set(between.dilations.values()) == {1.5}
    above = recipe_for(spec, 3 * side, 3 * side, ScaleCrafterSettings())
    assert above.dilations["mid_block"] == pytest.approx(3)
    assert above.damped["down_blocks.1"] == pytest.approx(1 + 2 * 2 / 3)
    assert above.tau == 37
    assert recipe_for(spec, side, side, ScaleCrafterSettings()).dilations == {}
    assert recipe_for(spec, side, 4 * side, ScaleCrafterSettings()) == RECIPES["small", 2]


def test_settings_replace_the_table():
    spec = spec_of(models.unet("small"))
    side = 2 * spec.native[0]
    found = recipe_for(spec, side, side, ScaleCrafterSettings(tau=5, progressive=True))
    assert found == DilationRecipe(RECIPES["small", 2].dilations, tau=5, progressive=True)
    own = ScaleCrafterSettings(dilations={"mid_block": 3}, damped={"mid_block": 2}, tau_damped=7, dispersed=["mid_block"])
    assert recipe_for(spec, side, side, own) == DilationRecipe({"mid_block": 3}, tau_damped=7, damped={"mid_block": 2}, dispersed=("mid_block",))


def test_what_is_not_there_is_refused_with_what_is():
    unet = models.unet("sdxl")
    found = "down_blocks.0, down_blocks.1, down_blocks.2, mid_block, up_blocks.0, up_blocks.1, up_blocks.2"
    with pytest.raises(SettingsError, match=f"names 'down_blocks.3', but this UNet has 3x3 convolutions in {found} only"):
        resolve_table(unet, {"mid_block": 2, "down_blocks.3": 2})
    with pytest.raises(SettingsError, match=r"names 'down_blocks.2.downsamplers'"):
        resolve_table(unet, {"down_blocks.2.downsamplers": 2})
    spec = spec_of(unet)
    with pytest.raises(SettingsError, match=r"no dilation table for 512x512, more than 16 times the base's own 64x64; set baselines\.scalecrafter\.dilations"):
        recipe_for(spec, 512, 512, ScaleCrafterSettings())
    assert recipe_for(spec, 512, 512, ScaleCrafterSettings(dilations={"mid_block": 8})).dilations == {"mid_block": 8}
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        ScaleCrafterSettings(dilations={"mid_block": 0.5})
