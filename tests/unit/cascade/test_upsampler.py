"""The feature upsampler as a whole: how it starts, what its first step moves, its folder, what it refuses (check 4 and half of check 2)."""

from __future__ import annotations

import json

import models
import pytest
import torch
from safetensors.torch import load_file, save_file

from selfcascade.cascade.families import spec_of
from selfcascade.cascade.upsampler import FeatureUpsampler, load_upsampler
from selfcascade.settings import SettingsError

TINY = {"channels": (32, 48, 64, 64), "time_width": 24, "norm_groups": 16, "groups": (8, 8, 16, 16)}
CONFIGS = (
    *({"variant": "A", "final": final} for final in ("residual", "gate", "identity")),
    {"variant": "B", "inject": "main", "final": "identity"},
    {"variant": "C"},
    {"variant": "D"},
)
"""Every variant in every form."""
ZERO = tuple(config for config in CONFIGS if config.get("final") != "identity")
"""Those that start at zero."""
BASE = "tiny@" + 64 * "a"


def fresh(**config) -> FeatureUpsampler:
    return FeatureUpsampler(**TINY, **config)


def randomised(upsampler: FeatureUpsampler, seed: int = 0) -> FeatureUpsampler:
    """As if it had been trained: every parameter is moved off its initial value, and variant D has a basis."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in upsampler.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        if upsampler.needs_basis:
            upsampler.set_basis([torch.linalg.qr(torch.randn(level.basis.shape, generator=generator)).Q for level in upsampler.levels])
    return upsampler


def inputs(level: int, batch: int = 2) -> dict:
    generator = torch.Generator().manual_seed(level)
    feature = torch.randn(batch, TINY["channels"][level], 6, 4, generator=generator)
    return {"feature": feature, "t": torch.tensor([681, 1])[:batch], "emb": torch.randn(batch, 24, generator=generator), "size": (12, 9)}


@pytest.mark.parametrize("config", ZERO, ids=str)
@pytest.mark.parametrize("level", range(4))
def test_a_fresh_upsampler_adds_exactly_zero(config, level):
    out = fresh(**config)(level, **inputs(level))
    assert out.shape == (2, TINY["channels"][level], 12, 9)
    assert torch.count_nonzero(out) == 0


@pytest.mark.parametrize(
    ("config", "moving"),
    [({"variant": "A"}, {"conv2"}), ({"variant": "A", "final": "gate"}, {"gate"}), ({"variant": "C"}, {"gamma"}), ({"variant": "D"}, {"gamma", "mixed_gamma"})],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_the_first_step_moves_only_what_closes_the_gate(config, moving):
    """At zero output the gradient reaches the last convolution of a block (A), the gate, Gamma (C) or gamma and Gamma (D) alone."""
    upsampler = randomised_inside(fresh(**config), moving)
    upsampler(0, **inputs(0)).square().sum().backward()  # a zero output has no gradient of its own
    assert all(not parameter.grad.any() for parameter in upsampler.levels[0].parameters())
    upsampler.zero_grad()
    upsampler(0, **inputs(0)).sum().backward()
    moved = {
        name.split(".")[-1] if "conv2" not in name else "conv2" for name, p in upsampler.levels[0].named_parameters() if p.grad is not None and p.grad.any()
    }
    assert moved == moving


def randomised_inside(upsampler: FeatureUpsampler, closed: set[str]) -> FeatureUpsampler:
    """Random in all but what keeps it at zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in upsampler.named_parameters():
            if not closed & set(name.split(".")):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return upsampler


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(("kind", "inject"), [("small", "main"), ("sd21", "skip"), ("sdxl", "main")])
def test_an_upsampler_survives_its_folder(tmp_path, kind, config, inject):
    """Every weight, the basis included, and all that it knows of base, family, size and stage; of three levels the mid block is the fourth."""
    inject = config.get("inject", inject)
    spec = spec_of(models.unet(kind))
    known = {"pivot_t": "zero", "base": BASE, "size": (128, 128), "stage": 2, "shared": True} | config | {"inject": inject}
    upsampler = randomised(FeatureUpsampler.for_base(spec, **known))
    upsampler.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    again = load_upsampler(str(tmp_path))
    told = json.loads((tmp_path / "config.json").read_text())
    assert (told["channels"], told["groups"], told["family"]) == (list(spec.channels(inject)), [8, 8, 16, 16], spec.family.name)
    assert {key: again.config[key] for key in known} == known | {"size": [128, 128]}
    held, loaded = ({**dict(each.named_parameters()), **dict(each.named_buffers())} for each in (upsampler, again))
    assert held.keys() == loaded.keys()
    assert all(torch.equal(value, loaded[name]) for name, value in held.items())
    again.check_fits(spec, BASE)
    assert again.count() == upsampler.count()


def test_pickled_weights_are_refused(tmp_path):
    """Without running them: safetensors only."""
    fresh(variant="C").save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(SettingsError, match=r"has pickled weights \(diffusion_pytorch_model\.bin\).*save it as safetensors"):
        load_upsampler(str(tmp_path))


def test_pickled_weights_beside_safetensors_stay_unread(tmp_path):
    upsampler = randomised(fresh(variant="C"))
    upsampler.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"not even a pickle")
    assert torch.equal(load_upsampler(str(tmp_path)).levels[0].gamma, upsampler.levels[0].gamma)


def test_a_folder_without_safetensors_is_never_unpickled(tmp_path):
    """A safetensors file of another name does not open the way to pickled weights of the right one."""
    fresh(variant="C").save_pretrained(tmp_path, safe_serialization=False)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(SettingsError, match="does not load"):
        load_upsampler(str(tmp_path))


def test_a_missing_upsampler_is_named(tmp_path):
    with pytest.raises(SettingsError, match="no-such-folder"):
        load_upsampler(str(tmp_path / "no-such-folder"))


def test_a_folder_of_something_else_is_refused(tmp_path):
    models.unet("small").save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match="is a UNet2DConditionModel; choose what `selfcascade adapt` has trained"):
        load_upsampler(str(tmp_path))


@pytest.mark.parametrize("damage", ["cut", "missing", "shape"])
def test_damaged_weights_are_refused_in_one_line(tmp_path, damage):
    """A file cut short, without one of its tensors (which diffusers would fill with random numbers), or with one of another shape."""
    fresh(variant="C").save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        tensors = load_file(path)
        tensors.pop("levels.0.gamma") if damage == "missing" else tensors.update({"levels.0.gamma": torch.zeros(3, 4)})
        save_file(tensors, path)
    with pytest.raises(SettingsError, match="does not load") as refusal:
        load_upsampler(str(tmp_path))
    assert "\n" not in str(refusal.value)


def test_an_upsampler_of_another_base_is_refused_with_the_way_out():
    spec = spec_of(models.unet("small"))
    upsampler = FeatureUpsampler.for_base(spec, variant="C", base="tiny-emoji@9c1e" + 60 * "0")
    with pytest.raises(
        SettingsError, match=r"was trained for base 'tiny-emoji@9c1e00000000' but the pipeline holds 'other@ffffffffffff'; .* pass --base tiny-emoji"
    ):
        upsampler.check_fits(spec, "other@" + 64 * "f")
    upsampler.check_fits(spec, None)


def test_an_upsampler_of_other_channels_is_refused():
    with pytest.raises(
        SettingsError, match=r"made for skip features of \(16, 48, 64, 64\) channels and time width 128, but the base has \(32, 48, 64, 64\) and 128"
    ):
        FeatureUpsampler(**TINY | {"time_width": 128, "channels": (16, 48, 64, 64)}).check_fits(spec_of(models.unet("small")), None)


def test_an_upsampler_of_another_family_is_refused():
    """SD 2.1 and a three-level base have features of the same channels; one's upsampler does not fit the other for that."""
    sd, small = spec_of(models.unet("sd21")), spec_of(models.unet("small"))
    assert sd.channels("skip") == small.channels("skip")
    with pytest.raises(SettingsError, match="made for a base of family 'sd', but this one is of family 'small'"):
        FeatureUpsampler.for_base(sd, variant="C").check_fits(small, None)
    fresh(variant="C", stage=1)  # of no family that is known


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"variant": "E"}, "variant 'E' is not known; choose A, B, C or D$"),
        ({"variant": "B"}, "no inject='skip' with final='residual'; set inject to 'main' and final to 'identity'$"),
        ({"variant": "B", "final": "identity"}, "no inject='skip' with final='identity'; set inject to 'main'"),
        ({"variant": "B", "inject": "main"}, "set inject to 'main' and final to 'identity'$"),
        ({"variant": "C", "final": "gate"}, "variant C has no final='gate'"),
        ({"variant": "D", "final": "identity"}, "variant D has no final='identity'"),
        ({"variant": "C", "groups": (5, 8, 16, 16)}, "32 upsampler channels do not divide"),
        ({"variant": "A", "norm_groups": 5}, "do not divide into 5 norm groups"),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_is_refused(config, message):
    with pytest.raises(SettingsError, match=message):
        FeatureUpsampler(**TINY | config)


@pytest.mark.parametrize(
    ("variant", "basis", "message"),
    [
        ("C", lambda c: torch.eye(c, 4), "variant C has no basis"),
        ("D", lambda c: torch.eye(c, 3), r"shape \(32, 3\) is not one of \(32, 4\)"),
        ("D", lambda c: torch.ones(c, 4), "must be orthonormal"),
    ],
)
def test_a_basis_that_is_none_is_refused(variant, basis, message):
    with pytest.raises(ValueError, match=message):
        fresh(variant=variant).set_basis([basis(c) for c in TINY["channels"]])
