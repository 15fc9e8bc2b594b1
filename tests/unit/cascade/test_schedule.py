"""Schedule: the grid of a stage and the sizes of all stages (check 1 of the method)."""

from __future__ import annotations

from itertools import pairwise
from math import log, prod

import pytest
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from hypothesis import example, given, settings
from hypothesis import strategies as st

from selfcascade.cascade.schedule import remaining_timesteps, stage_sizes
from selfcascade.settings import SettingsError

NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "leading", "steps_offset": 1}


def ddim(steps: int = 50, total: int = 1000) -> DDIMScheduler:
    scheduler = DDIMScheduler(**NOISE, num_train_timesteps=total, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(steps)
    return scheduler


def test_700_of_1000_leaves_35_of_50_steps_from_681_on():
    """Check 1: DDIM, 50 steps, K = 700."""
    scheduler = ddim()
    timesteps = remaining_timesteps(scheduler, 0.7)
    assert timesteps.tolist() == list(range(681, 0, -20))
    assert len(timesteps) == 35
    alpha = scheduler.alphas_cumprod[681].item()
    assert alpha**0.5 == pytest.approx(0.3076, abs=5e-5)
    assert (1 - alpha) ** 0.5 == pytest.approx(0.9515, abs=5e-5)


@settings(deadline=None)
@example(total=4000, steps=4000, k=1001)
@given(total=st.sampled_from([1000, 4000]), steps=st.integers(1, 200), k=st.integers(1, 1000))
def test_the_grid_of_a_stage_is_the_suffix_of_the_full_one_at_or_below_k(total, steps, k):
    scheduler = ddim(steps, total)
    expected = [t for t in scheduler.timesteps.tolist() if t <= k]
    if expected:
        assert remaining_timesteps(scheduler, k / total).tolist() == expected
    else:
        with pytest.raises(SettingsError, match="leaves no timestep"):
            remaining_timesteps(scheduler, k / total)


def test_a_scheduler_that_counts_its_steps_is_told_where_to_begin():
    scheduler = EulerDiscreteScheduler(**NOISE)
    scheduler.set_timesteps(50)
    assert len(remaining_timesteps(scheduler, 0.7)) == 35
    assert scheduler.begin_index == 15


@pytest.mark.parametrize("start", [0, -0.1, 1.01])
def test_a_start_outside_of_the_diffusion_is_refused(start):
    with pytest.raises(SettingsError, match="must be above 0 and at most 1"):
        remaining_timesteps(ddim(), start)


@pytest.mark.parametrize(
    ("target", "native", "step", "sizes"),
    [
        ((1024, 1024), 512, 64, [(512, 512), (1024, 1024)]),
        ((2048, 2048), 512, 64, [(512, 512), (1024, 1024), (2048, 2048)]),
        ((4096, 4096), 1024, 32, [(1024, 1024), (2048, 2048), (4096, 4096)]),
        ((512, 512), 512, 64, [(512, 512)]),
        ((256, 256), 128, 32, [(128, 128), (256, 256)]),
        ((768, 768), 512, 64, [(512, 512), (768, 768)]),
        ((1024, 256), 256, 64, [(512, 128), (1024, 256)]),
        ((3072, 1536), 512, 64, [(704, 384), (1408, 768), (2816, 1536), (3072, 1536)]),
    ],
)
def test_stages_follow_from_the_target(target, native, step, sizes):
    """The paper's own cases, a last factor below two, and rectangles: base of native area, doubling, exactly the target at the end."""
    assert stage_sizes(*target, native=(native, native), step=step) == tuple(sizes)


@settings(deadline=None)
@given(data=st.data(), native=st.integers(2, 16), step=st.sampled_from([8, 32, 64]))
def test_stages_of_any_target(data, native, step):
    """Stages fit the latent step and the target, and grow, at most twofold until the last; ceil(log4(area ratio)) of them are above the base, which has the
    native area and the target's aspect, up to rounding each side to the step."""
    height, width = (step * data.draw(st.integers(1, 100)) for _ in range(2))
    side = native * step
    if height * width < side * side:
        with pytest.raises(SettingsError, match="smaller than the base"):
            stage_sizes(height, width, native=(side, side), step=step)
        return
    sizes = stage_sizes(height, width, native=(side, side), step=step)
    assert sizes[-1] == (height, width)
    assert all(h % step == 0 and w % step == 0 and step <= h <= height and step <= w <= width for h, w in sizes)
    assert all(a[0] <= b[0] and a[1] <= b[1] and a != b for a, b in pairwise(sizes))
    assert all(b[0] <= 2 * a[0] and b[1] <= 2 * a[1] for a, b in pairwise(sizes[:-1]))
    growths = len(sizes) - 1
    ratio = height * width / side**2
    assert growths <= (0 if ratio == 1 else -(-log(ratio, 4) // 1) + 1e-9)
    if len(sizes) > 1:
        exact = [side * (length / other) ** 0.5 for length, other in ((height, width), (width, height))]
        assert all(abs(length - max(step, goal)) <= step / 2 + 1e-6 or length == step for length, goal in zip(sizes[0], exact, strict=True))
        assert prod(sizes[0]) < prod(sizes[-1])


@pytest.mark.parametrize("size", [(1000, 1024), (1024, 1000), (0, 64), (-64, 64), (32, 32)])
def test_a_size_that_is_no_multiple_of_the_step_is_refused_with_one_that_is(size):
    with pytest.raises(SettingsError, match=r"size -?\d+x\d+ must have sides that are multiples of 64 pixels .*, such as \d+x\d+"):
        stage_sizes(*size, native=(512, 512), step=64)
