"""Compiled blocks: the plain cascade's latents, two compilations a shape of block whatever the sizes and batches, and hooks that go on working."""

from __future__ import annotations

import copy

import models
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from test_cascade_pipeline import PROMPTS, quiet, sample
from test_coexistence import cascade, stock_base
from test_injection import case, hooks, stock
from torch._dynamo.testing import CompileCounter

from selfcascade import SelfCascadePipeline
from selfcascade.baselines.attention_scaling import scaled_attention
from selfcascade.baselines.hidiffusion import hidiffused
from selfcascade.cascade.compilation import compile_blocks, is_compiled
from selfcascade.cascade.families import spec_of
from selfcascade.cascade.injection import attached
from selfcascade.settings import SettingsError

KINDS: tuple[models.Kind, ...] = ("small", "sd21", "video")


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def untuned(pipeline: SelfCascadePipeline) -> SelfCascadePipeline:
    """The same networks, tuning-free."""
    free = SelfCascadePipeline.from_pipe(pipeline)
    free.register_modules(upsampler=None)
    return quiet(free)


def blocks(unet: torch.nn.Module) -> list[BasicTransformerBlock]:
    return [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]


def shapes(unet: torch.nn.Module) -> int:
    """How many kinds of transformer blocks there are."""
    return len({tuple(weight.shape for weight in block.parameters()) for block in blocks(unet)})


@pytest.mark.parametrize(("kind", "inject"), [("small", "skip"), ("sd21", "main"), ("sdxl", "skip")])
def test_the_same_operations_give_the_same_bits(kind, inject):
    """Tuned and tuning-free, two stages: a backend that runs what torch traced as it is. Tuned differs from tuning-free when compiled, so hooks work."""
    pipeline = cascade(stock_base(kind), inject)
    free, unet = untuned(pipeline), pipeline.unet
    expected, plain, before = sample(pipeline, steps=3), sample(free, steps=3), hooks(unet)
    compile_blocks(unet, backend="eager")
    assert is_compiled(unet)
    assert torch.equal(sample(pipeline, steps=3), expected)
    assert torch.equal(sample(free, steps=3), plain)
    assert not torch.equal(expected, plain)
    assert hooks(unet) == before


def test_no_hook_of_a_pivot_is_inside_a_block():
    for kind in KINDS:
        unet = models.unet(kind)
        inside = {module for block in blocks(unet) for module in block.modules()}
        with attached(unet):
            assert not any(module in inside for module in unet.modules() if module._forward_hooks or module._forward_pre_hooks)
            assert any(module._forward_hooks for module in unet.modules())


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.full if kind == "video" else ()) for kind in KINDS])
def test_two_compilations_serve_every_size_and_batch(kind):
    """One for a single row, one for more: sizes square or not, 16 rows of 16 tokens or of 32, texts of any length, with a pivot or without."""
    unet, counter = models.unet(kind), CompileCounter()
    compile_blocks(unet, backend=counter)
    frames = 3 if kind == "video" else 1
    step = spec_of(unet).latent_step

    def run(rows: int, height: int, width: int, words: int = 12) -> None:
        given = case(kind, rows)
        text = torch.randn(rows, words, given["encoder_hidden_states"].shape[-1])
        z = torch.randn(rows, 4, *([frames] if kind == "video" else []), height * step, width * step)
        with torch.no_grad():
            stock(unet, **given | {"z": z, "encoder_hidden_states": text})

    run(16, 4, 4, 16)
    once = counter.frame_count
    assert once == shapes(unet) or (kind == "video" and once <= 2 * shapes(unet))  # blocks over time take no text, and may have the shape of others
    for shape in ((2, 2, 2), (2, 4, 4), (2, 2, 4), (3, 6, 4, 7), (16, 4, 4), (32, 2, 2)):
        run(*shape)
    assert counter.frame_count == once
    run(1, 2, 2)
    both = counter.frame_count
    assert once < both <= 2 * once
    run(1, 4, 2)
    run(5, 2, 2, 9)
    assert counter.frame_count == both


def test_every_shape_of_block_is_compiled():
    """However many there are: torch allows one code object a few compilations, and goes on uncompiled beyond."""
    unet, counter = models.unet("sd21"), CompileCounter()
    compile_blocks(unet, backend=counter)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
        stock(unet, **case("sd21"))
    assert counter.frame_count == shapes(unet) > 2


def test_stages_and_guidance_compile_nothing_more():
    """Three stages of a tuned cascade, guided in an interval: what the base stage compiled for a pair of branches, and once more for one alone."""
    pipeline, counter = cascade(stock_base("small")), CompileCounter()
    compile_blocks(pipeline.unet, backend=counter)
    sample(pipeline, size=64, steps=2)
    once = counter.frame_count
    assert once == shapes(pipeline.unet)
    sample(pipeline, size=256, steps=2)
    assert counter.frame_count == once
    sample(pipeline, size=128, steps=4, guidance_interval=(0.0, 0.4))
    assert counter.frame_count == 2 * once
    pipeline(PROMPTS, sizes=[(64, 96), (128, 192)], num_inference_steps=2, output_type="latent")
    assert counter.frame_count == 2 * once


def test_a_batch_of_one_is_part_of_a_batch_of_four():
    pipeline = cascade(stock_base("small"))
    compile_blocks(pipeline.unet, backend="eager")
    four = sample(pipeline, PROMPTS, steps=3, seeds=range(4))
    for index, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(sample(pipeline, prompt, steps=3, seeds=(index,)), four[index : index + 1], atol=1e-4, rtol=1e-4)


def test_what_the_user_puts_on_a_compiled_unet_works():
    """Hooks on a block run, a copy runs on its own weights, what is compiled stays so, and torch may compile the whole around it."""
    unet, counter = models.unet("small"), CompileCounter()
    given = case("small")
    with torch.no_grad():
        expected = stock(unet, **given)
        compile_blocks(unet, backend=counter)
        compile_blocks(unet, backend="no such backend")
        seen: list[torch.nn.Module] = []
        handles = [block.register_forward_hook(lambda module, *_: seen.append(module)) for block in blocks(unet)]
        assert torch.equal(stock(unet, **given), expected)
        assert set(seen) == set(blocks(unet))
        for handle in handles:
            handle.remove()
        other = copy.deepcopy(unet)
        assert torch.equal(stock(other, **given), expected)
        for parameter in other.parameters():
            parameter.mul_(0)
        assert torch.equal(stock(unet, **given), expected)
        assert not torch.equal(stock(other, **given), expected)
        torch.testing.assert_close(stock(torch.compile(unet, backend="eager"), **given), expected, atol=1e-5, rtol=1e-5)


def test_a_lora_on_a_compiled_unet_works():
    """Loaded before or after, its factor set to another and back to zero."""
    pytest.importorskip("peft")
    from peft import LoraConfig

    unet, given = models.unet("small"), case("small")
    with torch.no_grad():
        plain = stock(unet, **given)
        compile_blocks(unet, backend="eager")
        assert torch.equal(stock(unet, **given), plain)
        unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "style")
        added = stock(unet, **given)
        assert not torch.allclose(added, plain, atol=1e-3)
        unet.disable_adapters()
        torch.testing.assert_close(stock(unet, **given), plain)
        unet.enable_adapters()
        assert torch.equal(stock(unet, **given), added)


@pytest.mark.parametrize("change", [lambda pipe: scaled_attention(pipe.unet, 4.0), hidiffused], ids=["attention scaling", "hidiffusion"])
@pytest.mark.parametrize("way", ["compile_blocks", "forward", "compile"])
def test_what_is_changed_inside_a_compiled_unet_is_refused(change, way):
    """Whichever way it was compiled; in one line."""
    pipeline = models.base("sd21")
    if way == "compile_blocks":
        compile_blocks(pipeline.unet)
    elif way == "forward":
        pipeline.unet.forward = torch.compile(pipeline.unet.forward)
    else:
        pipeline.unet.mid_block.compile()
    with pytest.raises(SettingsError, match=r"^this UNet is compiled, .*; sample with one that is not$"), change(pipeline):
        pass


@pytest.mark.full
def test_compiled_kernels_give_the_same_picture():
    """By inductor: 1e-4 on the latent, tuned and tuning-free, and a sample alone is that of its batch."""
    pipeline = cascade(stock_base("small"))
    free = untuned(pipeline)
    expected, plain = sample(pipeline, PROMPTS[:2], steps=3, seeds=(0, 1)), sample(free, PROMPTS[:2], steps=3, seeds=(0, 1))
    compile_blocks(pipeline.unet)
    found = sample(pipeline, PROMPTS[:2], steps=3, seeds=(0, 1))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sample(free, PROMPTS[:2], steps=3, seeds=(0, 1)), plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sample(pipeline, PROMPTS[0], steps=3), found[:1], atol=1e-4, rtol=1e-4)
