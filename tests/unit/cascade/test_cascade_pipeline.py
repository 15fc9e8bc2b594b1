"""The pipeline: parity with diffusers at the base, the cascade above it, samples that own their randomness (checks 2, 3, 6, 7, 8, 11 of the method)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import models
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from test_injection import hooks
from test_upsampler import randomised

from selfcascade import SelfCascadePipeline
from selfcascade.cascade.pivot import bilinear
from selfcascade.cascade.upsampler import FeatureUpsampler
from selfcascade.settings import SettingsError

PROMPTS = ["a red cat", "two green apple", "house on sun", "blue dog"]


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def quiet(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module", params=models.KINDS)
def stock(request) -> DiffusionPipeline:
    """Each kind of base, sampled with DDIM."""
    pipeline = models.base(request.param)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    return quiet(pipeline)


@pytest.fixture(scope="module")
def small() -> SelfCascadePipeline:
    return quiet(SelfCascadePipeline.from_pipe(models.base("small")))


@pytest.fixture(scope="module")
def tuned(small) -> SelfCascadePipeline:
    """The same networks with an upsampler that is not zero."""
    return quiet(SelfCascadePipeline.from_pipe(small, upsampler=randomised(FeatureUpsampler.for_base(small.spec, variant="C"))))


def sample(pipeline: SelfCascadePipeline, prompt=PROMPTS[0], size=128, *, seeds=(0,), steps=6, **call) -> torch.Tensor:
    """Clean latents of a square picture."""
    return pipeline(prompt, size, size, num_inference_steps=steps, generator=generators(*seeds), output_type="latent", **call).images


# ---- the base stage is diffusers' own sampling ----


@pytest.mark.parametrize("call", [{}, {"guidance_scale": 1.0}, {"negative_prompt": "blurry"}, {"num_images_per_prompt": 2}], ids=str)
def test_the_base_stage_is_the_stock_pipeline_bit_for_bit(stock, call):
    """Same generator, same latents, same pictures: guidance, its order, negative prompts and the decoder included."""
    ours = quiet(SelfCascadePipeline.from_pipe(stock))
    each = generators(*range(2 * call.get("num_images_per_prompt", 1)))
    common = {"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 7.5, **call}
    negative = {"negative_prompt": ["blurry"] * 2} if "negative_prompt" in call else {}
    expected = stock(PROMPTS[:2], generator=each, output_type="latent", **common | negative).images
    each = generators(*range(len(each)))
    assert torch.equal(ours(PROMPTS[:2], generator=each, output_type="latent", **common).images, expected)


def test_pictures_are_the_stock_pipelines(stock):
    ours = quiet(SelfCascadePipeline.from_pipe(stock))
    call = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 7.5, "output_type": "np"}
    call["latents"] = torch.randn(1, 4, 8, 8, generator=generators(1)[0])
    np.testing.assert_allclose(ours("a cat", **call).images, stock("a cat", **call).images, atol=1e-6)


# ---- the cascade ----


@pytest.mark.parametrize(("size", "stages"), [(64, [8]), (128, [8, 16]), (256, [8, 16, 32]), (192, [8, 16, 24])])
def test_the_latents_of_a_size(small, size, stages):
    """Check 3 in small: stage upon stage of twice the side, the last exactly the target."""
    seen = []
    handle = small.unet.conv_in.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[-1]))
    latents = sample(small, size=size, steps=2)
    handle.remove()
    assert latents.shape == (1, 4, size // 8, size // 8)
    assert list(dict.fromkeys(seen)) == stages


@pytest.mark.parametrize("variant", ["A", "C"])
@pytest.mark.parametrize("inject", ["skip", "main"])
def test_a_fresh_upsampler_is_the_tuning_free_cascade_bit_for_bit(stock, variant, inject):
    """Check 2, over two stages."""
    free = quiet(SelfCascadePipeline.from_pipe(stock))
    tuned = quiet(SelfCascadePipeline.from_pipe(free, upsampler=FeatureUpsampler.for_base(free.spec, variant=variant, inject=inject)))
    assert torch.equal(sample(tuned, size=192, steps=2), sample(free, size=192, steps=2))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_stages_by_hand_are_the_cascade(tuned, eta):
    """Base, then each stage from the clean latent of the one below, with the generators of the whole: the same bits. So base latents may be cached."""
    call = {"eta": eta, "steps": 3, "guidance_scale": 3.0}
    whole, sizes = sample(tuned, size=256, **call), tuned.sizes(256, 256)
    below = sample(tuned, size=None, sizes=sizes[:1], **call)
    middle = sample(tuned, size=None, sizes=sizes[:2], pivot=below, **call)
    assert torch.equal(sample(tuned, size=256, pivot=middle, **call), whole)
    assert torch.equal(sample(tuned, size=256, pivot=below, **call), whole)


def test_the_base_does_not_depend_on_the_target(small):
    """What the first stage of a whole cascade hands on is the base sampled alone, however many stages are above it."""
    alone = sample(small, size=64, steps=2)
    for size in (128, 256):
        handed_on = []
        sample(small, size=size, steps=2, callback_on_step_end=lambda pipe, step, t, tensors, kept=handed_on: kept.append(tensors["latents"]) or {})
        assert torch.equal(handed_on[1], alone)


@pytest.mark.parametrize("upscale", ["bilinear", "bicubic"])
def test_a_small_start_returns_nearly_the_enlarged_pivot(small, upscale):
    """Check 8: with K = 20 the result is the enlarged base up to the noise of that step; with K = T it is another picture."""
    base = sample(small, size=None, sizes=[(64, 64)])
    grown = torch.nn.functional.interpolate(base, (16, 16), mode=upscale, align_corners=False)
    near = sample(small, pivot=base, start=0.02, steps=50, upscale=upscale, guidance_scale=1.0)
    far = sample(small, pivot=base, start=1.0, steps=50, upscale=upscale, guidance_scale=1.0)
    noise = (1 - small.scheduler.alphas_cumprod[1]).sqrt()
    assert (near - grown).abs().mean() < 2 * noise
    assert (far - grown).abs().mean() > 10 * noise


def test_the_pivot_is_the_same_at_the_first_and_the_last_step(tuned):
    """Check 6: what enters the UNet at the pivot's size is, in every step of the stage, the clean latent that was given, once for each branch."""
    base = sample(tuned, PROMPTS[:2], size=None, sizes=[(64, 64)], seeds=(0, 1))
    before = base.clone()
    entered = []
    handle = tuned.unet.conv_in.register_forward_hook(lambda _, args, out: entered.append(args[0].clone()) if args[0].shape[-1] == 8 else None)
    sample(tuned, PROMPTS[:2], seeds=(0, 1), pivot=base, steps=10)
    handle.remove()
    assert len(entered) == 7
    assert all(torch.equal(pivot, torch.cat([base, base])) for pivot in entered)
    assert torch.equal(base, before)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_sample_does_not_depend_on_its_batch(tuned, eta):
    """One at a time or four at once, in any order: equal to float tolerance, each from its own seed, prompt and pivot."""
    alone = torch.cat([sample(tuned, prompt, seeds=[seed], eta=eta, steps=4) for seed, prompt in enumerate(PROMPTS)])
    together = sample(tuned, PROMPTS, seeds=range(4), eta=eta, steps=4)
    backwards = sample(tuned, PROMPTS[::-1], seeds=(3, 2, 1, 0), eta=eta, steps=4).flip(0)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(backwards, alone, atol=1e-4, rtol=1e-4)
    assert min((alone[i] - alone[j]).abs().mean() for i in range(4) for j in range(i)) > 0.1


def test_every_prompt_keeps_its_own_pivot(tuned):
    """Exchanging the second pivot changes the second sample alone."""
    pivots = sample(tuned, PROMPTS[:2], size=None, sizes=[(64, 64)], seeds=(0, 1))
    other = torch.stack([pivots[0], -pivots[1]])
    first, second = (sample(tuned, PROMPTS[:2], pivot=pivot, seeds=(0, 1), strength=1.0, steps=4) for pivot in (pivots, other))
    torch.testing.assert_close(first[0], second[0], atol=1e-5, rtol=1e-5)
    assert (first[1] - second[1]).abs().mean() > 0.1


def test_one_generator_serves_the_samples_in_turn(small):
    """The first sample is that of the generator alone; the next draws on."""
    both = small(PROMPTS[:1] * 2, 128, 128, num_inference_steps=2, generator=generators(5)[0], output_type="latent").images
    torch.testing.assert_close(both[:1], sample(small, steps=2, seeds=[5]), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(both[0], both[1], atol=0.1)


def test_two_threads_sample_with_one_pipeline(tuned):
    """Check 11: two prompts at once, tuned and stochastic, give the bits of the same two in series; afterwards no hook is left."""
    work = [{"prompt": prompt, "seeds": [seed], "eta": 1.0, "steps": 4} for seed, prompt in enumerate(PROMPTS[:2])]
    expected = [sample(tuned, **call) for call in work]
    before = hooks(tuned.unet)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda call: sample(tuned, **call), work))
    assert all(torch.equal(result, wanted) for result, wanted in zip(results, expected, strict=True))
    assert hooks(tuned.unet) == before


# ---- what guides, and when ----


def count_calls(pipeline: SelfCascadePipeline, size=128, **call) -> int:
    """How often the upsampler was asked for its first level."""
    calls = []
    handle = pipeline.upsampler.levels[0].register_forward_hook(lambda *_: calls.append(1))
    sample(pipeline, size=size, **call)
    handle.remove()
    return len(calls)


def test_the_upsampler_guides_every_step_of_the_later_stages(tuned):
    """50 steps, K = 700: 35 of them, the last at t = 1. Never in the base; not below t_min; not at strength 0."""
    base = sample(tuned, size=None, sizes=[(64, 64)], steps=2)
    call = {"steps": 50, "pivot": base, "guidance_scale": 1.0}
    assert count_calls(tuned, **call) == 35
    assert count_calls(tuned, **call, start=0.14, t_min=100) == 2  # 121 and 101
    assert count_calls(tuned, **call, start=0.14, t_min=101) == 1
    assert count_calls(tuned, **call, start=0.14, strength=0.0) == 0
    assert count_calls(tuned, size=None, steps=3, sizes=[(64, 64)]) == 0


def test_strength_zero_is_the_tuning_free_cascade(small, tuned):
    assert torch.equal(sample(tuned, strength=0.0), sample(small))
    assert not torch.allclose(sample(tuned), sample(small), atol=1e-2)


@pytest.mark.parametrize(("pivot_t", "times"), [("zero", [0]), ("current", [*range(601, 0, -100)])])
def test_the_pivot_passes_at_the_time_that_the_upsampler_was_trained_for(small, pivot_t, times):
    """With pivot_t = 0 the encoder sees the pivot once a stage, since its features stay the same; at the current time, once a step."""
    base = sample(small, size=None, sizes=[(64, 64)], steps=2)
    tuned = SelfCascadePipeline.from_pipe(small, upsampler=randomised(FeatureUpsampler.for_base(small.spec, variant="C", pivot_t=pivot_t)))
    seen = []
    handle = small.unet.register_forward_pre_hook(lambda _, args: seen.append((args[0].shape[-1], int(args[1]))))
    sample(quiet(tuned), steps=10, pivot=base)
    handle.remove()
    assert [t for side, t in seen if side == 8] == times
    assert [t for side, t in seen if side == 16] == [*range(601, 0, -100)]


def test_size_ids_follow_the_stage():
    """SDXL is told the stage's own size, uncropped, for both branches and for the pivot's pass too."""
    pipeline = quiet(SelfCascadePipeline.from_pipe(models.base("sdxl"), scheduler=DDIMScheduler()))
    pipeline.register_modules(upsampler=FeatureUpsampler.for_base(pipeline.spec, variant="C"))
    seen = []
    handle = pipeline.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((tuple(args[0].shape[-2:]), kwargs["added_cond_kwargs"]["time_ids"].tolist())), with_kwargs=True
    )
    pipeline("a cat", 128, 64, num_inference_steps=2, output_type="latent")
    handle.remove()
    base, target = pipeline.sizes(128, 64)
    assert seen[0] == ((base[0] // 8, base[1] // 8), [[*base, 0, 0, *base]] * 2)
    assert {tuple(ids[0]) for _, ids in seen[2:]} == {(*target, 0, 0, *target)}


# ---- the face of a DiffusionPipeline ----


def test_a_pipeline_survives_its_folder(tmp_path, tuned):
    """Saved with its upsampler and loaded again: the same pictures, the same base identity."""
    models.saved_base(tmp_path / "base")
    pipeline = quiet(SelfCascadePipeline.from_pretrained(tmp_path / "base", upsampler=tuned.upsampler))
    assert pipeline.config.base.startswith("base@")
    pipeline.save_pretrained(tmp_path / "saved")
    again = quiet(SelfCascadePipeline.from_pretrained(tmp_path / "saved"))
    assert torch.equal(sample(again, steps=2), sample(tuned, steps=2))
    assert again.config.base == pipeline.config.base
    tuned.upsampler.save_pretrained(tmp_path / "phi")
    other = quiet(SelfCascadePipeline.from_pretrained(tmp_path / "base", upsampler=tmp_path / "phi"))
    assert torch.equal(sample(other, steps=2), sample(tuned, steps=2))


def test_an_upsampler_of_another_base_is_refused_at_loading(tmp_path):
    models.saved_base(tmp_path / "mine")
    models.saved_base(tmp_path / "yours", seed=1)
    pipeline = SelfCascadePipeline.from_pretrained(tmp_path / "mine")
    FeatureUpsampler.for_base(pipeline.spec, variant="C", base=pipeline.config.base).save_pretrained(tmp_path / "phi")
    SelfCascadePipeline.from_pretrained(tmp_path / "mine", upsampler=str(tmp_path / "phi"))
    with pytest.raises(
        SettingsError, match=r"upsampler .*phi was trained for base 'mine@\w{12}' but the pipeline holds 'yours@\w{12}'; retrain it or pass --base mine"
    ):
        SelfCascadePipeline.from_pretrained(tmp_path / "yours", upsampler=str(tmp_path / "phi"))


def test_from_pipe_shares_the_networks_and_leaves_them_as_they_are(small):
    stock = models.base("small")
    stock.vae.to(torch.float32)
    stock.unet.to(torch.bfloat16)
    ours = SelfCascadePipeline.from_pipe(stock)
    assert ours.unet is stock.unet
    assert ours.vae is stock.vae
    assert ours.scheduler is stock.scheduler
    assert (stock.unet.dtype, stock.vae.dtype) == (torch.bfloat16, torch.float32)


def test_every_output_type(small):
    call = {"prompt": PROMPTS[:2], "height": 128, "width": 64, "num_inference_steps": 2}
    pil = small(**call, generator=generators(0, 1)).images
    pt = small(**call, generator=generators(0, 1), output_type="pt").images
    (nparray,) = small(**call, generator=generators(0, 1), output_type="np", return_dict=False)
    assert [image.size for image in pil] == [(64, 128)] * 2
    assert pt.shape == (2, 3, 128, 64)
    assert nparray.shape == (2, 128, 64, 3)
    assert np.array_equal(np.asarray(pil[0]), (nparray[0] * 255).round().astype("uint8"))
    assert 0 <= pt.min() <= pt.max() <= 1


def test_text_may_come_as_embeddings(small):
    text, negative = models.base("small").encode_prompt(PROMPTS[:2], "cpu", 1, True)
    expected = sample(small, PROMPTS[:2], seeds=(0, 1), steps=2)
    ours = sample(small, None, seeds=(0, 1), steps=2, prompt_embeds=text, negative_prompt_embeds=negative)
    assert torch.equal(ours, expected)


def test_a_callback_sees_every_step_of_every_stage_and_may_change_the_latents(small):
    seen = []

    def callback(pipe, step, t, tensors):
        seen.append((step, int(t), tuple(tensors["latents"].shape[-2:])))
        assert pipe.num_timesteps == 17
        return {"latents": 0 * tensors["latents"]} if step == 16 else {}

    latents = sample(small, steps=10, callback_on_step_end=callback)
    assert [step for step, _, _ in seen] == list(range(17))
    assert [t for _, t, _ in seen] == [*range(901, 0, -100), *range(601, 0, -100)]
    assert [shape for _, _, shape in seen] == [(8, 8)] * 10 + [(16, 16)] * 7
    assert not latents.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"height": 100}, "size 100x128 must have sides that are multiples of 32 pixels"),
        ({"height": 32, "width": 32}, "size 32x32 is smaller than the base's own 64x64"),
        ({"sizes": [(64, 48)]}, "multiples of 32"),
        ({"sizes": [(128, 128), (64, 64)]}, "no stage may be smaller"),
        ({"sizes": []}, "at least one stage"),
        ({"start": 0.0}, "start=0.0 must be above 0"),
        ({"start": 1.5}, "at most 1"),
        ({"start": 0.0001}, "leaves no timestep"),
        ({"num_inference_steps": 0}, "steps=0 must be at least 1"),
        ({"strength": 1.1}, r"strength=1.1 must be in 0\.\.1"),
        ({"eta": -1.0}, "eta=-1.0"),
        ({"t_min": -1}, "t_min=-1"),
        ({"upscale": "nearest"}, "upscale='nearest' is not known; choose bilinear, bicubic, pixel or learned"),
        ({"prompt": []}, "at least one prompt"),
        ({"prompt": None}, "at least one prompt"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0 must be a whole number, at least 1"),
        ({"generator": "one of two"}, "1 generators for 2 samples"),
        ({"negative_prompt": ["a"] * 3}, "3 negative prompts for 2 prompts"),
        ({"output_type": "jpg"}, "choose pil, np, pt or latent"),
        ({"pivot": torch.zeros(2, 4, 12, 12)}, "pivot has latent size 12x12, but the stages below the target have 8x8"),
        ({"pivot": torch.zeros(1, 4, 8, 8)}, r"pivot has shape \(1, 4, 8, 8\), but this call needs \(2, 4, 8, 8\)"),
        ({"latents": torch.zeros(2, 4, 16, 16)}, r"latents has shape .* needs \(2, 4, 8, 8\)"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_call_is_refused_before_any_network_runs(small, call, message):
    ran = []
    handles = [module.register_forward_hook(lambda *_: ran.append(1)) for module in (small.text_encoder, small.unet)]
    if call.get("generator"):
        call = call | {"generator": generators(0)}
    with pytest.raises(SettingsError, match=message) as error:
        small(**{"prompt": PROMPTS[:2], "height": 128, "width": 128, **call})
    for handle in handles:
        handle.remove()
    assert not ran
    assert "\n" not in str(error.value)


def test_a_pipeline_without_a_unet_is_refused():
    class Transformer(DiffusionPipeline):
        def __init__(self, transformer: torch.nn.Module):
            super().__init__()
            self.register_modules(transformer=transformer)

    with pytest.raises(SettingsError, match="a Transformer has no UNet; the cascade needs a UNet2DConditionModel"):
        SelfCascadePipeline.from_pipe(Transformer(torch.nn.Identity()))


def test_enlarging_between_stages_is_bilinear_by_default(small):
    """The latent that the first later step receives, with its noise taken off, is the bilinear enlargement of the base."""
    base = sample(small, size=None, sizes=[(64, 64)], steps=2)
    first = []
    handle = small.unet.conv_in.register_forward_hook(lambda _, args, out: first.append(args[0].clone()))
    sample(small, pivot=base, steps=50, guidance_scale=1.0)
    handle.remove()
    g = generators(0)[0]
    torch.randn(1, 4, 8, 8, generator=g)
    torch.randint(2**63 - 1, (1,), generator=g)
    noise = torch.randn(1, 4, 16, 16, generator=g)
    alpha = small.scheduler.alphas_cumprod[681]
    torch.testing.assert_close(first[0], alpha.sqrt() * bilinear(base, (16, 16)) + (1 - alpha).sqrt() * noise, atol=1e-5, rtol=1e-5)


def test_the_pipelines_scheduler_is_left_alone(small):
    """Stages and threads work on copies: the user's scheduler holds no trace of a call."""
    before = dict(vars(small.scheduler))
    sample(small, steps=3)
    assert all(value is before[name] for name, value in vars(small.scheduler).items())
