"""ScaleCrafter on whole UNets: against networks that were changed by hand, and against guidance that was written out."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import models
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch.nn import Conv2d, Module

from selfcascade import SelfCascadePipeline
from selfcascade.baselines import scalecrafter
from selfcascade.baselines.attention_scaling import scaled_attention
from selfcascade.baselines.dilation_tables import DilationRecipe, recipe_for, resolve_table
from selfcascade.baselines.dispersion import dispersed
from selfcascade.baselines.scalecrafter import redilated
from selfcascade.cascade.families import spec_of
from selfcascade.cascade.injection import attached, unet_with_pivot
from selfcascade.cascade.solver import prepare
from selfcascade.cascade.upsampler import FeatureUpsampler
from selfcascade.config import BaselineSettings, ScaleCrafterSettings
from selfcascade.settings import SettingsError

GRID = torch.arange(981, 0, -20)
"""DDIM's 50 steps."""
SMALL = {"down_blocks.1": 3, "down_blocks.1.downsamplers": 4, "mid_block": 2, "up_blocks.0": 2}
MILD = {"mid_block": 3}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def call_of(kind: models.Kind = "small", batch: int = 2, *, seed: int = 0, t: int = 981) -> dict:
    width = 2 * models.TEXT if kind == "sdxl" else models.TEXT
    call = {"sample": normal(batch, 4, 16, 16, seed=seed), "timestep": torch.tensor(t), "encoder_hidden_states": normal(batch, 12, width, seed=seed + 1)}
    if kind == "sdxl":
        ids = torch.tensor([[128, 128, 0, 0, 128, 128]]).expand(batch, -1)
        call["added_cond_kwargs"] = {"text_embeds": normal(batch, models.TEXT, seed=seed + 3), "time_ids": ids}
    return call


def by_hand(unet: Module, table: dict[str, float], enlarged: tuple[str, ...] = ()) -> Module:
    """A copy whose convolutions are dilated themselves, and enlarged where they are to be."""
    unet = copy.deepcopy(unet)
    layers = dict.fromkeys(resolve_table(unet, dict.fromkeys(enlarged, 1)), 1) | resolve_table(unet, table)
    for name, dilation in layers.items():
        d = int(dilation)
        assert d == dilation
        conv = unet.get_submodule(name)
        conv.dilation, conv.padding = (d, d), (d, d)
        if any(name.startswith(block) for block in enlarged):
            conv.weight = torch.nn.Parameter(dispersed(conv.weight))
            conv.kernel_size, conv.padding = (5, 5), (2 * d, 2 * d)
    return unet


def hooks(unet: Module) -> list:
    return [(name, key, list(value)) for name, module in unet.named_modules() for key, value in vars(module).items() if "hooks" in key and value is not None]


@pytest.mark.parametrize("kind", models.KINDS)
@pytest.mark.parametrize("factor", [2, 4])
@torch.no_grad()
def test_the_hooked_unet_is_the_unet_with_dilated_convolutions(kind, factor):
    """The family's own tables at their first step, dispersed kernels among them, in float64, to 1e-10."""
    unet, call = models.unet(kind).double(), call_of(kind)
    side = factor * models.NATIVE
    recipe = recipe_for(spec_of(unet), side, side, ScaleCrafterSettings())
    assert bool(recipe.dispersed) == (factor == 4 and kind != "sdxl")
    with redilated(unet, recipe, GRID, guidance=False):
        found = unet(**call).sample
    torch.testing.assert_close(found, by_hand(unet, recipe.dilations, recipe.dispersed)(**call).sample, atol=1e-10, rtol=1e-10)
    assert not torch.allclose(found, unet(**call).sample, atol=1e-4)


@torch.no_grad()
def test_only_the_first_steps_are_dilated_and_progressively_less():
    """Step by step of a grid of 50 and of one of 10, against copies that were dilated by hand; the table is that of the step of 50."""
    unet = models.unet("small").double()
    recipe = DilationRecipe({"mid_block": 4}, tau=20, progressive=True)
    copies = {d: by_hand(unet, {"mid_block": d}) for d in (1, 2, 3, 4)}
    for grid, steps in ((GRID, (0, 5, 9, 10, 15, 19, 20, 49)), (torch.arange(901, 0, -100), range(10))):
        for step in steps:
            call, of_50 = call_of(t=int(grid[step])), step * 50 // len(grid)
            d = max(-(-4 * (20 - of_50) // 20), 2) if of_50 < 20 else 1
            with redilated(unet, recipe, grid):
                found = unet(**call).sample
            torch.testing.assert_close(found, copies[d](**call).sample, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("kind", "dispersing"), [("small", ()), ("small", ("mid_block",)), ("sd21", ()), ("sdxl", ())])
@torch.no_grad()
def test_noise_damped_guidance_is_three_passes_by_hand(kind, dispersing):
    """``e_base(u) + g (e_dil(c) - e_dil(u))`` of three networks that were changed by hand, for two prompts; then ordinary guidance from its tau on."""
    unet, scale = models.unet(kind).double(), 7.5
    call = call_of(kind, batch=4)
    table, mild = ({"mid_block": 2, "up_blocks.0": 2}, MILD)
    recipe = DilationRecipe(table, tau=20, tau_damped=10, damped=mild, dispersed=dispersing)
    dilated, damped = by_hand(unet, table, dispersing), by_hand(unet, mild, dispersing)

    def half(first: bool) -> dict:
        rows = slice(0, 2) if first else slice(2, 4)
        cut = {key: value[rows] if torch.is_tensor(value) and value.ndim else value for key, value in call.items()}
        return cut | ({"added_cond_kwargs": {key: value[rows] for key, value in call["added_cond_kwargs"].items()}} if kind == "sdxl" else {})

    for t, base in ((981, damped), (981 - 20 * 9, damped), (981 - 20 * 10, dilated), (981 - 20 * 20, None)):
        call["timestep"] = torch.tensor(t)
        difference = dilated(**half(False)).sample - dilated(**half(True)).sample
        with redilated(unet, recipe, GRID):
            unconditional, conditional = unet(**call).sample.chunk(2)
            extra = {"added_cond_kwargs": call["added_cond_kwargs"]} if kind == "sdxl" else {}
            tuple_form = unet(call["sample"], call["timestep"], call["encoder_hidden_states"], return_dict=False, **extra)
        assert torch.equal(tuple_form[0], torch.cat([unconditional, conditional]))
        if base is None:
            torch.testing.assert_close(torch.cat([unconditional, conditional]), unet(**call).sample)
            continue
        expected = base(**half(True)).sample + scale * difference
        torch.testing.assert_close(unconditional + scale * (conditional - unconditional), expected, atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_a_videos_frames_are_dilated_over_space_alone():
    """No table is published, so by one of the caller's own; damping takes the halves of the batch of videos, not of frames."""
    unet, table = models.unet("video").double(), {"mid_block": 2, "down_blocks.1": 3}
    call = call_of() | {"sample": normal(2, 4, 3, 16, 16)}
    halves = [{key: value[rows] if value.ndim else value for key, value in call.items()} for rows in (slice(0, 1), slice(1, 2))]
    dilated = by_hand(unet, table)
    with redilated(unet, DilationRecipe(table, tau_damped=20), GRID):
        unconditional, conditional = unet(**call).sample.chunk(2)
    base, difference = unet(**halves[0]).sample, dilated(**halves[1]).sample - dilated(**halves[0]).sample
    torch.testing.assert_close(unconditional, base, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(conditional, base + difference, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_timesteps_a_sample_are_one_step_or_refused():
    unet = models.unet("small").double()
    call = call_of() | {"timestep": torch.tensor([981, 981])}
    recipe = DilationRecipe({"mid_block": 2}, tau_damped=20)
    with redilated(unet, recipe, GRID):
        found = unet(**call).sample
        torch.testing.assert_close(found, unet(**call_of()).sample)
        with pytest.raises(SettingsError, match="all samples of a batch must be at one timestep"):
            unet(**call | {"timestep": torch.tensor([981, 961])})
        with pytest.raises(SettingsError, match="both branches in one batch, but the batch has 3"):
            unet(**call_of(batch=3))


@pytest.mark.parametrize("dispersing", [(), ("mid_block",)], ids=["plain", "dispersed"])
@torch.no_grad()
def test_afterwards_the_unet_is_untouched(dispersing):
    """Hook tables, attributes, weights and output bits, also after an error in the middle of a pass."""
    unet, call = models.unet("small").double(), call_of()
    before, weights, expected = hooks(unet), copy.deepcopy(unet.state_dict()), unet(**call).sample
    attributes = {name: sorted(vars(module)) for name, module in unet.named_modules()}
    recipe = DilationRecipe(SMALL, tau_damped=20, damped=MILD, dispersed=dispersing)
    with redilated(unet, recipe, GRID):
        assert hooks(unet) != before
        unet(**call)
    with pytest.raises(RuntimeError), redilated(unet, recipe, GRID):
        unet(**call | {"encoder_hidden_states": normal(2, 12, 7)})
    assert hooks(unet) == before
    assert {name: sorted(vars(module)) for name, module in unet.named_modules()} == attributes
    assert all(torch.equal(value, weights[name]) for name, value in unet.state_dict().items())
    assert torch.equal(unet(**call).sample, expected)
    assert scalecrafter._PASS.get() is None


@torch.no_grad()
def test_blocks_nest_among_each_other_and_with_other_hooks():
    """The innermost recipe counts; scaled attention and the cascade's hooks keep their own effect inside."""
    unet, call = models.unet("small").double(), call_of()
    outer, inner = DilationRecipe(SMALL), DilationRecipe(MILD)
    by_outer, by_inner = by_hand(unet, SMALL)(**call).sample, by_hand(unet, MILD)(**call).sample
    upsampler = FeatureUpsampler.for_base(spec_of(unet), variant="C").double()
    for phi in upsampler.parameters():
        phi.data += 0.1 * normal(*phi.shape, seed=7)
    pivot = call["sample"][..., ::2, ::2]
    guided = unet_with_pivot(by_hand(unet, SMALL), *call.values(), upsampler=upsampler, pivot=pivot)
    with attached(unet), redilated(unet, outer, GRID, guidance=False):
        torch.testing.assert_close(unet(**call).sample, by_outer)
        torch.testing.assert_close(unet_with_pivot(unet, *call.values(), upsampler=upsampler, pivot=pivot), guided)
        with redilated(unet, inner, GRID, guidance=False):
            torch.testing.assert_close(unet(**call).sample, by_inner)
        torch.testing.assert_close(unet(**call).sample, by_outer)
        with scaled_attention(unet, 2.0):
            both = unet(**call).sample
    with scaled_attention(twin := by_hand(unet, SMALL), 2.0):
        torch.testing.assert_close(both, twin(**call).sample)
    assert not torch.allclose(guided, by_outer, atol=1e-4)


@torch.no_grad()
def test_threads_share_a_unet():
    """Check 11: threads with recipes of their own, damped and not, and one without, in lockstep: the bits of the same calls in a row."""
    unet, call = models.unet("small").double(), call_of()
    recipes = [DilationRecipe(SMALL, tau_damped=20, damped=MILD), DilationRecipe({"up_blocks.0": 3}, dispersed=("mid_block",))]

    def under(recipe: DilationRecipe) -> torch.Tensor:
        with redilated(unet, recipe, GRID):
            return unet(**call).sample

    calls = [*(partial(under, recipe) for recipe in recipes), lambda: unet(**call).sample]
    expected = [once() for once in calls]
    start = threading.Barrier(3)

    @torch.no_grad()
    def same(once, wanted: torch.Tensor) -> bool:
        start.wait()
        return all(torch.equal(once(), wanted) for _ in range(5))

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(same, calls, expected)) == [True] * 3
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


class Wrapped(Module):
    """An adapter around a convolution, of the shape that peft gives it: the convolution and a low-rank path beside it."""

    def __init__(self, convolution: Conv2d) -> None:
        super().__init__()
        self.base_layer = convolution
        self.lora_A = torch.nn.ModuleDict({"default": Conv2d(convolution.in_channels, 2, 3, convolution.stride, 1, bias=False).double()})
        self.lora_B = torch.nn.ModuleDict({"default": Conv2d(2, convolution.out_channels, 1, bias=False).double()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


@torch.no_grad()
def test_an_adapted_convolution_is_dilated_with_its_adapter():
    """As if the adapter had been fused first; only dispersion, which needs the kernel itself, is refused."""
    unet, call = models.unet("small").double(), call_of()
    fused = copy.deepcopy(unet)
    wrapper = Wrapped(unet.mid_block.resnets[0].conv1)
    unet.mid_block.resnets[0].conv1 = wrapper
    fused.mid_block.resnets[0].conv1.weight += torch.einsum("or,rihw->oihw", wrapper.lora_B["default"].weight[..., 0, 0], wrapper.lora_A["default"].weight)
    with redilated(unet, DilationRecipe(SMALL), GRID, guidance=False):
        found = unet(**call).sample
    torch.testing.assert_close(found, by_hand(fused, SMALL)(**call).sample, atol=1e-10, rtol=1e-10)
    with pytest.raises(SettingsError, match=r"needs the kernel of 'mid_block.resnets.0.conv1', which an adapter wraps; fuse the adapter first"):
        redilated(unet, DilationRecipe(SMALL, dispersed=("mid_block",)), GRID).__enter__()


@pytest.fixture(scope="module")
def pipeline() -> SelfCascadePipeline:
    made = SelfCascadePipeline.from_pipe(models.base("small"))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("side", [128, 256])
def test_it_works_in_a_stock_pipeline_as_in_the_cascades(pipeline, side):
    """4x, and 16x with noise-damped guidance and dispersed kernels: bit for bit the stock pipeline inside the same block."""
    stock = models.base("small")
    stock.set_progress_bar_config(disable=True)
    call = {"height": side, "width": side, "num_inference_steps": 4, "output_type": "latent"}
    ours = scalecrafter.sample(pipeline, "a red cat", eta=0.0, generator=torch.Generator().manual_seed(0), **call).images
    recipe = recipe_for(pipeline.spec, side, side, ScaleCrafterSettings())
    with redilated(stock.unet, recipe, prepare(stock.scheduler, 4).timesteps):
        theirs = stock("a red cat", generator=torch.Generator().manual_seed(0), **call).images
    assert torch.equal(ours, theirs)
    assert not torch.allclose(ours, stock("a red cat", generator=torch.Generator().manual_seed(0), **call).images, atol=1e-3)


@pytest.mark.parametrize("side", [128, 256])
def test_a_sample_of_a_batch_of_four_is_the_sample_alone(pipeline, side):
    """With ancestral noise from each sample's own generator."""
    prompts = ["a red cat", "two blue dog", "a house", "sun"]
    call = {"height": side, "width": side, "num_inference_steps": 3, "output_type": "latent"}
    together = scalecrafter.sample(pipeline, prompts, generator=[torch.Generator().manual_seed(seed) for seed in range(4)], **call).images
    for seed, prompt in enumerate(prompts):
        alone = scalecrafter.sample(pipeline, prompt, generator=[torch.Generator().manual_seed(seed)], **call).images
        torch.testing.assert_close(together[seed : seed + 1], alone, atol=2e-4, rtol=2e-4)
    still = scalecrafter.sample(pipeline, prompts[0], eta=0.0, generator=[torch.Generator().manual_seed(0)], **call).images
    assert not torch.allclose(together[:1], still, atol=1e-2)


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
def test_the_grid_is_that_of_the_call_whatever_the_scheduler(pipeline, monkeypatch, kind):
    """Also where the solver drops a timestep below zero, as of 61 trailing steps."""
    scheduler = kind.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    cascade = SelfCascadePipeline.from_pipe(pipeline, scheduler=scheduler)
    cascade.set_progress_bar_config(disable=True)
    grids, walked = [], []

    def spying(unet, recipe, timesteps, *, guidance):
        grids.append(timesteps)
        return redilated(unet, recipe, timesteps, guidance=guidance)

    def watch(pipe, i, t, tensors):
        walked.append(t)
        return {}

    monkeypatch.setattr(scalecrafter, "redilated", spying)
    call = {"height": 128, "width": 128, "num_inference_steps": 61, "guidance_scale": 1.0, "output_type": "latent"}
    scalecrafter.sample(cascade, "a red cat", callback_on_step_end=watch, **call)
    assert torch.equal(grids[0], torch.stack(walked))
    assert len(scheduler.timesteps) == 1000


def test_without_guidance_there_is_nothing_to_damp(pipeline):
    """One pass a step: the settings' own damping would need the branch that does not run."""
    call = {"height": 256, "width": 256, "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent", "eta": 0.0}
    ours = scalecrafter.sample(pipeline, "a red cat", generator=torch.Generator().manual_seed(0), **call).images
    undamped = BaselineSettings(scalecrafter=ScaleCrafterSettings(tau_damped=0))
    assert torch.equal(ours, scalecrafter.sample(pipeline, "a red cat", settings=undamped, generator=torch.Generator().manual_seed(0), **call).images)


def test_what_does_not_apply_is_one_line(pipeline):
    with pytest.raises(SettingsError, match="scalecrafter does not apply: no dilation table for 512x512, more than 16 times the base's own 64x64"):
        scalecrafter.sample(pipeline, "a cat", height=512, width=512)
    unknown = BaselineSettings(scalecrafter=ScaleCrafterSettings(dilations={"down_blocks.3": 2}))
    with pytest.raises(SettingsError, match=r"the dilation table names 'down_blocks.3', but this UNet has"):
        scalecrafter.sample(pipeline, "a cat", height=128, width=128, settings=unknown)
    with pytest.raises(SettingsError, match="noise-damped guidance needs both branches in one pass at every step"):
        scalecrafter.sample(pipeline, "a cat", height=256, width=256, joint_branches=False)
