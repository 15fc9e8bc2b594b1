"""What the method costs on one GPU, at the published widths with random weights: a training step on SD 2.1 at 1024 px, pictures of 2048 and 4096 px on SDXL.

Training steps are the product's own trainer's, on random latents that lie in a store. Memory is what torch's allocator gave out at most, everything that a run
holds on the GPU included. Of a picture a few steps of each stage are run, spread over the grid, and their mean counts for all; text and autoencoder have no
part. Whatever is compared was run in turn on the same card.

python tests/bench/gpu.py [--only training] [--out docs/results/gpu.json]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import sampling, training
from bench.records import Record, machine, table, write
from bench.sampling import record

from selfcascade.bases import resolve_base

SAMPLED = ("direct", "tuning-free", "tuned", "tuned, pivot at 0", "fast")
WARM = 3
"""Training steps before those that are timed."""
Recorder = Callable[[list[Record]], None]


def here(device: torch.device) -> str:
    """The card, and the processor that feeds it."""
    return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__} fed by {machine()}" if device.type == "cuda" else machine()


def wait(device: torch.device) -> float:
    """The clock once the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_gib(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


def emptied(device: torch.device) -> None:
    """Let go of what earlier methods left, and forget their peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def shaped(published: str, divisor: int, probe: int, device: torch.device) -> sampling.Subject:
    """A base of random weights in bfloat16; with ``divisor`` not only narrower but of a smaller native side too."""
    subject = sampling.shaped(published, published, divisor, probe, device=device, dtype=torch.bfloat16)
    side = subject.pipeline.unet.config.sample_size
    subject.pipeline.unet.register_to_config(sample_size=side // divisor)
    return replace(subject, pipeline=sampling.quiet(sampling.SelfCascadePipeline.from_pipe(subject.pipeline)))


def train(device: torch.device, divisor: int, steps: int, tell: Recorder) -> None:
    """Seconds and memory of a training step of every method on SD 2.1's UNet."""
    with TemporaryDirectory(prefix="selfcascade-") as folder, training.own_store(Path(folder, "store")) as store:
        place = Path(folder, "sd21")
        pipeline = shaped("sd-2.1-base", divisor, 1, device).pipeline
        pipeline.save_pretrained(place)
        native = pipeline.spec.native[0]
        subject = training.Subject(resolve_base(str(place)), 2 * native, 4, guidance=7.5, probe=10, device=device, dtype="bfloat16")
        del pipeline
        latents = training.stored_latents(subject, store)
        about = f"{subject.size} px, batch {subject.batch}, bfloat16"
        seconds: dict[str, list[float]] = {}
        peaks: dict[str, float] = {}
        pivots = 0.0
        for method in training.METHODS:
            emptied(device)
            pipeline = subject.pipeline()
            trainer = subject.trainer(method, pipeline, latents)
            with trainer.objective.held():
                for _ in range(WARM):
                    trainer.advance()
                marks = [wait(device)]
                for _ in range(steps):
                    trainer.advance()
                    marks.append(wait(device))
            seconds[method] = [after - before for before, after in pairwise(marks)]
            peaks[method] = peak_gib(device)
            if method == training.OURS:
                pivots = pivot_seconds(subject, pipeline, latents)
            print(f"{method}: {statistics.median(seconds[method]):.3f} s, {peaks[method]:.1f} GiB", file=sys.stderr, flush=True)
            del trainer, pipeline
        full = statistics.median(seconds[training.FULL])
        records = []
        for method in training.METHODS:
            records.append(record(f"gpu/sd-2.1-base/seconds/{method}", seconds[method], "", about, unit="s"))
            records.append(record(f"gpu/sd-2.1-base/GiB/{method}", [peaks[method]], "", f"{about}; allocated at most", unit="GiB"))
            if method != training.FULL:
                aim = "<= 0.65" if method == training.OURS else ""
                records.append(
                    record(f"gpu/sd-2.1-base/{method} over full", [value / full for value in seconds[method]], aim, "median step of full fine-tuning")
                )
                if peaks[training.FULL]:
                    aim = "<= 0.5" if method == training.OURS else ""
                    ratio = peaks[method] / peaks[training.FULL]
                    records.append(record(f"gpu/sd-2.1-base/peak memory of {method} over full", [ratio], aim, "full fine-tuning; allocated at most"))
        ratios = [(value + pivots) / value for value in seconds[training.OURS]]
        against = f"the released recipe: {training.SAMPLING} guided base steps for each sample of a step"
        records.append(record(f"gpu/sd-2.1-base/step that samples its pivot over {training.OURS}", ratios, ">= 10", against))
        tell(records)


def pivot_seconds(subject: training.Subject, pipeline: training.SelfCascadePipeline, latents: training.LatentCache) -> float:
    """Seconds in which the base samples the pivots of one batch."""
    device, dtype = subject.device, getattr(torch, subject.dtype)
    text = latents.batch(latents.keys("train")[: subject.batch]).text.text.to(device, dtype)
    empty = latents.empty().text.to(device, dtype).expand_as(text)
    took = 0.0
    for _ in range(2):  # the first warms up
        started = wait(device)
        with torch.inference_mode():
            pipeline(
                prompt_embeds=text,
                negative_prompt_embeds=empty,
                height=subject.size // 2,
                width=subject.size // 2,
                num_inference_steps=subject.probe,
                guidance_scale=subject.guidance,
                output_type="latent",
            )
        took = wait(device) - started
    return took * training.SAMPLING / subject.probe


def sample(device: torch.device, divisor: int, factor: int, probe: int, rounds: int, tell: Recorder) -> None:
    """Seconds and memory of a picture of every method on SDXL's UNet."""
    emptied(device)
    subject = shaped("sdxl", divisor, probe, device)
    held = peak_gib(device)
    found = {name: run for name, run in sampling.methods(subject, factor).items() if name in SAMPLED}
    seconds: dict[str, list[float]] = {name: [] for name in found}
    peaks: dict[str, float] = {}
    for turn in range(rounds + 1):
        for name, run in found.items():
            emptied(device)
            value = run()
            if turn:  # the first round warms up
                seconds[name].append(value)
                peaks[name] = peak_gib(device)
            print(f"SDXL {factor * factor}x {name}: {value:.2f} s, {peak_gib(device):.1f} GiB of {held:.1f} GiB weights", file=sys.stderr, flush=True)
    side = subject.size(factor)[0]
    prefix, about = f"gpu/sdxl/{factor * factor}x", f"{side} px, bfloat16, guidance {subject.guidance:g}, K / T = {subject.start:g}"
    note = f"{probe} steps of {sampling.STEPS} run, the others counted as their mean"
    records = []
    for name in found:
        records.append(record(f"{prefix}/seconds/{name}", seconds[name], "", about, note, "s"))
        records.append(record(f"{prefix}/GiB/{name}", [peaks[name]], "", f"{about}; allocated at most", unit="GiB"))
    for (name, against, at), aim in sampling.AIMS.items():
        if at == factor:
            ratios = [one / other for one, other in zip(seconds[name], seconds[against], strict=True)]
            records.append(record(f"{prefix}/{name} over {against}", ratios, aim, f"{against}, in turn", note))
    tell(records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("training", "4x", "16x"), action="append")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--divisor", type=int, default=1, help="of all widths: to try this script on a small machine")
    parser.add_argument("--steps", type=int, default=10, help="training steps that are timed of each method")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = torch.device(arguments.device)
    told: list[Record] = []

    def tell(records: list[Record]) -> None:
        told.extend(replace(each, machine=here(device)) for each in records)
        write(arguments.out, told)  # what is measured outlives what comes after it

    parts = arguments.only or ("training", "4x", "16x")
    if "training" in parts:
        train(device, arguments.divisor, arguments.steps, tell)
    if "4x" in parts:
        sample(device, arguments.divisor, 2, 5, 2, tell)
    if "16x" in parts:
        sample(device, arguments.divisor, 4, 2, 1, tell)
    print(table(told))


if __name__ == "__main__":
    main()
