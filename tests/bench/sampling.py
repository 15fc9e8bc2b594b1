"""Seconds an image of every method, side by side: the shipped base, and bases of random weights in the shapes of SD 2.1 (quarter width) and SDXL (eighth).

Where a whole picture takes minutes, a few steps of each stage are run, spread over the grid, and their mean counts for all steps of that stage; the rest of
the call (text, decoding) is counted as it is. Methods are run in turn, round after round, so that drift of the machine meets them all alike.

python tests/bench/sampling.py [--only tiny-emoji] [--rounds 3] [--sixteen] [--out bench.json]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

sys.path.insert(0, str(Path(__file__).parents[1]))
import models
from bench import speed
from bench.records import Record, table, write

from selfcascade import SelfCascadePipeline
from selfcascade.baselines import direct, hidiffusion, scalecrafter
from selfcascade.cascade.published import PUBLISHED
from selfcascade.cascade.sampling import Recipe, count_steps
from selfcascade.cascade.upsampler import FeatureUpsampler
from selfcascade.config import BaselineSettings
from selfcascade.generation.models import load_pipeline
from selfcascade_flows import configuration

STEPS = 50
FAST = {"later_steps": 20, "guidance_interval": (0.0, 0.5)}
"""The fast profile of stages that start at the paper's K: fewer steps, and the text alone at the first of them."""
Run = Callable[..., Any]


@dataclass(frozen=True)
class Subject:
    """A base under measurement."""

    name: str
    pipeline: SelfCascadePipeline
    start: float
    guidance: float
    prompt: dict[str, Any]
    probe: int
    """Steps of a full pass that are run, of STEPS."""
    fast: dict[str, Any]
    upscale: str = "bilinear"
    eta: float = 0.0
    t_min: int = 0
    """The tuned stages are guided above it."""

    def size(self, factor: int) -> tuple[int, int]:
        height, width = self.pipeline.spec.native
        return factor * height, factor * width

    def tuned(self, pivot_t: str) -> SelfCascadePipeline:
        phi = FeatureUpsampler.for_base(self.pipeline.spec, variant="C", pivot_t=pivot_t, shared=True)
        for parameter in phi.parameters():
            torch.nn.init.normal_(parameter, std=0.01)
        return quiet(SelfCascadePipeline.from_pipe(self.pipeline, upsampler=phi.to(self.pipeline.device, self.pipeline.unet.dtype)))


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def shipped() -> Subject:
    """The shipped base with the demo's settings."""
    cascade = configuration.load("demo").generation.cascade
    pipeline = load_pipeline("tiny-emoji", device="cpu")
    demo = {"upscale": cascade.upscale, "eta": cascade.eta, "t_min": cascade.t_min}
    return Subject("tiny-emoji", pipeline, cascade.start, cascade.guidance_scale, {"prompt": "red apple"}, STEPS, speed.FAST, **demo)


def shaped(name: str, published: str, divisor: int, probe: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Subject:
    """A base of random weights with the widths of a published one divided; autoencoder and text are small, since they are no part of the comparison."""
    config = dict(PUBLISHED[published].unet)
    heads = config["attention_head_dim"]
    for key in (*models.WIDTHS,):
        if key in config and key != "norm_num_groups":
            config[key] = tuple(width // divisor for width in config[key]) if isinstance(config[key], tuple) else config[key] // divisor
    config |= {
        "norm_num_groups": 8 if divisor > 1 else config.get("norm_num_groups", 32),
        "attention_head_dim": tuple(max(1, count // divisor) for count in heads) if isinstance(heads, tuple) else heads,
    }
    xl = "addition_embed_type" in config
    if xl:
        pooled = 64
        config |= {"projection_class_embeddings_input_dim": 6 * config["addition_time_embed_dim"] + pooled}
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(**config).to(dtype).eval().requires_grad_(False)
    noise = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False, set_alpha_to_one=False)
    small = models.base("sdxl" if xl else "sd21")
    parts = {key: value for key, value in small.components.items() if key not in ("unet", "scheduler")}
    kind = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
    extra = {} if xl else {"requires_safety_checker": False}
    pipeline = quiet(SelfCascadePipeline.from_pipe(kind(**parts | {"unet": unet, "scheduler": noise}, **extra))).to(device, dtype)
    text = {name: torch.randn(1, 77, config["cross_attention_dim"]) for name in ("prompt_embeds", "negative_prompt_embeds")}
    if xl:
        text |= {name: torch.randn(1, pooled) for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")}
    return Subject(name, pipeline, 0.7, 7.5, {key: value.to(device, dtype) for key, value in text.items()}, probe, FAST)


def seconds_of(subject: Subject, run: Run, counts: dict[int, int], **call: Any) -> float:
    """Seconds of one whole picture: every stage's mean step times its count, and what is not a step as it is."""
    marks: list[tuple[int, float]] = []

    def mark(pipeline: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if tensors["latents"].is_cuda:
            torch.cuda.synchronize()
        marks.append((tensors["latents"].shape[-1], time.perf_counter()))
        return {}

    started = time.perf_counter()
    options = {"num_inference_steps": subject.probe, "guidance_scale": subject.guidance, "generator": [torch.Generator().manual_seed(0)], "output_type": "pt"}
    with torch.inference_mode():
        run(**subject.prompt, **options, callback_on_step_end=mark, **call)
    rest = time.perf_counter() - marks[-1][1]
    total, before = rest, started
    by_stage: dict[int, list[float]] = {}
    for side, at in marks:
        by_stage.setdefault(side, []).append(at - before)
        before = at
    first = by_stage[marks[0][0]]
    if len(first) > 1:  # text and noise come before the first step
        total += max(0.0, first[0] - statistics.median(first[1:]))
        first[0] = min(first[0], statistics.median(first[1:]))
    return total + sum(statistics.fmean(steps) * counts[side] for side, steps in by_stage.items())


def methods(subject: Subject, factor: int) -> dict[str, Callable[[], float]]:
    """Every method of a subject at a size, as a function that measures one picture."""
    pipeline, (height, width) = subject.pipeline, subject.size(factor)
    sizes = [side // pipeline.spec.pixels for _, side in pipeline.sizes(height, width)]
    recipe = {
        "steps": STEPS,
        "start": subject.start,
        "guidance_scale": subject.guidance,
        "eta": subject.eta,
        "upscale": subject.upscale,
        "t_min": subject.t_min,
        "strength": 1.0,
    }

    def counts(**change: Any) -> dict[int, int]:
        base, later = count_steps(pipeline.scheduler, Recipe(**recipe | change))
        return {sizes[0]: base} | dict.fromkeys(sizes[1:], later)

    whole = {sizes[-1]: STEPS}
    at = {"height": height, "width": width}
    cascade = at | {"start": subject.start, "upscale": subject.upscale, "eta": subject.eta, "t_min": subject.t_min}
    probe = {key: max(1, value * subject.probe // STEPS) if key == "later_steps" else value for key, value in subject.fast.items()}
    current, zero = subject.tuned("current"), subject.tuned("zero")
    plain = SelfCascadePipeline.from_pipe(pipeline)
    found: dict[str, Callable[[], float]] = {
        "direct": lambda: seconds_of(subject, lambda **call: direct.sample(plain, **at, **call), whole),
        "tuning-free": lambda: seconds_of(subject, quiet(plain), counts(), **cascade),
        "tuned": lambda: seconds_of(subject, current, counts(), **cascade),
        "tuned, pivot at 0": lambda: seconds_of(subject, zero, counts(), **cascade),
        "tuned, pivot every 2": lambda: seconds_of(subject, current, counts(), pivot_every=2, **cascade),
        "fast": lambda: seconds_of(subject, zero, counts(later_steps=subject.fast["later_steps"]), **cascade, **probe),
    }
    quiet(plain)
    settings = BaselineSettings()
    for name, module in (("scalecrafter", scalecrafter), ("hidiffusion", hidiffusion)):
        if module.refusal(pipeline.spec, height, width, settings) is None:
            found[name] = lambda module=module: seconds_of(subject, lambda **call: module.sample(plain, **at, **call), whole)
    return found


def overhead(subject: Subject, rounds: int) -> Record:
    """Our loop over the base stage against diffusers' own pipeline of the same UNet calls."""
    stock = quiet(
        StableDiffusionPipeline(
            **{key: value for key, value in subject.pipeline.components.items() if key in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")},
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )
    base = subject.size(1)

    def timed(run: Run) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            run(**subject.prompt, height=base[0], width=base[1], num_inference_steps=STEPS, guidance_scale=subject.guidance, output_type="latent")
        return time.perf_counter() - started

    timed(stock), timed(subject.pipeline)
    ratios = [timed(subject.pipeline) / timed(stock) for _ in range(max(5, rounds))]
    return record(f"sampling/{subject.name}/own_loop_over_diffusers", ratios, "<= 1.02", "StableDiffusionPipeline, same UNet, 50 steps at the base's size")


def record(name: str, ratios: list[float], aim: str, against: str, note: str = "", unit: str = "ratio") -> Record:
    return Record(name, statistics.median(ratios), unit, aim, min(ratios), max(ratios), len(ratios), against, note)


AIMS = {
    ("tuning-free", "direct", 2): "<= 0.90",
    ("tuned", "tuning-free", 2): "<= 1.10",
    ("tuned, pivot at 0", "tuning-free", 2): "<= 1.03",
    ("fast", "direct", 2): "<= 0.5",
    ("tuning-free", "direct", 4): "<= 0.85",
    ("tuned", "direct", 4): "<= 0.85",
}
"""Held for SD 2.1's shape at K = 700 and for the shipped base at its own K."""


def measure(subject: Subject, factor: int, rounds: int) -> list[Record]:
    found = methods(subject, factor)
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(rounds + 1):
        for name, run in found.items():
            value = run()
            if turn or rounds == 0:  # the first round warms up
                seconds[name].append(value)
            print(f"{subject.name} {factor * factor}x {name}: {value:.2f} s", file=sys.stderr, flush=True)
    note = "" if subject.probe == STEPS else f"{subject.probe} steps of {STEPS} run, the others counted as their mean"
    prefix, side = f"sampling/{subject.name}/{factor * factor}x", subject.size(factor)[0]
    records = [
        record(f"{prefix}/seconds/{name}", values, "", f"{side} px, guidance {subject.guidance:g}, K / T = {subject.start:g}", note, "s")
        for name, values in seconds.items()
    ]
    for (name, against, at), aim in AIMS.items():
        if at == factor:
            ratios = [one / other for one, other in zip(seconds[name], seconds[against], strict=True)]
            records.append(record(f"{prefix}/{name} over {against}", ratios, aim if subject.name != "sdxl-eighth" else "", f"{against}, in turn", note))
    return records


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "tiny-emoji": shipped,
    "sd21-quarter": lambda: shaped("sd21-quarter", "sd-2.1-base", 4, 10),
    "sdxl-eighth": lambda: shaped("sdxl-eighth", "sdxl", 8, 10),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SUBJECTS, action="append")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sixteen", action="store_true", help="16x too: minutes a step on the shapes of the big ones")
    parser.add_argument("--probe", type=int, help="steps that are run of the shapes of the big ones, in place of 10")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    records: list[Record] = []
    for name in arguments.only or SUBJECTS:
        subject = SUBJECTS[name]()
        if arguments.probe and name != "tiny-emoji":
            subject = Subject(**vars(subject) | {"probe": arguments.probe})
        if name == "tiny-emoji":
            records.append(overhead(subject, arguments.rounds))
        records += measure(subject, 2, arguments.rounds)
        if arguments.sixteen:
            heavy = subject if name == "tiny-emoji" else Subject(**vars(subject) | {"probe": 1})
            records += measure(heavy, 4, 1 if name == "tiny-emoji" else 0)
        write(arguments.out, records)
    print(table(records))


if __name__ == "__main__":
    main()
