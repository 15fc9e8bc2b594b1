"""Injection: the UNet's own arithmetic with four features added, and the UNet as it was afterwards (checks 2, 5, 7 and 11 of the method)."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import models
import pytest
import torch
from test_upsampler import randomised

from selfcascade.cascade import injection
from selfcascade.cascade.families import spec_of
from selfcascade.cascade.guidance import combine
from selfcascade.cascade.injection import attached, pivot_features, unet_with_pivot
from selfcascade.cascade.upsampler import FeatureUpsampler
from selfcascade.settings import SettingsError

KINDS: tuple[models.Kind, ...] = (*models.KINDS, "video")
FRAMES = 3
VARIANTS = [("A", "skip"), ("A", "main"), ("C", "skip"), ("C", "main")]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case(kind: models.Kind, batch: int = 2, seed: int = 0) -> dict:
    """Everything one call takes but UNet and upsampler: a latent of 16, its pivot of 8, text, and what SDXL wants besides; a video has three frames."""
    width = 2 * models.TEXT if kind == "sdxl" else models.TEXT
    return case_of(width, models.TEXT if kind == "sdxl" else None, (FRAMES,) if kind == "video" else (), batch, seed)


def case_of(width: int, pooled: int | None, frames: tuple[int, ...], batch: int = 2, seed: int = 0) -> dict:
    extra = {}
    if pooled is not None:
        ids = torch.tensor([[128, 128, 0, 0, 128, 128]]).expand(batch, -1)
        extra = {"added_cond_kwargs": {"text_embeds": normal(batch, pooled, seed=seed + 3), "time_ids": ids}}
    return {
        "z": normal(batch, 4, *frames, 16, 16, seed=seed),
        "t": torch.tensor(681),
        "encoder_hidden_states": normal(batch, 12, width, seed=seed + 1),
        "pivot": normal(batch, 4, *frames, 8, 8, seed=seed + 2),
        **extra,
    }


def stock(unet, z, t, encoder_hidden_states, pivot=None, **extra) -> torch.Tensor:
    return unet(z, t, encoder_hidden_states=encoder_hidden_states, return_dict=False, **extra)[0]


def by_hand(unet, inject, z, t, encoder_hidden_states, add=None, added_cond_kwargs=None):
    """The UNet's forward written out block by block: the features at the tap points, and the output with ``add[n]`` added to the n-th of them.

    The frames of a video are laid out by loops here: sample by sample, frame by frame, each with its sample's time and text.
    """
    add = add or [0, 0, 0, 0]
    emb = unet.time_embedding(unet.time_proj(t.expand(len(z))).to(z.dtype))
    if added_cond_kwargs:
        emb = emb + unet.get_aug_embed(emb, encoder_hidden_states, added_cond_kwargs)
    frames, kept = {}, None
    if z.ndim == 5:
        kept, frames = z.shape, {"num_frames": z.shape[2]}
        z = torch.stack([z[b, :, f] for b in range(kept[0]) for f in range(kept[2])])
        emb, encoder_hidden_states = (torch.stack([x[b] for b in range(kept[0]) for _ in range(kept[2])]) for x in (emb, encoder_hidden_states))
    h = unet.conv_in(z)
    if kept:
        h = unet.transformer_in(h, **frames, return_dict=False)[0]
    skips, features = [h], []
    levels = len(unet.down_blocks)
    for level, block in enumerate(unet.down_blocks):
        text = {"encoder_hidden_states": encoder_hidden_states} if hasattr(block, "attentions") else {}
        h, block_skips = block(hidden_states=h, temb=emb, **text, **frames)
        block_skips = list(block_skips)
        if inject == "skip":
            last = len(block.resnets) - 1
            features.append(block_skips[last])
            block_skips[last] = block_skips[last] + add[level]
        elif level < 3:
            features.append(h)
            h = h + add[level]
        skips += block_skips
    h = unet.mid_block(h, emb, encoder_hidden_states=encoder_hidden_states, **frames)
    if inject == "main" or levels == 3:
        features.append(h)
        h = h + add[3]
    for block in unet.up_blocks:
        count = len(block.resnets)
        text = {"encoder_hidden_states": encoder_hidden_states} if hasattr(block, "attentions") else {}
        h = block(hidden_states=h, temb=emb, res_hidden_states_tuple=tuple(skips[-count:]), **text, **frames)
        del skips[-count:]
    out = unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))
    if kept:
        out = torch.stack([torch.stack([out[b * kept[2] + f] for f in range(kept[2])], dim=1) for b in range(kept[0])])
    return features, out, emb


def injected_by_hand(unet, upsampler, inject, z, t, encoder_hidden_states, pivot, **extra) -> torch.Tensor:
    """Equation 8 on the forward written by hand, map by map: each is joined by the upsampled feature of its own sample and frame."""
    common = {"t": t, "encoder_hidden_states": encoder_hidden_states, **extra}
    sources, _, _ = by_hand(unet, inject, pivot, **common)
    targets, _, emb = by_hand(unet, inject, z, **common)
    repeats = len(emb) // len(z)
    times = [x for x in t.expand(len(z)) for _ in range(repeats)]
    add = [
        torch.cat([upsampler(n, source[m : m + 1], t=times[m][None], emb=emb[m : m + 1], size=target.shape[-2:]) for m in range(len(source))])
        for n, (source, target) in enumerate(zip(sources, targets, strict=True))
    ]
    return by_hand(unet, inject, z, add=add, **common)[1]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_unet_split_by_hand_is_the_unet(kind):
    """The yardstick of the tests below reproduces the stock forward bit for bit."""
    unet, call = models.unet(kind), case(kind)
    expected = stock(unet, **call)
    del call["pivot"]
    assert torch.equal(by_hand(unet, "skip", **call)[1], expected)
    assert torch.equal(by_hand(unet, "main", **call)[1], expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inject", ["skip", "main"])
@torch.no_grad()
def test_the_pivots_features_are_those_at_the_tap_points(kind, inject):
    """Bit for bit, and the decoder never runs for them."""
    unet, call = models.unet(kind), case(kind)
    pivot, _ = call.pop("pivot"), call.pop("z")
    expected, _, _ = by_hand(unet, inject, pivot, **call)
    ran = []
    handle = unet.up_blocks[0].register_forward_hook(lambda *_: ran.append(1))
    features = pivot_features(unet, pivot, inject=inject, **call)
    handle.remove()
    assert not ran
    assert len(features) == 4
    assert all(torch.equal(feature.flatten(0, -4), wanted) for feature, wanted in zip(features, expected, strict=True))
    assert {tuple(feature.shape[:-3]) for feature in features} == {(2, FRAMES) if kind == "video" else (2,)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("variant", "inject"), VARIANTS)
@torch.no_grad()
def test_each_feature_is_joined_by_its_upsampled_pivot_feature(kind, variant, inject):
    """Equation 8 at all four tap points, against the forward written by hand, for an upsampler that is not zero."""
    unet, call = models.unet(kind), case(kind)
    upsampler = randomised(FeatureUpsampler.for_base(spec_of(unet), variant=variant, inject=inject))
    out = unet_with_pivot(unet, upsampler=upsampler, **call)
    torch.testing.assert_close(out, injected_by_hand(unet, upsampler, inject, **call), atol=1e-4, rtol=1e-4)
    assert (out - stock(unet, **call)).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("variant", "inject"), VARIANTS)
@torch.no_grad()
def test_a_zero_upsampler_changes_no_bit(kind, variant, inject):
    """Check 2 for one call: what is fresh adds exactly zero."""
    unet, call = models.unet(kind), case(kind)
    upsampler = FeatureUpsampler.for_base(spec_of(unet), variant=variant, inject=inject)
    assert torch.equal(unet_with_pivot(unet, upsampler=upsampler, **call), stock(unet, **call))


def hooks(unet) -> dict:
    return {
        (name, kind): list(getattr(module, kind))
        for name, module in unet.named_modules()
        for kind in vars(module)
        if kind.endswith("_hooks") or kind.startswith("_forward_hooks")
        if isinstance(getattr(module, kind), OrderedDict)
    }


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_detached_is_untouched(kind):
    """After use: every hook table, attribute, weight and output bit is what it was; while attached, a call of the user's own is too."""
    unet, call = models.unet(kind), case(kind)
    before, weights, attributes = hooks(unet), copy.deepcopy(unet.state_dict()), {name: sorted(vars(module)) for name, module in unet.named_modules()}
    expected = stock(unet, **call)
    upsampler = randomised(FeatureUpsampler.for_base(spec_of(unet), variant="C"))
    with attached(unet):
        assert hooks(unet) != before
        unet_with_pivot(unet, upsampler=upsampler, **call)
        assert torch.equal(stock(unet, **call), expected)
    assert hooks(unet) == before
    assert {name: sorted(vars(module)) for name, module in unet.named_modules()} == attributes
    assert all(torch.equal(value, weights[name]) for name, value in unet.state_dict().items())
    assert torch.equal(stock(unet, **call), expected)


@torch.no_grad()
def test_a_copy_of_an_attached_unet_is_guided_once():
    """The copy takes the original's hooks along; they do not answer for it."""
    unet, call = models.unet("small"), case("small")
    upsampler = randomised(FeatureUpsampler.for_base(spec_of(unet), variant="C"))
    expected = unet_with_pivot(unet, upsampler=upsampler, **call)
    with attached(unet):
        twin = copy.deepcopy(unet)
    assert torch.equal(unet_with_pivot(twin, upsampler=upsampler, **call), expected)


@torch.no_grad()
def test_a_unet_is_read_once_an_attachment_and_anew_at_the_next(monkeypatch):
    """Passes inside one block do not look at the networks again; a UNet that lost a level since it was last attached is refused."""
    unet, call, read = models.unet("small"), case("small"), []
    upsampler = randomised(FeatureUpsampler.for_base(spec_of(unet), variant="C"))
    monkeypatch.setattr(injection, "spec_of", lambda unet: read.append(unet) or spec_of(unet))
    with attached(unet):
        for _ in range(3):
            unet_with_pivot(unet, upsampler=upsampler, **call)
    assert read == [unet]
    unet.down_blocks = unet.down_blocks[:2]
    with pytest.raises(SettingsError, match="the cascade needs"):
        unet_with_pivot(unet, upsampler=upsampler, **call)


@torch.no_grad()
def test_an_error_in_the_middle_leaves_nothing_behind():
    unet, call = models.unet("small"), case("small")
    before, expected = hooks(unet), stock(unet, **call)
    with pytest.raises(RuntimeError):
        unet_with_pivot(
            unet, upsampler=FeatureUpsampler.for_base(spec_of(models.unet("sd21")), variant="A"), **call | {"encoder_hidden_states": normal(2, 12, 7)}
        )
    assert hooks(unet) == before
    assert torch.equal(stock(unet, **call), expected)


@torch.no_grad()
def test_guidance_is_the_same_jointly_and_separately():
    """Check 7: two branches in one batch, or one after the other, with the pivot repeated for both; each prompt meets its own pivot."""
    unet, scale = models.unet("small"), 7.5
    call, other = case("small"), case("small", seed=9)
    upsampler = randomised(FeatureUpsampler.for_base(spec_of(unet), variant="A"))
    texts = {"unconditional": other["encoder_hidden_states"], "conditional": call["encoder_hidden_states"]}
    joint = {
        "z": torch.cat([call["z"]] * 2),
        "pivot": torch.cat([call["pivot"]] * 2),
        "t": call["t"],
        "encoder_hidden_states": torch.cat([texts["unconditional"], texts["conditional"]]),
    }
    together = combine(unet_with_pivot(unet, upsampler=upsampler, **joint), scale)
    apart = {name: unet_with_pivot(unet, upsampler=upsampler, **call | {"encoder_hidden_states": text}) for name, text in texts.items()}
    expected = apart["unconditional"] + scale * (apart["conditional"] - apart["unconditional"])
    torch.testing.assert_close(together, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together, together.flip(0), atol=1e-2)


@torch.no_grad()
def test_a_pivot_of_another_batch_is_refused():
    """The released code lets it broadcast, which is right for one prompt alone."""
    unet, call = models.unet("small"), case("small")
    with pytest.raises(ValueError, match="repeat the pivot for every branch"):
        unet_with_pivot(
            unet,
            upsampler=FeatureUpsampler.for_base(spec_of(unet), variant="C"),
            features=pivot_features(unet, **slim(case("small", batch=1))),
            **call | {"pivot": None},
        )


def slim(call: dict) -> dict:
    return {key: value for key, value in call.items() if key != "z"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pivot_t", ["current", "zero"])
@torch.no_grad()
def test_features_computed_before_are_as_good_as_the_pivot(kind, pivot_t):
    unet, call = models.unet(kind), case(kind)
    upsampler = randomised(FeatureUpsampler.for_base(spec_of(unet), variant="C", pivot_t=pivot_t))
    expected = unet_with_pivot(unet, upsampler=upsampler, **call)
    features = pivot_features(unet, **slim(call) | {"t": call["t"] if pivot_t == "current" else 0})
    assert torch.equal(unet_with_pivot(unet, upsampler=upsampler, features=features, **call | {"pivot": None}), expected)


@torch.no_grad()
def test_strength_scales_what_is_added():
    unet, call = models.unet("small"), case("small")
    upsampler = randomised(FeatureUpsampler.for_base(spec_of(unet), variant="C"))
    half = unet_with_pivot(unet, upsampler=upsampler, strength=0.5, **call)
    for phi in upsampler.levels:
        phi.gamma.mul_(0.5)
    torch.testing.assert_close(half, unet_with_pivot(unet, upsampler=upsampler, **call), atol=1e-6, rtol=1e-5)
    assert torch.equal(unet_with_pivot(unet, upsampler=upsampler, strength=0.0, **call), stock(unet, **call))


@pytest.mark.parametrize(("kind", "inject"), [*((kind, inject) for kind in models.KINDS for inject in ("skip", "main")), ("video", "skip")])
def test_only_the_upsampler_learns(kind, inject):
    """Check 5: gradients reach Phi alone, the UNet's weights stay, and the loss on one fixed batch falls."""
    unet, call = models.unet(kind), case(kind) | {"t": torch.tensor([500, 20])}
    unet.requires_grad_(False)
    frozen = copy.deepcopy(unet.state_dict())
    upsampler = FeatureUpsampler.for_base(spec_of(unet), variant="C", inject=inject)
    optimizer = torch.optim.AdamW(upsampler.parameters(), lr=3e-2, weight_decay=0)
    losses = []
    for _ in range(5):
        loss = (unet_with_pivot(unet, upsampler=upsampler, **call) - normal(*call["z"].shape, seed=5)).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in upsampler.parameters())
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert all(torch.equal(value, frozen[name]) for name, value in unet.state_dict().items())


@pytest.mark.parametrize(("inject", "graph_from"), [("skip", "up_blocks.0"), ("main", "down_blocks.1")])
def test_a_frozen_encoder_runs_without_a_graph(inject, graph_from):
    """No block before the first added feature keeps anything for the backward pass: with skips that is the whole encoder."""
    unet, call = models.unet("sd21").requires_grad_(False), case("sd21")
    tracked = {}
    names = [*(f"down_blocks.{n}" for n in range(4)), "mid_block", "up_blocks.0"]
    handles = [
        unet.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, name=name: tracked.__setitem__(name, any(x.requires_grad for x in tensors(args, kwargs))), with_kwargs=True
        )
        for name in names
    ]
    unet_with_pivot(unet, upsampler=FeatureUpsampler.for_base(spec_of(unet), variant="C", inject=inject), **call)
    for handle in handles:
        handle.remove()
    first = names.index(graph_from)
    assert [tracked[name] for name in names] == [index >= first for index in range(len(names))]


def tensors(args: tuple, kwargs: dict):
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from (item for item in value if isinstance(item, torch.Tensor))


@torch.no_grad()
def test_threads_share_a_unet():
    """Check 11 for single calls: four threads, each with its own upsampler, latent and pivot, many calls in lockstep: the bits of the same calls in a row."""
    unet, spec = models.unet("small"), spec_of(models.unet("small"))
    work = [
        {"upsampler": randomised(FeatureUpsampler.for_base(spec, variant="C", inject=inject), seed), **case("small", seed=10 * seed)}
        for seed, inject in enumerate(["skip", "main", "skip", "main"])
    ]
    expected = [unet_with_pivot(unet, **call) for call in work]
    plain = stock(unet, **case("small"))
    start = threading.Barrier(5)

    @torch.no_grad()
    def same(once, wanted: torch.Tensor) -> bool:
        start.wait()
        return all(torch.equal(once(), wanted) for _ in range(6))

    calls = [*(partial(unet_with_pivot, unet, **call) for call in work), partial(stock, unet, **case("small"))]
    with ThreadPoolExecutor(5) as pool:
        assert list(pool.map(same, calls, [*expected, plain])) == [True] * 5
    assert not any(module._forward_hooks for module in unet.modules())


@pytest.mark.full
@torch.no_grad()
def test_a_compiled_unet_is_guided_if_attached_before():
    """With the hooks there when it is compiled, the result is that of the plain UNet; hooks that come too late are noticed, not ignored."""
    unet, call = models.unet("small"), case("small")
    upsampler = randomised(FeatureUpsampler.for_base(spec_of(unet), variant="C"))
    expected = unet_with_pivot(unet, upsampler=upsampler, **call)
    torch.compiler.reset()
    with attached(unet):
        compiled = torch.compile(unet, backend="eager")
        for _ in range(2):
            torch.testing.assert_close(unet_with_pivot(compiled, upsampler=upsampler, **call), expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(stock(compiled, **call), stock(unet, **call), atol=1e-5, rtol=1e-5)
    torch.compiler.reset()
    compiled = torch.compile(unet, backend="eager")
    stock(compiled, **call)
    with pytest.raises(RuntimeError, match="attach before compiling"):
        unet_with_pivot(compiled, upsampler=upsampler, **call | {"pivot": call["z"]})
    torch.compiler.reset()


@torch.no_grad()
def test_autocast_reaches_through_the_hooks():
    unet, call = models.unet("small"), case("small")
    upsampler = randomised(FeatureUpsampler.for_base(spec_of(unet), variant="A"))
    expected = unet_with_pivot(unet, upsampler=upsampler, **call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = unet_with_pivot(unet, upsampler=upsampler, **call)
    torch.testing.assert_close(out.float(), expected, atol=0.1, rtol=0.1)


@torch.no_grad()
def test_a_unet_with_changed_weights_is_followed_on_both_passes():
    """As a LoRA changes them: hooks sit on blocks and look at features, so whatever a block computes is what is tapped."""
    unet, call = models.unet("small"), case("small")
    upsampler = randomised(FeatureUpsampler.for_base(spec_of(unet), variant="C"))
    layer = unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2.to_v
    low_rank = 0.1 * normal(*layer.weight.shape, seed=1)
    before = unet_with_pivot(unet, upsampler=upsampler, **call)
    handle = layer.register_forward_hook(lambda _, args, out: out + args[0] @ low_rank.T)
    by_hook = unet_with_pivot(unet, upsampler=upsampler, **call)
    handle.remove()
    layer.weight.add_(low_rank)
    torch.testing.assert_close(by_hook, unet_with_pivot(unet, upsampler=upsampler, **call), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(by_hook, before, atol=1e-4)
