"""Video: space grows and frames stay, each frame is what a picture's code makes of it, and the base stage is diffusers' own text-to-video sampling."""

from __future__ import annotations

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor

import models
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from test_injection import case, hooks, normal
from test_upsampler import randomised

from selfcascade import SelfCascadePipeline
from selfcascade.cascade.decoding import decode
from selfcascade.cascade.families import spec_of
from selfcascade.cascade.injection import pivot_features, unet_with_pivot
from selfcascade.cascade.noise import draw_noise
from selfcascade.cascade.pivot import UPSCALES, renoise_pivot
from selfcascade.cascade.upsampler import FeatureUpsampler
from selfcascade.cascade.video import frames_of, stacked_as
from selfcascade.settings import SettingsError

FRAMES = 3
PROMPTS = ["a red cat", "two green apple"]
VARIANTS = {
    "A skip": {"variant": "A", "inject": "skip"},
    "A main": {"variant": "A", "inject": "main"},
    "B": {"variant": "B", "inject": "main", "final": "identity"},
    "C": {"variant": "C", "inject": "skip"},
    "D": {"variant": "D", "inject": "skip"},
}


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module")
def stock():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = models.base("video")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def free(stock) -> SelfCascadePipeline:
    pipeline = SelfCascadePipeline.from_pipe(stock)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def tuned(free) -> SelfCascadePipeline:
    phi = randomised(FeatureUpsampler.for_base(free.spec, variant="C"))
    pipeline = SelfCascadePipeline.from_pipe(free, upsampler=phi)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline, prompt=PROMPTS[0], size=128, *, seeds=(0,), steps=2, frames=FRAMES, **call) -> torch.Tensor:
    """Clean latents of square videos."""
    call = {"num_frames": frames, "num_inference_steps": steps, "guidance_scale": 1.0, "generator": generators(*seeds), "output_type": "latent", **call}
    return pipeline(prompt, size, size, **call).frames


# ---- a frame is a picture ----


@given(videos=st.integers(1, 3), frames=st.integers(1, 4), side=st.sampled_from([1, 2, 5]))
def test_frames_come_out_of_videos_and_back(videos, frames, side):
    """Video by video, frame by frame, as a text-to-video UNet folds them; pictures are left alone."""
    latents = torch.arange(videos * 4 * frames * side * side, dtype=torch.float32).reshape(videos, 4, frames, side, side)
    out = frames_of(latents)
    assert all(torch.equal(out[video * frames + frame], latents[video, :, frame]) for video in range(videos) for frame in range(frames))
    assert torch.equal(stacked_as(latents, out), latents)
    picture = latents[:, :, 0]
    assert frames_of(picture) is picture
    assert stacked_as(picture, picture) is picture


@pytest.mark.parametrize("name", UPSCALES)
@pytest.mark.parametrize("size", [(16, 16), (16, 12)])
def test_the_pivot_is_replaced_frame_by_frame(name, size):
    """Equation 6 on a video is equation 6 on each of its frames, with that frame's noise: space alone grows, and no frame sees another."""
    pivot, noise = normal(2, 4, FRAMES, 8, 8), normal(2, 4, FRAMES, *size, seed=1)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(50)
    z, timesteps = renoise_pivot(pivot, size, scheduler, start=0.7, noise=noise, upscale=UPSCALES[name])
    assert z.shape == noise.shape
    for frame in range(FRAMES):
        alone, same = renoise_pivot(pivot[:, :, frame], size, scheduler, start=0.7, noise=noise[:, :, frame], upscale=UPSCALES[name])
        torch.testing.assert_close(z[:, :, frame], alone, atol=1e-6, rtol=1e-6)
        assert torch.equal(timesteps, same)


@torch.no_grad()
def test_frames_are_decoded_as_pictures():
    """Each alone, so a frame is bit for bit the picture of its latent, tiled or not."""
    vae, latents = models.vae(), normal(2, 4, FRAMES, 16, 16)
    for tile_above in (10**6, 1):
        videos = decode(vae, latents, tile_above=tile_above)
        assert videos.shape == (2, 3, FRAMES, 128, 128)
        for frame in range(FRAMES):
            assert torch.equal(videos[:, :, frame], decode(vae, latents[:, :, frame], tile_above=tile_above))


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
@torch.no_grad()
def test_phi_on_one_frame_is_the_two_dimensional_phi(config):
    """What a UNet of two videos is given at each tap is, frame by frame, Phi of that frame's feature alone, at its own video's time."""
    unet, call = models.unet("video"), case("video") | {"t": torch.tensor([681, 20])}
    phi = randomised(FeatureUpsampler.for_base(spec_of(unet), **config))
    calls = []
    handle = phi.register_forward_hook(lambda _, args, kwargs, out: calls.append((args, kwargs, out)), with_kwargs=True)
    unet_with_pivot(unet, upsampler=phi, **call)
    handle.remove()
    assert [args[0] for args, _, _ in calls] == [0, 1, 2, 3]
    times = unet.time_embedding(unet.time_proj(call["t"]))
    features = pivot_features(unet, inject=config["inject"], **{key: value for key, value in call.items() if key != "z"})
    for (level, _), kwargs, out in calls:
        for video in range(2):
            for frame in range(FRAMES):
                feature = features[level][video, frame][None]
                alone = phi(level, feature, t=call["t"][video : video + 1], emb=times[video : video + 1], size=kwargs["size"])
                torch.testing.assert_close(out[video * FRAMES + frame][None], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_video_of_one_frame_is_guided_as_a_picture_of_its_features():
    unet, call = models.unet("video"), case("video")
    call = call | {name: call[name][:, :, :1] for name in ("z", "pivot")}
    phi = randomised(FeatureUpsampler.for_base(spec_of(unet), variant="C"))
    assert unet_with_pivot(unet, upsampler=phi, **call).shape == (2, 4, 1, 16, 16)


@torch.no_grad()
def test_a_pivot_of_other_frames_is_refused():
    unet, call = models.unet("video"), case("video")
    call["pivot"] = call["pivot"][:, :, :2]
    with pytest.raises(ValueError, match="the pivot has 2 frames but the latent 3 frames"):
        unet_with_pivot(unet, upsampler=FeatureUpsampler.for_base(spec_of(unet), variant="C"), **call)


# ---- the base stage is diffusers' own ----


@pytest.mark.parametrize("call", [{}, {"guidance_scale": 1.0}, {"negative_prompt": ["blurry"] * 2}], ids=str)
def test_the_base_stage_is_the_stock_pipeline_bit_for_bit(stock, free, call):
    call = {"height": 64, "width": 64, "num_frames": FRAMES, "num_inference_steps": 3, "guidance_scale": 7.5, "output_type": "latent", **call}
    expected = stock(PROMPTS, generator=generators(0, 1), **call).frames
    assert torch.equal(free(PROMPTS, generator=generators(0, 1), **call).frames, expected)


def test_videos_are_the_stock_pipelines(stock, free):
    call = {"height": 64, "width": 64, "num_frames": FRAMES, "num_inference_steps": 2, "guidance_scale": 7.5, "output_type": "np"}
    call["latents"] = normal(1, 4, FRAMES, 8, 8)
    expected = stock("a cat", **call).frames
    assert expected.shape == (1, FRAMES, 64, 64, 3)
    np.testing.assert_allclose(free("a cat", **call).frames, expected, atol=1e-5)


# ---- the cascade ----


@pytest.mark.parametrize(("size", "stages"), [(128, [8, 16]), (192, [8, 16, 24])])
def test_space_grows_and_frames_stay(free, size, stages):
    seen = []
    handle = free.unet.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[1:])))
    latents = sample(free, size=size)
    handle.remove()
    assert latents.shape == (1, 4, FRAMES, size // 8, size // 8)
    assert list(dict.fromkeys(seen)) == [(4, FRAMES, side, side) for side in stages]


@pytest.mark.parametrize("inject", ["skip", "main"])
def test_a_fresh_upsampler_is_the_tuning_free_cascade_bit_for_bit(free, inject):
    fresh = SelfCascadePipeline.from_pipe(free, upsampler=FeatureUpsampler.for_base(free.spec, variant="C", inject=inject))
    fresh.set_progress_bar_config(disable=True)
    assert torch.equal(sample(fresh), sample(free))


@pytest.mark.parametrize(("eta", "joint"), [(0.0, True), (1.0, False)])
def test_a_video_does_not_depend_on_its_batch(tuned, eta, joint):
    """Each from its own seed, prompt and pivot; with both branches of guidance in one pass or in two."""
    call = {"eta": eta, "guidance_scale": 3.0, "joint_branches": joint}
    alone = torch.cat([sample(tuned, prompt, seeds=[seed], **call) for seed, prompt in enumerate(PROMPTS)])
    together = sample(tuned, PROMPTS, seeds=(0, 1), **call)
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-3)
    assert (alone[0] - alone[1]).abs().mean() > 0.1


def test_step_noise_comes_from_the_videos_own_generators(free):
    """For a sampler that draws at every step: all frames of a video from one generator, those of another video from another."""
    ancestral = SelfCascadePipeline.from_pipe(free, scheduler=EulerAncestralDiscreteScheduler.from_config(free.scheduler.config))
    ancestral.set_progress_bar_config(disable=True)
    together = sample(ancestral, PROMPTS, seeds=(0, 1))
    torch.testing.assert_close(together[1:], sample(ancestral, PROMPTS[1], seeds=[1]), atol=1e-3, rtol=1e-3)


def test_the_first_draw_is_the_base_noise_that_diffusers_makes():
    (noise, later) = draw_noise(generators(3), 4, [(FRAMES, 8, 8), (FRAMES, 16, 16)], torch.device("cpu"))
    assert torch.equal(noise.entry, torch.randn(1, 4, FRAMES, 8, 8, generator=generators(3)[0]))
    assert later.entry.shape == (1, 4, FRAMES, 16, 16)


def test_the_stages_by_hand_are_the_cascade(tuned):
    """With a pivot per frame that stays as it was given from the first step to the last, once for each branch."""
    call = {"prompt": PROMPTS, "seeds": (0, 1), "guidance_scale": 3.0}
    whole, base = sample(tuned, **call), sample(tuned, size=None, sizes=[(64, 64)], **call)
    before, entered = base.clone(), []
    handle = tuned.unet.register_forward_pre_hook(lambda _, args: entered.append(args[0].clone()) if args[0].shape[-1] == 8 else None)
    assert torch.equal(sample(tuned, pivot=base, **call), whole)
    handle.remove()
    assert entered
    assert all(torch.equal(pivot, torch.cat([base, base])) for pivot in entered)
    assert torch.equal(base, before)


def test_every_output_type(free):
    call = {"prompt": PROMPTS[0], "height": 128, "width": 64, "num_frames": FRAMES, "num_inference_steps": 2}
    (pil,) = free(**call, generator=generators(0)).frames
    pt = free(**call, generator=generators(0), output_type="pt").frames
    (array,) = free(**call, generator=generators(0), output_type="np", return_dict=False)
    assert [picture.size for picture in pil] == [(64, 128)] * FRAMES
    assert pt.shape == (1, FRAMES, 3, 128, 64)
    assert array.shape == (1, FRAMES, 128, 64, 3)
    assert all(np.array_equal(np.asarray(pil[n]), (array[0, n] * 255).round().astype("uint8")) for n in range(FRAMES))
    np.testing.assert_array_equal(pt.permute(0, 1, 3, 4, 2).numpy(), array)


def test_frames_are_sixteen_unless_the_call_says(free):
    assert sample(free, size=64, steps=1, frames=None).shape == (1, 4, 16, 8, 8)


def test_a_pivot_may_grow_through_pixels(free):
    """The upscaler that decodes and encodes takes a video's frames one by one."""
    base = sample(free, size=None, sizes=[(64, 64)])
    assert sample(free, pivot=base, upscale="pixel").shape == (1, 4, FRAMES, 16, 16)


@pytest.mark.parametrize(
    ("kind", "call", "message"),
    [
        ("small", {"num_frames": 4}, "num_frames=4 is for a text-to-video base"),
        ("video", {"num_frames": 0}, "num_frames=0 must be at least 1"),
        ("video", {"image": np.zeros((64, 64, 3))}, "image starts a picture, but this base makes videos"),
        ("video", {"num_frames": 3, "pivot": torch.zeros(1, 4, 2, 8, 8)}, r"pivot has shape \(1, 4, 2, 8, 8\), but this call needs \(1, 4, 3, 8, 8\)"),
        ("video", {"num_frames": 3, "pivot": torch.zeros(1, 4, 8, 8)}, r"but this call needs \(1, 4, 3, 8, 8\)"),
        ("video", {"num_frames": 3, "latents": torch.zeros(1, 4, 8, 8)}, r"latents has shape .* needs \(1, 4, 3, 8, 8\)"),
        ("video", {"height": 96}, "multiples of 64"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_bad_call_is_refused_before_any_network_runs(free, kind, call, message):
    pipeline = free if kind == "video" else SelfCascadePipeline.from_pipe(models.base(kind))
    ran = []
    handle = pipeline.text_encoder.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(SettingsError, match=message) as error:
        pipeline(**{"prompt": "a cat", "height": 128, "width": 128, **call})
    handle.remove()
    assert not ran
    assert "\n" not in str(error.value)


# ---- the face of a pipeline ----


def test_a_video_base_loads_from_its_folder_and_survives_its_own(tmp_path, tuned):
    models.saved_base(tmp_path / "base", "video")
    pipeline = SelfCascadePipeline.from_pretrained(tmp_path / "base", upsampler=tuned.upsampler)
    pipeline.set_progress_bar_config(disable=True)
    expected = sample(tuned, steps=1, start=1.0)
    assert torch.equal(sample(pipeline, steps=1, start=1.0), expected)
    pipeline.save_pretrained(tmp_path / "saved")
    again = SelfCascadePipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(sample(again, steps=1, start=1.0), expected)


def test_two_threads_make_videos_with_one_pipeline_and_leave_no_trace(tuned):
    """The bits of the same two in series; afterwards no hook is left and every weight, the temporal layers' included, is what it was."""
    work = [{"prompt": prompt, "seeds": [seed], "eta": 1.0} for seed, prompt in enumerate(PROMPTS)]
    before, weights = hooks(tuned.unet), copy.deepcopy(tuned.unet.state_dict())
    expected = [sample(tuned, **call) for call in work]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda call: sample(tuned, **call), work))
    assert all(torch.equal(result, wanted) for result, wanted in zip(results, expected, strict=True))
    assert hooks(tuned.unet) == before
    assert all(torch.equal(value, weights[name]) for name, value in tuned.unet.state_dict().items())
