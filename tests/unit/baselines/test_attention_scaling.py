"""Attention scaling: the factors of the table, the attention they make, and a UNet that is as it was afterwards."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import log, sqrt

import models
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from hypothesis import given
from hypothesis import strategies as st

from selfcascade import SelfCascadePipeline
from selfcascade.baselines import attention_scaling
from selfcascade.baselines.attention_scaling import attention_factor, scaled_attention
from selfcascade.cascade.families import spec_of
from selfcascade.cascade.injection import attached, unet_with_pivot
from selfcascade.cascade.published import published_unet
from selfcascade.cascade.upsampler import FeatureUpsampler
from selfcascade.settings import SettingsError

SD21 = {4: (1.0801, 1.0954, 1.1180, 1.1547), 16: (1.1547, 1.1832, 1.2247, 1.2910)}
"""Method section 11: pixel ratio to the factors of the four levels."""


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def call_of(batch: int = 2, *, seed: int = 0) -> dict:
    return {
        "sample": normal(batch, 4, 16, 16, seed=seed),
        "timestep": torch.tensor(681),
        "encoder_hidden_states": normal(batch, 12, models.TEXT, seed=seed + 1),
    }


def hooks(unet) -> list:
    return [(name, key, list(value)) for name, module in unet.named_modules() for key, value in vars(module).items() if "hooks" in key and value is not None]


@pytest.mark.parametrize("ratio", SD21)
@torch.no_grad()
def test_the_factors_of_sd_21_are_those_of_the_table(ratio):
    """The real UNet at full width and the real latent, without memory: every level's own tokens give the listed factor."""
    side = int(64 * sqrt(ratio))
    seen = set()
    with torch.device("meta"):
        unet = published_unet("sd-2.1-base")
        for attention in attention_scaling._self_attentions(unet):
            attention.to_q.register_forward_hook(lambda _, args, queries: seen.add(queries.shape[1]))
        unet(torch.empty(1, 4, side, side), torch.tensor(1), torch.empty(1, 77, 1024))
    assert sorted(seen, reverse=True) == [side**2, side**2 // 4, side**2 // 16, side**2 // 64]
    assert [round(attention_factor(tokens, ratio), 4) for tokens in sorted(seen, reverse=True)] == list(SD21[ratio])


@given(st.floats(1.0, 1e4), st.floats(2.0, 1e6))
def test_the_factor_is_the_root_of_the_ratio_of_logarithms(ratio, trained):
    """``factor^2 log N_train = log N_test``: as many more bits as there are more tokens; 1 where there are no more."""
    assert attention_factor(trained * ratio, ratio) ** 2 * log(trained) == pytest.approx(log(trained * ratio))
    assert attention_factor(trained, 1.0) == 1.0


@pytest.mark.parametrize("processor", [AttnProcessor2_0(), AttnProcessor(), SlicedAttnProcessor(2)], ids=lambda processor: type(processor).__name__)
@torch.no_grad()
def test_attention_is_the_softmax_with_the_scaled_factor(processor):
    """In float64, to 1e-12, whichever processor computes it; cross-attention is left bit for bit."""
    unet = models.unet("small").double()
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    block.attn1.set_processor(processor)
    x, text = normal(2, 64, 64), normal(2, 12, models.TEXT, seed=1)
    crossed = block.attn2(x, encoder_hidden_states=text)
    with scaled_attention(unet, 4.0):
        found = block.attn1(x)
        assert torch.equal(block.attn2(x, encoder_hidden_states=text), crossed)
    q, k, v = (layer(x).unflatten(2, (block.attn1.heads, -1)).transpose(1, 2) for layer in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v))
    scale = sqrt(log(64) / log(16)) / sqrt(q.shape[-1])
    expected = block.attn1.to_out[0](((q @ k.transpose(2, 3)) * scale).softmax(-1).matmul(v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    assert not torch.allclose(block.attn1(x), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["small", "sd21"])
@torch.no_grad()
def test_every_level_has_the_factor_of_its_own_tokens(kind):
    """The whole UNet, against one whose query weights were multiplied by the factor of their level, in float64."""
    unet, call = models.unet(kind).double(), call_of()
    tokens = {}
    for name, module in unet.named_modules():
        if name.endswith("attn1.to_q"):
            module.register_forward_hook(lambda _, args, queries, name=name: tokens.__setitem__(name, queries.shape[1]))
    plain = unet(**call).sample
    assert len(set(tokens.values())) == (2 if kind == "small" else 4)
    with scaled_attention(unet, 2.0):
        found = unet(**call).sample
    by_hand = copy.deepcopy(unet)
    for name, count in tokens.items():
        by_hand.get_submodule(name).weight *= sqrt(log(count) / log(count / 2))
    torch.testing.assert_close(found, by_hand(**call).sample, atol=1e-10, rtol=1e-10)
    assert not torch.allclose(found, plain, atol=1e-5)


@torch.no_grad()
def test_a_videos_frames_are_scaled_over_space_alone():
    """Two videos of three frames: as queries multiplied by hand in the spatial layers; attention over time is left."""
    unet = models.unet("video").double()
    call = call_of() | {"sample": normal(2, 4, 3, 16, 16)}
    with scaled_attention(unet, 2.0):
        found = unet(**call).sample
    by_hand = copy.deepcopy(unet)
    tokens = {"down_blocks.0": 256, "down_blocks.1": 64, "down_blocks.2": 16, "mid_block": 4, "up_blocks.1": 16, "up_blocks.2": 64, "up_blocks.3": 256}
    for block, count in tokens.items():
        for attention in by_hand.get_submodule(block).attentions:
            attention.transformer_blocks[0].attn1.to_q.weight *= sqrt(log(count) / log(count / 2))
    torch.testing.assert_close(found, by_hand(**call).sample, atol=1e-10, rtol=1e-10)
    assert not torch.allclose(found, unet(**call).sample, atol=1e-6)


@torch.no_grad()
def test_afterwards_the_unet_is_untouched():
    unet, call = models.unet("small").double(), call_of()
    before, weights, expected = hooks(unet), copy.deepcopy(unet.state_dict()), unet(**call).sample
    with scaled_attention(unet, 4.0):
        assert hooks(unet) != before
        unet(**call)
    with pytest.raises(RuntimeError), scaled_attention(unet, 4.0):
        unet(**call | {"encoder_hidden_states": normal(2, 12, 7)})
    assert hooks(unet) == before
    assert all(torch.equal(value, weights[name]) for name, value in unet.state_dict().items())
    assert torch.equal(unet(**call).sample, expected)


@torch.no_grad()
def test_blocks_nest_and_the_innermost_ratio_counts():
    """Also inside the cascade's own hooks, and around a pass that is guided by a pivot with nothing to add."""
    unet, call = models.unet("small").double(), call_of()
    with scaled_attention(unet, 2.0):
        two = unet(**call).sample
    upsampler = FeatureUpsampler.for_base(spec_of(unet), variant="C").double()
    with scaled_attention(unet, 4.0):
        four = unet(**call).sample
        with attached(unet), scaled_attention(unet, 2.0):
            assert torch.equal(unet(**call).sample, two)
            guided = unet_with_pivot(unet, *call.values(), upsampler=upsampler, pivot=call["sample"][..., ::2, ::2])
            torch.testing.assert_close(guided, two)
        assert torch.equal(unet(**call).sample, four)
    assert not torch.allclose(two, four, atol=1e-6)
    assert not any(module._forward_hooks for module in unet.modules())


@torch.no_grad()
def test_threads_share_a_unet():
    """Check 11: threads with their own ratio, and one without, in lockstep: the bits of the same calls in a row."""
    unet, call = models.unet("small").double(), call_of()

    def scaled(ratio: float) -> torch.Tensor:
        with scaled_attention(unet, ratio):
            return unet(**call).sample

    calls = [*(partial(scaled, ratio) for ratio in (2.0, 4.0)), lambda: unet(**call).sample]
    expected = [once() for once in calls]
    start = threading.Barrier(3)

    @torch.no_grad()
    def same(once, wanted: torch.Tensor) -> bool:
        start.wait()
        return all(torch.equal(once(), wanted) for _ in range(6))

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(same, calls, expected)) == [True] * 3
    assert not any(module._forward_hooks for module in unet.modules())


def test_it_works_in_a_stock_pipeline_as_in_the_cascades():
    stock = models.base("small")
    stock.set_progress_bar_config(disable=True)
    pipeline = SelfCascadePipeline.from_pipe(stock)
    pipeline.set_progress_bar_config(disable=True)
    call = {"height": 128, "width": 192, "num_inference_steps": 3, "output_type": "latent"}
    ours = attention_scaling.sample(pipeline, "a red cat", eta=0.0, generator=torch.Generator().manual_seed(0), **call).images
    plain = stock("a red cat", generator=torch.Generator().manual_seed(0), **call).images
    with scaled_attention(stock.unet, 128 * 192 / 64**2):
        assert torch.equal(ours, stock("a red cat", generator=torch.Generator().manual_seed(0), **call).images)
    assert not torch.allclose(ours, plain, atol=1e-4)


def test_a_sample_of_a_batch_of_four_is_the_sample_alone():
    """With ancestral noise from each sample's own generator."""
    pipeline = SelfCascadePipeline.from_pipe(models.base("small"))
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a red cat", "two blue dog", "a house", "sun"]
    call = {"height": 128, "width": 128, "num_inference_steps": 3, "output_type": "latent"}
    together = attention_scaling.sample(pipeline, prompts, generator=[torch.Generator().manual_seed(seed) for seed in range(4)], **call).images
    for seed, prompt in enumerate(prompts):
        alone = attention_scaling.sample(pipeline, prompt, generator=[torch.Generator().manual_seed(seed)], **call).images
        torch.testing.assert_close(together[seed : seed + 1], alone, atol=1e-4, rtol=1e-4)
    still = attention_scaling.sample(pipeline, prompts[0], eta=0.0, generator=[torch.Generator().manual_seed(0)], **call).images
    assert not torch.allclose(together[:1], still, atol=1e-2)


def test_what_cannot_be_scaled_is_refused():
    unet = models.unet("small")
    with pytest.raises(SettingsError, match="ratio=0 must be positive"), scaled_attention(unet, 0):
        pass
    with pytest.raises(SettingsError, match="needs layers with more than one token in training; 4 tokens at 4 times"):
        attention_factor(4, 4.0)
    with pytest.raises(SettingsError, match="is compiled"), scaled_attention(torch.compile(unet), 4.0):
        pass
    unet.fuse_qkv_projections()
    with pytest.raises(SettingsError, match=r"fused, so that queries cannot be scaled; call unfuse_qkv_projections\(\) first"), scaled_attention(unet, 4.0):
        pass
    with pytest.raises(SettingsError, match="attention-scaling does not apply: the base's deepest level has 1 tokens at its own size"):
        attention_scaling.sample(SelfCascadePipeline.from_pipe(models.base("sd21")), "a cat", height=128, width=128)
