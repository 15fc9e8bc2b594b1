"""Grids of the schedulers: entered anywhere, each solver is on the ray from the clean latent to the noise at every level; what has no such grid is refused."""

from __future__ import annotations

from typing import Any

import gaussian
import models
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from gaussian import BETAS, Gaussian
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from selfcascade import SelfCascadePipeline
from selfcascade.cascade.pivot import renoise_pivot
from selfcascade.cascade.sampling import Recipe, count_steps
from selfcascade.cascade.schedule import remaining_timesteps
from selfcascade.cascade.solver import SOLVERS, prepare, step
from selfcascade.settings import SettingsError

DATA = Gaussian()
DETERMINISTIC = (DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler)
SPACINGS = ("leading", "trailing", "linspace")
CLEAN, NOISE = (torch.randn(1, 4, 8, 8, generator=Generator().manual_seed(seed)) for seed in (1, 2))


def made(kind: type[SchedulerMixin], spacing: str = "leading", **config: Any) -> SchedulerMixin:
    clear = {"clip_sample": False} if kind is DDIMScheduler else {}
    return kind(**BETAS, **({"steps_offset": 1, "timestep_spacing": spacing} | clear | config))


def on_the_ray(t: float) -> Tensor:
    """The variance-preserving latent of timestep t, in float64; before t = 0 the clean one."""
    sigma = DATA.sigma(t) if t >= 0 else 0.0
    return (CLEAN.double() + sigma * NOISE.double()) * (1 + sigma**2) ** -0.5


def true_prediction(t: float, prediction: str) -> Tensor:
    """The very noise of the ray, or its velocity."""
    sigma = DATA.sigma(t)
    return NOISE if prediction == "epsilon" else ((NOISE - sigma * CLEAN) * (1 + sigma**2) ** -0.5).float()


@settings(deadline=None, max_examples=60)
@example(kind=DDIMScheduler, spacing="linspace", prediction="epsilon", steps=50, k=700)
@example(kind=DDIMScheduler, spacing="trailing", prediction="epsilon", steps=30, k=700)
@example(kind=DDIMScheduler, spacing="trailing", prediction="v_prediction", steps=61, k=1000)
@example(kind=EulerDiscreteScheduler, spacing="trailing", prediction="epsilon", steps=103, k=700)
@example(kind=UniPCMultistepScheduler, spacing="trailing", prediction="epsilon", steps=61, k=100)
@given(
    kind=st.sampled_from(DETERMINISTIC),
    spacing=st.sampled_from(SPACINGS),
    prediction=st.sampled_from(["epsilon", "v_prediction"]),
    steps=st.integers(1, 150),
    k=st.integers(1, 1000),
)
def test_a_stage_is_on_the_ray_at_every_level_from_its_entry_on(kind, spacing, prediction, steps, k):
    """Given the true noise, sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps is where a stage enters, for the first t <= K, and where each step takes it to.

    DDIM of diffusers steps by T // steps, beside the next timestep where that is not the grid's stride; and a trailing grid of 61 or 103 steps has a t = -1.
    """
    scheduler = prepare(made(kind, spacing, prediction_type=prediction), steps)
    grid = [t for t in scheduler.timesteps.tolist() if t <= k]
    assert len(scheduler.timesteps) == steps
    if not grid:
        with pytest.raises(SettingsError, match="leaves no timestep"):
            remaining_timesteps(scheduler, k / 1000)
        return
    z, timesteps = renoise_pivot(CLEAN, (8, 8), scheduler, start=k / 1000, noise=NOISE)
    assert timesteps.tolist() == grid
    for t in timesteps:
        seen = scheduler.scale_model_input(z, t)
        torch.testing.assert_close(seen.double(), on_the_ray(t.item()), atol=1e-4, rtol=0)
        z = step(scheduler, true_prediction(t.item(), prediction), t, z)
    torch.testing.assert_close(z, CLEAN, atol=1e-4, rtol=0)


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from([EulerAncestralDiscreteScheduler, LCMScheduler]),
    spacing=st.sampled_from(SPACINGS),
    steps=st.integers(1, 50),
    k=st.integers(20, 1000),
)
def test_a_stochastic_stage_enters_on_the_ray(kind, spacing, steps, k):
    """And ends at what the last prediction says, at the last timestep of the grid."""
    scheduler = prepare(made(kind, spacing), steps)
    grid = [t for t in scheduler.timesteps.tolist() if t <= k]
    if not grid:
        with pytest.raises(SettingsError, match="leaves no timestep"):
            count_steps(made(kind, spacing), recipe(steps, k / 1000))
        return
    assert count_steps(made(kind, spacing), recipe(steps, k / 1000)) == (steps, len(grid))
    z, timesteps = renoise_pivot(CLEAN, (8, 8), scheduler, start=k / 1000, noise=NOISE)
    torch.testing.assert_close(scheduler.scale_model_input(z, timesteps[0]).double(), on_the_ray(grid[0]), atol=1e-5, rtol=0)
    assert scheduler.begin_index == steps - len(grid)


def recipe(steps: int, start: float) -> Recipe:
    return Recipe(steps, start, guidance_scale=1, eta=0, upscale="bilinear", t_min=0, strength=1)


@pytest.mark.parametrize(
    ("steps", "k", "timesteps"), [(4, 700, [499, 259]), (4, 1000, [999, 759, 499, 259]), (2, 700, [499]), (8, 700, [639, 499, 379, 259, 139])]
)
def test_k_of_few_steps_is_the_next_level_of_the_grid_below_it(steps, k, timesteps):
    """LCM at 4 steps knows 999, 759, 499, 259: K = 700 enters at 499 and leaves two of them."""
    assert remaining_timesteps(prepare(made(LCMScheduler), steps), k / 1000).tolist() == timesteps


def test_few_steps_that_leave_none_below_k_are_refused():
    with pytest.raises(SettingsError, match=r"start=0.2 leaves no timestep of 4 steps, the last of which is t=259; raise start or steps"):
        count_steps(made(LCMScheduler), recipe(4, 0.2))


def test_a_repeated_timestep_is_entered_where_the_grid_says():
    """Karras grids repeat rounded timesteps near their end; by timestep alone diffusers would begin at the second of them, which is another level."""
    scheduler = prepare(made(DPMSolverMultistepScheduler, use_karras_sigmas=True), 150)
    values, counts = scheduler.timesteps.unique(return_counts=True)
    k = values[counts > 1].max().item()
    timesteps = remaining_timesteps(scheduler, k / 1000)
    assert timesteps[:2].tolist() == [k, k]
    assert scheduler.begin_index == 150 - len(timesteps) < scheduler.index_for_timestep(k)


def test_stages_do_not_inherit_the_history_of_a_multistep_solver():
    used = prepare(made(UniPCMultistepScheduler), 10)
    z = CLEAN
    for t in used.timesteps[:4]:
        z = step(used, NOISE, t, z)
    fresh = prepare(used, 10)
    assert fresh.begin_index is fresh.step_index is fresh.last_sample is None
    assert fresh.model_outputs == [None, None]
    assert used.step_index == 4


@pytest.mark.parametrize("kind", [PNDMScheduler, DDPMScheduler, HeunDiscreteScheduler, KDPM2DiscreteScheduler, DPMSolverSinglestepScheduler])
def test_a_scheduler_that_is_not_known_to_start_in_the_middle_is_refused_before_any_network_runs(kind):
    pipe = SelfCascadePipeline.from_pipe(models.base("small"), scheduler=kind())
    handles = [module.register_forward_hook(lambda *_: pytest.fail("a network ran")) for module in (pipe.text_encoder, pipe.unet)]
    with pytest.raises(SettingsError) as error:
        pipe("a cat", 128, 128, num_inference_steps=3)
    assert str(error.value).startswith(f"scheduler {kind.__name__} is not known to start in the middle of its grid; use DDIMScheduler, EulerDiscreteScheduler")
    assert "\n" not in str(error.value)
    assert len(handles) == 2


def test_a_base_that_ships_pndm_is_sampled_by_ddim(tmp_path):
    """On its own noise schedule and grid; a scheduler that the user gives is the user's."""
    base = models.base("small")
    base.scheduler = PNDMScheduler(**BETAS, steps_offset=1, skip_prk_steps=True, set_alpha_to_one=False)
    base.save_pretrained(tmp_path)
    scheduler = SelfCascadePipeline.from_pretrained(tmp_path).scheduler
    assert type(scheduler) is DDIMScheduler
    assert not scheduler.config.clip_sample
    assert scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0] == base.scheduler.alphas_cumprod[0]
    assert prepare(scheduler, 50).timesteps.tolist() == list(range(981, 0, -20))
    euler = EulerDiscreteScheduler(**BETAS)
    assert SelfCascadePipeline.from_pretrained(tmp_path, scheduler=euler).scheduler is euler


def test_pndm_begun_in_the_middle_leaves_noise():
    """Why it is refused: true noise takes it off the ray. From the beginning of its grid it stays on it."""
    distances = []
    for start in (0, 16):
        scheduler = PNDMScheduler(**BETAS, steps_offset=1, skip_prk_steps=True, set_alpha_to_one=True)
        scheduler.set_timesteps(50)
        timesteps = scheduler.timesteps[start:]
        z = on_the_ray(timesteps[0].item()).float()
        for t in timesteps:
            z = scheduler.step(NOISE, t, z).prev_sample
        distances.append((z - CLEAN).abs().max().item())
    assert distances[0] < 1e-4
    assert distances[1] > 0.05


@pytest.mark.parametrize(
    ("kind", "config", "steps", "message"),
    [
        (EulerDiscreteScheduler, {"interpolation_type": "log_linear"}, 20, "noise levels of EulerDiscreteScheduler are not those of its timesteps"),
        (EulerDiscreteScheduler, {"timestep_type": "continuous", "prediction_type": "v_prediction"}, 20, "are not those of its timesteps"),
        (EulerDiscreteScheduler, {"use_karras_sigmas": True, "sigma_max": 80.0}, 20, "are not those of its timesteps"),
        (DPMSolverMultistepScheduler, {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, 20, "are not those of its timesteps"),
        (UniPCMultistepScheduler, {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, 20, "are not those of its timesteps"),
        (UniPCMultistepScheduler, {"solver_p": DDIMScheduler()}, 20, "solver_p=DDIMScheduler is not told where it begins; leave solver_p out"),
        (UniPCMultistepScheduler, {"lower_order_final": False}, 20, "divides by zero at its last step; set lower_order_final=True"),
        (LCMScheduler, {}, 51, "steps=51 must be in 1..50: LCMScheduler picks its timesteps out of 50"),
        (DDIMScheduler, {}, 1001, r"steps=1001 must be in 1..1000"),
        (EulerDiscreteScheduler, {}, 0, r"steps=0 must be in 1..1000"),
        (DDIMScheduler, {}, 1000, "steps=1000 make DDIMScheduler begin at t=1000, above the base's last, 999; take fewer steps"),
        (UniPCMultistepScheduler, {}, 1000, "steps=1000 are more than UniPCMultistepScheduler can tell apart"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str | int) else None,
)
def test_a_grid_that_k_has_no_place_on_is_refused_in_one_line(kind, config, steps, message):
    with pytest.raises(SettingsError, match=message) as error:
        prepare(made(kind, **config), steps)
    assert "\n" not in str(error.value)


def test_unipc_with_a_high_order_last_step_onto_the_clean_end_is_no_number():
    """Why that setting is refused."""
    scheduler = made(UniPCMultistepScheduler, lower_order_final=False)
    scheduler.set_timesteps(10)
    z = NOISE
    for t in scheduler.timesteps:
        z = scheduler.step(0.5 * z, t, z).prev_sample
    assert not z.isfinite().any()


@pytest.mark.parametrize("kind", SOLVERS.values(), ids=SOLVERS)
def test_the_pipelines_scheduler_is_left_as_it_was(kind):
    scheduler = made(kind)
    timesteps = scheduler.timesteps.clone()
    prepared = prepare(scheduler, 10)
    step(prepared, NOISE, prepared.timesteps[0], prepared.scale_model_input(CLEAN, prepared.timesteps[0]), generators=[Generator()])
    assert torch.equal(scheduler.timesteps, timesteps)
    assert scheduler.num_inference_steps is None
    assert gaussian.alphas_of() == pytest.approx(scheduler.alphas_cumprod.numpy(), rel=1e-5)
