"""What a training step costs, side by side: upsamplers, LoRA and full fine-tuning on the shipped base and on random weights in SD 2.1's shape, quarter width.

Every method takes its steps by the product's own trainer, in turn, round after round, on the same random latents, which lie in a store as those of pictures
do; ratios are of steps of the same round. Seconds are of one core, in which other processes have no part; only checkpoints, which wait for the store, are
held by the clock. Memory and arithmetic are counted, the latter also for SD 2.1 in full width.

python tests/bench/training.py [--only tiny-emoji] [--rounds 3] [--steps 1] [--out training.json]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import logging
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.records import Record, table, write
from bench.sampling import quiet, record, shaped

from selfcascade import SelfCascadePipeline
from selfcascade.adaptation.basis import fit_basis
from selfcascade.adaptation.cache import EMPTY, Batch, LatentCache
from selfcascade.adaptation.checkpoint import CheckpointFolder
from selfcascade.adaptation.checkpoint_writer import CheckpointWriter
from selfcascade.adaptation.objective import NoiseObjective
from selfcascade.adaptation.start import trainer_of
from selfcascade.adaptation.tensorfile import open_tensor_file, written_tensor_file
from selfcascade.adaptation.trainer import Trainer
from selfcascade.adaptation.training_run import TrainingRun
from selfcascade.bases import ResolvedBase, load_pipeline, resolve_base
from selfcascade.cascade.families import BaseSpec, spec_of
from selfcascade.cascade.injection import unet_with_pivot
from selfcascade.cascade.published import published_unet
from selfcascade.cascade.upsampler import FeatureUpsampler
from selfcascade.config import AdaptationSettings, ComputeSettings, Dtype, StoreSettings, UpsamplerSettings
from selfcascade.storage import Store, embedded

CPU = torch.device("cpu")
METHODS = {
    "upsampler A": {"upsampler": UpsamplerSettings(variant="A")},
    "upsampler C": {"upsampler": UpsamplerSettings(variant="C")},
    "upsampler D": {"upsampler": UpsamplerSettings(variant="D")},
    "LoRA rank 4": {"trainable": "lora", "rank": 4},
    "LoRA rank 32": {"trainable": "lora", "rank": 32},
    "full": {"trainable": "full"},
}
OURS, FULL = "upsampler C", "full"
STORED = ("upsampler A", OURS, FULL)
"""Methods whose checkpoints are timed: the default, the smallest and the largest."""
SAMPLING = 50
"""Steps by which the released recipe samples the pivot of each training step."""
PICTURES = 64
KEY = "cache/latents/bench.safetensors"


@dataclass(frozen=True)
class Subject:
    """A base under measurement."""

    base: ResolvedBase
    size: int
    batch: int
    guidance: float
    probe: int
    """Steps of the pivot's sampling that are run, of SAMPLING."""
    device: torch.device = CPU
    dtype: Dtype = "float32"

    @property
    def name(self) -> str:
        return self.base.name

    def pipeline(self) -> SelfCascadePipeline:
        return quiet(SelfCascadePipeline.from_pipe(load_pipeline(self.base, getattr(torch, self.dtype), self.device)))

    def trainer(self, method: str, pipeline: SelfCascadePipeline, latents: LatentCache) -> Trainer:
        """At step 0, as a run of the product has it."""
        settings = AdaptationSettings(
            dataset="datasets/bench",
            base=self.base.location,
            size=self.size,
            batch=self.batch,
            basis_samples=2,
            previews=0,
            compute=ComputeSettings(dtype=self.dtype, threads=1),
            **METHODS[method],
        )
        trainer = trainer_of(settings, pipeline, latents, self.base, self.device)
        if isinstance(trainer.objective, NoiseObjective) and trainer.objective.trained.needs_basis:
            fit_basis(trainer.objective, latents)
        return trainer


def shipped(folder: Path) -> Subject:
    """The shipped base at the demo's size, batch and guidance."""
    return Subject(resolve_base("tiny-emoji"), size=256, batch=8, guidance=4.0, probe=SAMPLING)


def quarter(folder: Path) -> Subject:
    """SD 2.1's layout at twice its native side."""
    return _quarter(folder / "sd21-quarter", size=1024, batch=1, probe=4)


def quarter_of_512(folder: Path) -> Subject:
    """The same where attention has the share of a pass that it has in full width at 1024 px (width times tokens squared, all else the other way)."""
    return _quarter(folder / "sd21-quarter-512", size=512, batch=4, probe=10)


def _quarter(place: Path, *, size: int, batch: int, probe: int) -> Subject:
    if not place.is_dir():
        pipeline = shaped(place.name, "sd-2.1-base", 4, 1).pipeline
        pipeline.unet.register_to_config(sample_size=size // 2 // 8)
        pipeline.save_pretrained(place)
    return Subject(resolve_base(str(place)), size=size, batch=batch, guidance=7.5, probe=probe)


SUBJECTS = {"tiny-emoji": shipped, "sd21-quarter": quarter, "sd21-quarter-512": quarter_of_512}


@dataclass
class Clocked:
    """A cache that knows how long it took to read."""

    latents: LatentCache
    seconds: float = 0.0

    def batch(self, keys: Iterable[str]) -> Batch:
        started = time.process_time()
        found = self.latents.batch(keys)
        self.seconds += time.process_time() - started
        return found

    def shape(self, key: str) -> tuple[int, ...]:
        return self.latents.shape(key)


def stored_latents(subject: Subject, store: Store) -> LatentCache:
    """Random latents and texts, put into the store and opened from there as those of a dataset's shard."""
    pipeline = subject.pipeline()
    side, text = subject.size // pipeline.spec.pixels, (77, pipeline.unet.config.cross_attention_dim)
    generator = torch.Generator().manual_seed(0)
    keys = [f"s{number:02d}" for number in range(PICTURES)]
    shapes = {f"{EMPTY}/text": text}
    for key in keys:
        shapes |= {f"{key}/target": (4, side, side), f"{key}/pivot": (4, side // 2, side // 2), f"{key}/text": text}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    with written_tensor_file(tensors, {"samples": {key: {"caption": key, "split": "train"} for key in keys}}) as file:
        store.put_cache(KEY, file)
    opened = open_tensor_file(store, KEY)
    return LatentCache([opened], digest=opened.sha256)


def sampling_seconds(subject: Subject, pipeline: SelfCascadePipeline, latents: LatentCache) -> float:
    """Seconds in which the base samples pivots for one batch; the text is at hand, the autoencoder has no part."""
    text = latents.batch(latents.keys("train")[: subject.batch]).text.text
    started = time.process_time()
    with torch.inference_mode():
        pipeline(
            prompt_embeds=text,
            negative_prompt_embeds=latents.empty().text.expand_as(text),
            height=subject.size // 2,
            width=subject.size // 2,
            num_inference_steps=subject.probe,
            guidance_scale=subject.guidance,
            output_type="latent",
        )
    return (time.process_time() - started) * SAMPLING / subject.probe


def checkpoint_seconds(run: TrainingRun, folder: CheckpointFolder) -> tuple[float, float]:
    """Seconds for which a checkpoint holds up the steps, and until it is in the store: as if nothing of that happened beside them."""
    started = time.perf_counter()
    with CheckpointWriter(folder) as writer:
        writer.save(run.trainer.step, *run.state())
        copied = time.perf_counter()
        writer.wait()
    return copied - started, time.perf_counter() - started


def measure(subject: Subject, store: Store, latents: LatentCache, *, rounds: int, steps: int) -> list[Record]:
    """Everything that is told in seconds."""
    pipeline = subject.pipeline()
    runs = {method: TrainingRun(subject.trainer(method, pipeline, latents)) for method in METHODS}
    folders = {method: CheckpointFolder(store, version=f"{number:064x}", latents=latents.digest) for number, method in enumerate(STORED)}
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    loading: list[float] = []
    sampling: list[float] = []
    stored: dict[str, list[tuple[float, ...]]] = {method: [] for method in STORED}
    for turn in range(rounds + 1):
        for method, run in runs.items():
            run.trainer.latents = clock = Clocked(latents)
            with run.trainer.objective.held():
                started = time.process_time()
                for _ in range(steps):
                    run.trainer.advance()
                step = (time.process_time() - started) / steps
            print(f"{subject.name} round {turn}, {method}: {step:.3f} s a step", file=sys.stderr, flush=True)
            if not turn:  # the first round warms up
                continue
            seconds[method].append(step)
            if method == OURS:
                loading.append(100 * clock.seconds / steps / step)
                sampling.append(sampling_seconds(subject, pipeline, latents))
            if method in STORED:
                every = run.settings.checkpoint_steps * step
                stored[method].append(tuple(100 * took / (every + took) for took in checkpoint_seconds(run, folders[method])))
    return records_of(subject, seconds, loading, sampling, stored)


def records_of(
    subject: Subject, seconds: dict[str, list[float]], loading: list[float], sampling: list[float], stored: dict[str, list[tuple[float, ...]]]
) -> list[Record]:
    prefix, about = f"training/{subject.name}", f"{subject.size} px, batch {subject.batch}"
    every = AdaptationSettings.model_fields["checkpoint_steps"].default
    records = [record(f"{prefix}/seconds/{method}", values, "", about, unit="s") for method, values in seconds.items()]
    for method, aim in ((OURS, "<= 0.65"), ("upsampler A", ""), ("upsampler D", ""), ("LoRA rank 4", ""), ("LoRA rank 32", "")):
        ratios = [one / other for one, other in zip(seconds[method], seconds[FULL], strict=True)]
        records.append(record(f"{prefix}/{method} over {FULL}", ratios, aim, f"{FULL} fine-tuning, in turn"))
    ratios = [(own + pivots) / own for own, pivots in zip(seconds[OURS], sampling, strict=True)]
    note = (
        ""
        if subject.probe == SAMPLING
        else f"On {subject.name} {subject.probe} of the {SAMPLING} steps of a pivot's sampling are run, the others counted as their mean"
    )
    name = f"{prefix}/step that samples its pivot over {OURS}"
    records.append(record(name, ratios, ">= 10", f"the released recipe: {SAMPLING} guided base steps for each sample of a step", note))
    records.append(record(f"{prefix}/loading of latents, % of a step of {OURS}", loading, "< 3", "its own step", unit="%"))
    for method, shares in stored.items():
        copied, waited = (list(values) for values in zip(*shares, strict=True))
        about = f"a checkpoint every {every} steps"
        records.append(record(f"{prefix}/checkpoints waited for, % of the time of {method}", waited, "< 1", about, unit="%"))
        records.append(record(f"{prefix}/checkpoints copied for their writer, % of the time of {method}", copied, "", about, unit="%"))
    return records


def peak_bytes(trainer: Trainer) -> int:
    """The most that tensors take in a step that is not the first: networks, average and optimizer, and what torch's allocator gives out in the step.

    Counted, not sampled: gradients, what is kept for the backward pass and passing results are in it, libraries and their working memory are not. It is what
    ``torch.cuda.max_memory_allocated`` says on a GPU.
    """
    for _, parameter in trainer.trainable:
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()  # AdamW's averages are there from the first step on
    trainer.optimizer.zero_grad(set_to_none=True)
    optimizer = [value for slots in trainer.optimizer.state.values() for value in slots.values()]
    networks = [trainer.objective.unet, trainer.trained]
    held = [*optimizer, *trainer.average.values.values(), *(tensor for network in networks for tensor in (*network.parameters(), *network.buffers()))]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        trainer.advance()
    events = sorted((event.start_ns(), event.nbytes()) for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]")
    return sum(storages.values()) + max(accumulate(size for _, size in events))


def memory(subject: Subject, latents: LatentCache) -> list[Record]:
    """The peak of every method."""
    peaks = {}
    for method in METHODS:
        peaks[method] = peak_bytes(subject.trainer(method, subject.pipeline(), latents)) / 2**20
        print(f"{subject.name}, {method}: {peaks[method]:.0f} MiB", file=sys.stderr, flush=True)
    prefix = f"training/{subject.name}"
    records = [record(f"{prefix}/MiB/{method}", [peak], "", f"{subject.size} px, batch {subject.batch}", unit="MiB") for method, peak in peaks.items()]
    ratio = [peaks[OURS] / peaks[FULL]]
    return [*records, record(f"{prefix}/peak memory of {OURS} over {FULL}", ratio, "<= 0.5", f"{FULL} fine-tuning, tensors counted")]


def operations(name: str, unet: UNet2DConditionModel, spec: BaseSpec, side: int) -> list[Record]:
    """Ratios of floating-point operations, two a multiply-add, for a latent of that side. ``unet`` is copied to where tensors have no content.

    Attention's products have no weights: passed backward they cost the same however little of the UNet trains.
    """
    with torch.device("meta"):
        own = UNet2DConditionModel.from_config(unet.config)
        phi = FeatureUpsampler.for_base(spec, variant="C")
        text = torch.empty(1, 77, own.config.cross_attention_dim)

    def counted(run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], side: int, *, backward: bool) -> int:
        z, t = torch.empty(1, spec.latent_channels, side, side, device="meta"), torch.zeros(1, dtype=torch.long, device="meta")
        with sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(backward), FlopCounterMode(display=False) as counter:
            predicted = run(z, t)
            if backward:
                torch.autograd.backward(predicted.mean())
        return int(counter.get_total_flops())

    def plain(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return own(z, t, encoder_hidden_states=text, return_dict=False)[0]

    full = counted(plain, side, backward=True)
    sampling = 2 * SAMPLING * counted(plain, side // 2, backward=False)
    own.requires_grad_(False)
    ours = counted(lambda z, t: unet_with_pivot(own, z, t, text, pivot=z[..., ::2, ::2], upsampler=phi), side, backward=True)
    against = f"latent side {side}, counted on tensors without content"
    return [
        record(f"training/{name}/operations of {OURS} over {FULL}", [ours / full], "", against),
        record(f"training/{name}/operations of a step that samples its pivot over {OURS}", [(ours + sampling) / ours], "", against),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SUBJECTS, action="append")
    parser.add_argument("--part", choices=("seconds", "counts"), action="append", help="unset: both")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="of a method in a round")
    parser.add_argument("--note", default="", help="a sentence that is told with seconds, such as that the machine was busy")
    parser.add_argument("--out", type=Path, default=Path("training.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    parts = arguments.part or ("seconds", "counts")
    records: list[Record] = []
    for name in arguments.only or SUBJECTS:
        with TemporaryDirectory(prefix="selfcascade-") as folder, own_store(Path(folder, "store")) as store:
            subject = SUBJECTS[name](Path(folder))
            latents = stored_latents(subject, store)
            if "seconds" in parts:
                timed = measure(subject, store, latents, rounds=arguments.rounds, steps=arguments.steps)
                records += [replace(each, note=each.note or arguments.note) for each in timed]
            if "counts" in parts:
                pipeline = subject.pipeline()
                records += memory(subject, latents)
                records += operations(name, pipeline.unet, pipeline.spec, subject.size // pipeline.spec.pixels)
                if name == "sd21-quarter":  # and in full width
                    with torch.device("meta"):
                        unet = published_unet("sd-2.1-base")
                    records += operations("sd-2.1-base", unet, spec_of(unet, pipeline.vae), 128)
        write(arguments.out, records)
    print(table(records))


@contextmanager
def own_store(folder: Path) -> Iterator[Store]:
    """An embedded store that goes with the block, whatever the user's shell points at."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    try:
        with Store.open(StoreSettings(folder=folder, bucket="bench")) as store:
            yield store
    finally:
        embedded.stop(folder, now=True)


if __name__ == "__main__":
    main()
