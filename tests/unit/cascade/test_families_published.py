"""Published bases: at full width the maps of every stage (method 7.1), and in their real configurations, narrow, the wiring of every tap."""

from __future__ import annotations

from functools import cache

import models
import pytest
import torch
from test_injection import by_hand, case_of, injected_by_hand, stock
from test_upsampler import randomised

from selfcascade.cascade.families import spec_of
from selfcascade.cascade.injection import pivot_features, unet_with_pivot
from selfcascade.cascade.published import PUBLISHED, published_unet
from selfcascade.cascade.upsampler import FeatureUpsampler

# (channels, side of the pivot's map, side of the map that it joins), from shallow to deep, as in the tables of method 7.1.
SD_4X = {
    "skip": [(320, 64, 128), (640, 32, 64), (1280, 16, 32), (1280, 8, 16)],
    "main": [(320, 32, 64), (640, 16, 32), (1280, 8, 16), (1280, 8, 16)],
}
SD_16X = {
    "skip": [(320, 128, 256), (640, 64, 128), (1280, 32, 64), (1280, 16, 32)],
    "main": [(320, 64, 128), (640, 32, 64), (1280, 16, 32), (1280, 16, 32)],
}
SD_768 = {
    "skip": [(320, 96, 192), (640, 48, 96), (1280, 24, 48), (1280, 12, 24)],
    "main": [(320, 48, 96), (640, 24, 48), (1280, 12, 24), (1280, 12, 24)],
}
SDXL_4X = {
    "skip": [(320, 128, 256), (640, 64, 128), (1280, 32, 64), (1280, 32, 64)],
    "main": [(320, 64, 128), (640, 32, 64), (1280, 32, 64), (1280, 32, 64)],
}
SDXL_16X = {
    "skip": [(320, 256, 512), (640, 128, 256), (1280, 64, 128), (1280, 64, 128)],
    "main": [(320, 128, 256), (640, 64, 128), (1280, 64, 128), (1280, 64, 128)],
}
VIDEO_4X = {
    "skip": [(320, 32, 64), (640, 16, 32), (1280, 8, 16), (1280, 4, 8)],
    "main": [(320, 16, 32), (640, 8, 16), (1280, 4, 8), (1280, 4, 8)],
}
STAGES = {
    ("sd-1.5", 64): SD_4X,
    ("sd-2.1-base", 64): SD_4X,
    ("sd-2.1-base", 128): SD_16X,
    ("sd-2.1", 96): SD_768,
    ("sdxl", 128): SDXL_4X,
    ("sdxl", 256): SDXL_16X,
    ("text-to-video", 32): VIDEO_4X,
}
"""By base and latent side of the pivot; the stage has twice that side. The first of a base starts from its own size."""

published = cache(lambda name: on_meta(published_unet, name))
narrow = cache(models.narrow)


def on_meta(build, *args, **config):
    with torch.device("meta"):
        return build(*args, **config)


def call_of(unet) -> dict:
    """A call that the narrow UNet takes, its width of text included."""
    config = unet.config
    size_ids = config.get("addition_embed_type") == "text_time"
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"] if size_ids else None
    return case_of(config["cross_attention_dim"], pooled, (3,) if spec_of(unet).family.frames else ())


@pytest.mark.parametrize("inject", ["skip", "main"])
@pytest.mark.parametrize(("name", "side"), STAGES)
@torch.no_grad()
def test_every_stage_joins_the_maps_of_the_methods_table(name, side, inject):
    """Whole UNets on the meta device, guided by variant A, whose numbers are 145,457,280: what Phi gets and to which size, level by level, and the output."""
    unet = published(name)
    spec = spec_of(unet)
    first = min(other for base, other in STAGES if base == name)
    assert spec.native == (8 * first, 8 * first)
    frames = () if spec.family.frames is None else (16,)
    assert spec.family.frames in (None, *frames)
    maps = 2 * (frames[0] if frames else 1)
    phi = on_meta(FeatureUpsampler.for_base, spec, variant="A", inject=inject)
    assert sum(parameter.numel() for parameter in phi.parameters()) == 145_457_280

    seen = []
    for level in phi.levels:
        level.register_forward_hook(lambda _, args, kwargs, out: seen.append((args[0].shape, kwargs["size"], out.shape, kwargs["emb"].shape)), with_kwargs=True)
    call = {
        argument: value.to("meta") if isinstance(value, torch.Tensor) else {key: tensor.to("meta") for key, tensor in value.items()}
        for argument, value in call_of(unet).items()
    }
    call["z"] = torch.empty(2, 4, *frames, 2 * side, 2 * side, device="meta")
    call["pivot"] = torch.empty(2, 4, *frames, side, side, device="meta")
    assert unet_with_pivot(unet, upsampler=phi, **call).shape == call["z"].shape
    expected = STAGES[name, side][inject]
    assert [(tuple(got), tuple(size), tuple(out), tuple(emb)) for got, size, out, emb in seen] == [
        ((maps, channels, below, below), (above, above), (maps, channels, above, above), (maps, 1280)) for channels, below, above in expected
    ]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_narrow_base_is_the_real_one_but_for_its_widths(name):
    """Level for level and layer for layer: the modules are the real ones, and every width is an eighth."""
    real, small = published(name), narrow(name)
    assert [(path, type(module)) for path, module in small.named_modules()] == [(path, type(module)) for path, module in real.named_modules()]
    spec, own = spec_of(real), spec_of(small)
    assert own.channels("skip") == tuple(width // 8 for width in spec.channels("skip"))
    assert (own.family, own.native, own.latent_step) == (spec.family, spec.native, spec.latent_step)
    assert own.time_width / own.channels("skip")[0] == spec.time_width / spec.channels("skip")[0] == 4


@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_a_published_unet_split_by_hand_is_the_unet(name):
    """Bit for bit; and each of the pivot's features is the map read by hand."""
    unet = narrow(name)
    call = call_of(unet)
    expected = stock(unet, **call)
    pivot = call.pop("pivot")
    for inject in ("skip", "main"):
        assert torch.equal(by_hand(unet, inject, **call)[1], expected)
        wanted = by_hand(unet, inject, **call | {"z": pivot})[0]
        features = pivot_features(unet, pivot, inject=inject, **{key: value for key, value in call.items() if key != "z"})
        assert all(torch.equal(feature.flatten(0, -4), read) for feature, read in zip(features, wanted, strict=True))


@pytest.mark.parametrize("inject", ["skip", "main"])
@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_injection_reaches_every_tap_of_a_published_unet(name, inject):
    """A fresh upsampler changes no bit; one that is not zero adds to each map what equation 8 says, by hand, and every one of its levels matters."""
    unet = narrow(name)
    call = call_of(unet)
    plain = stock(unet, **call)
    phi = FeatureUpsampler.for_base(spec_of(unet), variant="C", inject=inject)
    assert torch.equal(unet_with_pivot(unet, upsampler=phi, **call), plain)
    randomised(phi)
    expected = injected_by_hand(unet, phi, inject, **call)
    torch.testing.assert_close(unet_with_pivot(unet, upsampler=phi, **call), expected, atol=1e-4, rtol=1e-4)
    for level in phi.levels:
        kept = level.gamma.clone()
        level.gamma.zero_()
        assert (unet_with_pivot(unet, upsampler=phi, **call) - expected).abs().max() > 1e-3
        level.gamma.copy_(kept)
