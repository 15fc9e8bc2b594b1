"""The checks that any implementation of the method must pass, run on a user's own base and device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from selfcascade.baselines.attention_scaling import attention_factor, refusal, scaled_attention
from selfcascade.cascade.families import BaseSpec
from selfcascade.cascade.injection import pivot_features, unet_with_pivot
from selfcascade.cascade.pipeline import SelfCascadePipeline
from selfcascade.cascade.pivot import bilinear
from selfcascade.cascade.schedule import Size, remaining_timesteps
from selfcascade.cascade.solver import solver_on
from selfcascade.cascade.upsampler import FeatureUpsampler, count_parameters
from selfcascade.config import BaselineSettings
from selfcascade.generation.models import is_memory

PROMPTS = ("a red apple on a table", "two blue birds")


class Failed(Exception):
    """A check does not hold; says what was found."""


@dataclass(frozen=True)
class Check:
    """One claim about the method."""

    claim: str
    run: Callable[[Subject], str]
    """Returns what was found; raises :class:`Failed` where the claim is false."""


@dataclass(frozen=True)
class Outcome:
    """What came of one check."""

    claim: str
    passed: bool
    found: str
    seconds: float
    peak_mb: float | None
    """Largest memory on the CUDA device, MiB; None on others."""


@dataclass(frozen=True)
class Subject:
    """What is checked: a cascade of the user's base, sampled by DDIM."""

    pipeline: SelfCascadePipeline

    @property
    def spec(self) -> BaseSpec:
        """What the cascade knows of the base."""
        return self.pipeline.spec

    @property
    def small(self) -> tuple[Size, Size]:
        """Two stages that run in moments: half of the base's side, then the whole."""
        step = self.spec.step
        half = tuple(max(step, side // 2 // step * step) for side in self.spec.native)
        return (half[0], half[1]), (2 * half[0], 2 * half[1])

    @property
    def tolerance(self) -> float:
        """Largest relative difference of two sums of the same terms in another order, in the UNet's precision."""
        return 1e-3 if self.pipeline.unet.dtype == torch.float32 else 0.1

    def sample(self, *, prompts: Sequence[str] = PROMPTS[:1], upsampler: FeatureUpsampler | None = None, steps: int = 4, **call: Any) -> Tensor:
        """Clean latents, (B, C, h, w), of the two small stages unless ``sizes`` says otherwise."""
        pipeline = SelfCascadePipeline.from_pipe(self.pipeline, upsampler=upsampler) if upsampler else self.pipeline
        pipeline.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
        options: dict[str, Any] = {
            "sizes": self.small,
            "num_inference_steps": steps,
            "output_type": "latent",
            "generator": generators,
            "return_dict": False,
        } | call
        latents: Tensor = pipeline(list(prompts), **options)[0]
        return latents

    def upsampler(self, variant: str = "C", *, trained: bool, **options: Any) -> FeatureUpsampler:
        """An upsampler of the base; one that adds something where ``trained``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            phi = FeatureUpsampler.for_base(self.spec, variant=variant, **options)
            if trained:
                for parameter in phi.parameters():
                    torch.nn.init.normal_(parameter, std=0.05)
        moved: FeatureUpsampler = phi.to(self.pipeline._execution_device, self.pipeline.unet.dtype)
        return moved


def run_checks(pipeline: SelfCascadePipeline) -> Iterator[Outcome]:
    """The outcome of every check in turn, as it is known.

    Args:
        pipeline: of the base, on its device and in its precision; its scheduler is replaced by DDIM on the same noise schedule.
    """
    pipeline = SelfCascadePipeline.from_pipe(pipeline, scheduler=solver_on(pipeline.scheduler, "ddim"))
    pipeline.register_modules(upsampler=None)
    pipeline.set_progress_bar_config(disable=True)
    for check in CHECKS:
        yield _outcome(check, Subject(pipeline))


def _outcome(check: Check, subject: Subject) -> Outcome:
    cuda = subject.pipeline._execution_device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started, passed = time.perf_counter(), True
    try:
        found = check.run(subject)
    except Failed as failure:
        passed, found = False, str(failure)
    except (RuntimeError, MemoryError) as error:
        if not is_memory(error):
            raise
        passed, found = False, "out of memory; set --dtype to a half precision"
    return Outcome(check.claim, passed, found, time.perf_counter() - started, torch.cuda.max_memory_allocated() / 2**20 if cuda else None)


def grid(subject: Subject) -> str:
    """Check 1: of 50 DDIM steps K = 700 keeps 35, the first of them 681, with noise coefficients 0.3076 and 0.9515."""
    scheduler = DDIMScheduler.from_config(subject.pipeline.scheduler.config, timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(50)
    timesteps = remaining_timesteps(scheduler, 0.7)
    first = int(timesteps[0])
    signal = float(scheduler.alphas_cumprod[first].sqrt())
    found = f"{len(timesteps)} steps from t={first}, coefficients {signal:.4f} and {sqrt(1 - signal**2):.4f}"
    scaled_linear = scheduler.config.beta_schedule == "scaled_linear" and (scheduler.config.beta_start, scheduler.config.beta_end) == (0.00085, 0.012)
    if (len(timesteps), first) != (35, 681) or (scaled_linear and round(signal, 4) != 0.3076):
        raise Failed(found)
    return found if scaled_linear else f"{found} (another noise schedule than Stable Diffusion's)"


def fresh_is_tuning_free(subject: Subject) -> str:
    """Check 2: with an upsampler that was not trained the cascade is the tuning-free one, bit for bit."""
    plain = subject.sample()
    for variant in ("A", "C"):
        tuned = subject.sample(upsampler=subject.upsampler(variant, trained=False))
        if not torch.equal(tuned, plain):
            raise Failed(f"variant {variant} differs by up to {float((tuned - plain).abs().max()):.2e}")
    return "variants A and C, equal in every bit"


def target_size(subject: Subject) -> str:
    """Check 3: the latents of a picture of four times the pixels, and the picture itself."""
    spec = subject.spec
    size = (2 * spec.native[0], 2 * spec.native[1])
    latents = subject.sample(steps=2, sizes=subject.pipeline.sizes(*size))
    shape = (1, spec.latent_channels, size[0] // spec.pixels, size[1] // spec.pixels)
    if tuple(latents.shape) != shape or not latents.isfinite().all():
        raise Failed(f"latents of shape {tuple(latents.shape)}, finite: {bool(latents.isfinite().all())}; wanted {shape}")
    pictures = subject.pipeline(list(PROMPTS[:1]), sizes=[size], num_inference_steps=1, output_type="pt", return_dict=False)[0]
    if not pictures.isfinite().all():
        raise Failed("the decoded picture is not finite; the autoencoder overflows in this precision")
    return f"latents {shape}, picture {tuple(pictures.shape)}"


def counts(subject: Subject) -> str:
    """Check 4: variant C has at most 2,000 numbers; on the channels of SD and SDXL variant A has 145,457,280 and C 1,824."""
    spec = subject.spec
    found = {}
    for variant in ("A", "C"):
        config = {"channels": spec.channels("skip"), "time_width": spec.time_width, "norm_groups": spec.norm_groups, "variant": variant}
        found[variant] = count_parameters(**config).trained
    text = ", ".join(f"{variant} {count:,}" for variant, count in found.items())
    full = spec.channels("skip") == (320, 640, 1280, 1280) and spec.time_width == 1280
    if found["C"] > 2000 or (full and found != {"A": 145_457_280, "C": 1_824}):
        raise Failed(text)
    return text


def training(subject: Subject) -> str:
    """Check 5: a step of training changes the upsampler alone, and the loss falls on one fixed batch."""
    unet, device = subject.pipeline.unet, subject.pipeline._execution_device
    before = _fingerprint(unet.parameters())
    phi = subject.upsampler("C", trained=False).float()
    optimizer = torch.optim.AdamW(phi.parameters(), lr=0.03, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    (_, small), spec = subject.small, subject.spec
    sides = [side // spec.pixels for side in small]
    z, noise = (torch.randn(1, spec.latent_channels, *sides, generator=generator).to(device, unet.dtype) for _ in range(2))
    pivot = torch.nn.functional.avg_pool2d(z, 2)
    scheduler = DDIMScheduler.from_config(subject.pipeline.scheduler.config)
    t = torch.tensor([400], device=device)
    noisy = scheduler.add_noise(z.float(), noise.float(), t).to(unet.dtype)
    target = scheduler.get_velocity(z.float(), noise.float(), t) if spec.prediction == "v_prediction" else noise.float()
    text, conditioning = _conditioning(subject, small)
    frozen = [parameter.requires_grad for parameter in unet.parameters()]
    unet.requires_grad_(False)
    losses = []
    try:
        for _ in range(8):
            predicted = unet_with_pivot(unet, noisy, t, text, upsampler=phi, pivot=pivot, **conditioning)
            loss = (predicted.float() - target).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(float(loss.detach()))
        if any(parameter.grad is not None for parameter in unet.parameters()):
            raise Failed("a weight of the frozen UNet has a gradient")
    finally:
        for parameter, required in zip(unet.parameters(), frozen, strict=True):
            parameter.requires_grad_(required)
    if _fingerprint(unet.parameters()) != before:
        raise Failed("a weight of the frozen UNet has changed")
    if not losses[-1] < losses[0]:
        raise Failed(f"loss {losses[0]:.5f} to {losses[-1]:.5f} in {len(losses)} steps")
    return f"loss {losses[0]:.5f} to {losses[-1]:.5f} in {len(losses)} steps, the UNet untouched"


def constant_pivot(subject: Subject) -> str:
    """Check 6: the pivot that passes the encoder is the same at the first step and at the last."""
    base, _ = subject.small
    side = (base[0] // subject.spec.pixels, base[1] // subject.spec.pixels)
    seen: list[Tensor] = []

    def keep(module: object, args: tuple[Tensor, ...]) -> None:
        if tuple(args[0].shape[-2:]) == side:
            seen.append(args[0].detach().clone())

    pivot = subject.sample(sizes=[base])
    handle = subject.pipeline.unet.conv_in.register_forward_pre_hook(keep)
    try:
        subject.sample(upsampler=subject.upsampler(trained=True), pivot=pivot)
    finally:
        handle.remove()
    wanted = torch.cat([pivot, pivot]).to(seen[0].dtype) if seen else None
    if wanted is None or len(seen) < 2 or not all(torch.equal(each, wanted) for each in seen):
        raise Failed(f"{len(seen)} passes of the pivot, not all of them the pivot itself")
    return f"{len(seen)} passes, all of them the pivot itself"


def branches_apart(subject: Subject) -> str:
    """Check 7: guidance does not depend on whether its branches share a pass."""
    phi = subject.upsampler(trained=True)
    together, apart = (subject.sample(prompts=PROMPTS, upsampler=phi, joint_branches=joint) for joint in (True, False))
    return _near(together, apart, subject.tolerance)


def small_start(subject: Subject) -> str:
    """Check 8: a stage that starts at the last timestep returns almost the enlarged pivot."""
    base, size = subject.small
    pivot = subject.sample(sizes=[base])
    grown = bilinear(pivot, (size[0] // subject.spec.pixels, size[1] // subject.spec.pixels))
    return _near(subject.sample(steps=50, start=0.001, pivot=pivot), grown, 0.15)


def attention(subject: Subject) -> str:
    """Check 9: attention scaling's factor of every level, four times the pixels; for SD at 512 pixels 1.0801, 1.0954, 1.1180 and 1.1547."""
    spec = subject.spec
    size = (2 * spec.native[0], 2 * spec.native[1])
    reason = refusal(spec, *size, BaselineSettings())
    if reason is not None:
        return f"does not apply: {reason}"
    tokens = [size[0] * size[1] // (spec.pixels * 2**level) ** 2 for level in range(spec.family.levels)]
    factors = [round(attention_factor(count, 4.0), 4) for count in tokens]
    if spec.native == (512, 512) and factors != [1.0801, 1.0954, 1.1180, 1.1547]:
        raise Failed(str(factors))
    plain = subject.sample(sizes=[size], steps=1)
    with scaled_attention(subject.pipeline.unet, 4.0):
        scaled = subject.sample(sizes=[size], steps=1)
    if torch.equal(scaled, plain) or not torch.equal(subject.sample(sizes=[size], steps=1), plain):
        raise Failed("scaling changes nothing, or stays after it was taken off")
    return ", ".join(f"{factor:.4f}" for factor in factors)


def two_threads(subject: Subject) -> str:
    """Check 11: two threads that share the UNet sample as they would one after the other."""
    phi = subject.upsampler(trained=True)

    def one(prompt: str) -> Tensor:
        return subject.sample(prompts=[prompt], upsampler=phi)

    series = [one(prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(2) as pool:
        threads = list(pool.map(one, PROMPTS))
    return _near(torch.cat(threads), torch.cat(series), subject.tolerance)


def untouched(subject: Subject) -> str:
    """Detached, the UNet is as it was: its hooks, its weights, and what it gives."""
    unet = subject.pipeline.unet
    z, (text, conditioning) = (
        torch.randn(1, subject.spec.latent_channels, 2 * subject.spec.latent_step, 2 * subject.spec.latent_step),
        (_conditioning(subject, subject.small[0])),
    )
    z = z.to(subject.pipeline._execution_device, unet.dtype)

    def state() -> tuple[int, tuple[float, ...], Tensor]:
        hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in unet.modules())
        with torch.no_grad():
            return hooks, _fingerprint(unet.parameters()), unet(z, 500, encoder_hidden_states=text, return_dict=False, **conditioning)[0]

    hooks, weights, output = state()
    features = pivot_features(unet, z, 500, text, **conditioning)
    subject.sample(upsampler=subject.upsampler(trained=True))
    hooks_after, weights_after, output_after = state()
    if hooks_after != hooks or weights_after != weights or not torch.equal(output, output_after):
        raise Failed(f"{hooks_after - hooks} hooks left, weights equal: {weights_after == weights}, output equal: {torch.equal(output, output_after)}")
    return f"{len(features)} features were read, {hooks} hooks before and after, the same bits"


CHECKS = (
    Check("the grid of a stage", grid),
    Check("an untrained upsampler is the tuning-free cascade", fresh_is_tuning_free),
    Check("four times the pixels", target_size),
    Check("parameter counts", counts),
    Check("training changes the upsampler alone", training),
    Check("the pivot stays as it is", constant_pivot),
    Check("guidance jointly and separately", branches_apart),
    Check("a small K returns the pivot", small_start),
    Check("attention scaling", attention),
    Check("two threads, one UNet", two_threads),
    Check("detached without a trace", untouched),
)
"""Those of the method that look at the base and the device; distances between pictures are for `evaluate`."""


def _conditioning(subject: Subject, size: Size) -> tuple[Tensor, dict[str, Any]]:
    from selfcascade.cascade.conditioning import encode

    with torch.no_grad():
        found = encode(subject.pipeline, subject.spec.family, prompt=[PROMPTS[0]], negative_prompt=None, per_prompt=1, guided=False)
    return found.text, found.of_stage(size)


def _near(one: Tensor, other: Tensor, tolerance: float) -> str:
    """How far two latents are apart, relative to their size."""
    difference = float((one - other).square().mean().sqrt() / other.square().mean().sqrt())
    if not difference <= tolerance:
        raise Failed(f"relative difference {difference:.2e}, more than {tolerance:g}")
    return f"relative difference {difference:.1e}"


def _fingerprint(parameters: Iterator[torch.nn.Parameter]) -> tuple[float, ...]:
    return tuple(float(parameter.detach().double().sum()) for parameter in parameters)
