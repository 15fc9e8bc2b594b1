"""Guidance and pivot features step by step: intervals, branches apart, features that serve several steps."""

from __future__ import annotations

import models
import pytest
import torch
from test_cascade_pipeline import PROMPTS, quiet, sample
from test_upsampler import randomised

from selfcascade import SelfCascadePipeline
from selfcascade.cascade.denoiser import take_rows
from selfcascade.cascade.guidance import Guidance
from selfcascade.cascade.pivot import renoise_pivot
from selfcascade.cascade.upsampler import FeatureUpsampler


@pytest.fixture(scope="module", params=models.KINDS)
def tuned(request) -> SelfCascadePipeline:
    pipeline = SelfCascadePipeline.from_pipe(models.base(request.param))
    return quiet(SelfCascadePipeline.from_pipe(pipeline, upsampler=randomised(FeatureUpsampler.for_base(pipeline.spec, variant="C"))))


def with_pivot_time(pipeline: SelfCascadePipeline, pivot_t: str) -> SelfCascadePipeline:
    upsampler = randomised(FeatureUpsampler.for_base(pipeline.spec, variant="C", pivot_t=pivot_t))
    return quiet(SelfCascadePipeline.from_pipe(pipeline, upsampler=upsampler))


def passes(pipeline: SelfCascadePipeline, **call) -> dict[tuple[int, int], int]:
    """How often the UNet's first convolution saw a (batch, latent side)."""
    seen: dict[tuple[int, int], int] = {}

    def count(module, args):
        shape = (len(args[0]), args[0].shape[-1])
        seen[shape] = seen.get(shape, 0) + 1

    handle = pipeline.unet.conv_in.register_forward_pre_hook(count)
    try:
        sample(pipeline, **call)
    finally:
        handle.remove()
    return seen


def test_branches_in_one_pass_or_two_give_the_same_picture(tuned):
    """Check 7, through every step of both stages; two prompts, so that each branch must meet its own pivots and, for SDXL, its own pooled text."""
    call = {"prompt": PROMPTS[:2], "seeds": (0, 1)}
    torch.testing.assert_close(sample(tuned, joint_branches=False, **call), sample(tuned, **call), atol=2e-4, rtol=1e-4)
    assert passes(tuned, joint_branches=False, **call).keys() == {(2, 8), (2, 16)}
    assert passes(tuned, **call).keys() == {(4, 8), (4, 16)}


def test_outside_the_interval_the_conditional_branch_runs_alone(tuned):
    """An interval that holds no timestep of the later stage's grid is no guidance there, bit for bit, and none of the base's business."""
    base = sample(tuned, sizes=[(64, 64)])
    assert torch.equal(sample(tuned, sizes=[(64, 64)], guidance_interval=(0.9999, 1.0)), base)
    assert torch.equal(sample(tuned, guidance_interval=(0.9999, 1.0)), sample(tuned, guidance_scale=1.0, pivot=base))
    assert torch.equal(sample(tuned, guidance_interval=(0.0, 1.0)), sample(tuned))


def test_the_interval_is_closed_and_in_shares_of_all_timesteps():
    guidance = Guidance(5.0, (0.2, 0.6))
    assert [guidance.at(t) for t in (199, 200, 600, 601)] == [False, True, True, False]
    assert guidance.passes(100, batch=3) == [slice(3, 6)]
    assert guidance.passes(300, batch=3) == [slice(0, 6)]
    assert Guidance(5.0, joint=False).passes(300, batch=3) == [slice(0, 3), slice(3, 6)]
    assert Guidance(1.0).passes(300, batch=3) == [slice(0, 3)]


def test_a_guided_interval_by_hand(tuned):
    """Some steps guided: the latents of a loop over the same UNet that takes the scale inside the interval and 1 outside."""
    pipeline = SelfCascadePipeline.from_pipe(tuned)
    pivot = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    kwargs: dict = {}
    handle = pipeline.unet.register_forward_pre_hook(lambda _, args, given: kwargs.update(given), with_kwargs=True)
    got = sample(quiet(pipeline), strength=0.0, pivot=pivot, start=0.9, guidance_interval=(0.3, 0.6))
    sample(pipeline, strength=0.0, pivot=pivot, start=0.9)
    handle.remove()
    scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(6)
    generator = torch.Generator().manual_seed(0)
    torch.randn(1, 4, 8, 8, generator=generator)
    torch.randint(2**63 - 1, (1,), generator=generator)
    z, timesteps = renoise_pivot(pivot, (16, 16), scheduler, start=0.9, noise=torch.randn(1, 4, 16, 16, generator=generator))
    with torch.no_grad():
        for t in timesteps:
            unconditional, conditional = pipeline.unet(scheduler.scale_model_input(torch.cat([z, z]), t), t, **kwargs)[0].chunk(2)
            z = scheduler.step(unconditional + (7.5 if 300 <= t <= 600 else 1.0) * (conditional - unconditional), t, z).prev_sample
    torch.testing.assert_close(got, z, atol=2e-4, rtol=1e-4)


def test_features_at_pivot_time_zero_are_computed_once(tuned):
    """Pivot time 0: one pass of the encoder for all steps, whatever ``pivot_every`` is, and the same picture."""
    zero = with_pivot_time(tuned, "zero")
    base_passes, later = 6, 5  # of 831, 665, ..., 1
    assert passes(zero, start=0.7) == {(2, 8): base_passes + 1, (2, 16): later}
    assert torch.equal(sample(zero), sample(zero, pivot_every=3))


def test_features_of_one_timestep_serve_that_many_steps(tuned):
    current = with_pivot_time(tuned, "current")
    assert passes(current, start=0.7) == {(2, 8): 6 + 5, (2, 16): 5}
    assert passes(current, start=0.7, pivot_every=2) == {(2, 8): 6 + 3, (2, 16): 5}
    assert passes(current, start=0.7, pivot_every=9) == {(2, 8): 6 + 1, (2, 16): 5}
    assert not torch.equal(sample(current), sample(current, pivot_every=2))


def test_kept_features_serve_each_branch(tuned):
    """Features of both branches, kept from a guided step, serve the conditional branch alone at an unguided one: as if they had been computed for it."""
    zero = with_pivot_time(tuned, "zero")
    call = {"prompt": PROMPTS[:2], "seeds": (0, 1), "guidance_interval": (0.4, 1.0)}
    joint, apart = sample(zero, **call), sample(zero, joint_branches=False, **call)
    torch.testing.assert_close(joint, apart, atol=2e-4, rtol=1e-4)


def test_later_stages_may_take_another_number_of_steps(tuned):
    """The stages by hand: the base with 6 steps, the second stage from its latents with a call of 12."""
    assert passes(tuned, start=0.5, later_steps=12)[(2, 16)] == 7  # 498, 415, ..., 1
    base = sample(tuned, sizes=[(64, 64)])
    by_hand = sample(tuned, steps=12, start=0.5, pivot=base)
    assert torch.equal(sample(tuned, start=0.5, later_steps=12), by_hand)


def test_rows_of_nested_conditioning():
    nested = {"a": torch.arange(4), "b": [torch.arange(8).view(4, 2), 0.5], "c": torch.tensor(3.0)}
    taken = take_rows(nested, slice(2, 4))
    assert taken["a"].tolist() == [2, 3]
    assert taken["b"][0].tolist() == [[4, 5], [6, 7]]
    assert taken["b"][1] == 0.5
    assert taken["c"] == 3.0
