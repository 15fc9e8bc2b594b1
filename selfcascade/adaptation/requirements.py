"""What an adaptation needs: pictures, a size, a precision, memory. Each refusal is one line with the way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from selfcascade.adaptation.buckets import bucket_sizes
from selfcascade.adaptation.optimizer import check_optimizer
from selfcascade.baselines.lora import check_peft
from selfcascade.bases import ResolvedBase, refuse_videos
from selfcascade.cascade.compilation import failed_to_compile
from selfcascade.cascade.families import BaseSpec, spec_of
from selfcascade.cascade.schedule import Size, stage_sizes
from selfcascade.config import AdaptationSettings
from selfcascade.curation.reading import read_table
from selfcascade.settings import SettingsError
from selfcascade.storage import Artifact


def check_dataset(settings: AdaptationSettings, dataset: Artifact) -> None:
    """Refuse a dataset that cannot be trained on.

    Raises:
        SettingsError: fewer pictures than a batch, smaller ones than the target, or none with a caption.
    """
    manifest = dataset.manifest()
    train, size = manifest.counts.get("train"), manifest.settings.get("size")
    if isinstance(train, int) and train < settings.batch:
        raise SettingsError(f"{dataset.ref} has {train} pictures in its train split but adaptation.batch={settings.batch}; lower it or curate more pictures")
    if isinstance(size, int) and size < settings.size:
        raise SettingsError(
            f"pictures of {dataset.ref} have {size} pixels a side, less than adaptation.size={settings.size}; "
            f"lower it, or curate at curation.size={settings.size} or more"
        )
    # A curation that asks for captions has them; only where it does not is the table worth reading.
    if manifest.settings.get("filters", {}).get("min_caption_chars", 0) == 0 and not any(_captions(dataset)):
        raise SettingsError(f"{dataset.ref} has no captions; adaptation needs them: put .txt files or metadata.jsonl beside the pictures and curate again")


def check_packages(settings: AdaptationSettings) -> None:
    """Refuse to train what needs a package that is not installed.

    Raises:
        SettingsError: names the package and how to get it.
    """
    if settings.trainable == "lora":
        check_peft()


def check_precision(settings: AdaptationSettings, device: torch.device) -> None:
    """Refuse a precision, of the networks or of the optimizer, in which the device cannot train.

    Raises:
        SettingsError: names the setting and what works.
    """
    dtype = settings.compute.dtype
    if dtype == "float16" and device.type != "cuda":
        raise SettingsError(
            "adaptation.compute.dtype=float16 has too small a range for gradients; use bfloat16 or float32, or a CUDA device, where the loss is scaled for it"
        )
    if dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise SettingsError(f"adaptation.compute.dtype=bfloat16 is not supported by {torch.cuda.get_device_name(device)}; use float16 or float32")
    check_optimizer(settings, device)


def stage_of(settings: AdaptationSettings, base: ResolvedBase) -> int:
    """Which stage of the cascade the target is, from 1. Reads configurations only.

    Raises:
        SettingsError: the base does not take that size, or its own is not smaller.
    """
    spec = _spec(base)
    step, native = 2 * spec.step, max(spec.native)
    if settings.size % step or settings.size <= native:
        raise SettingsError(
            f"adaptation.size={settings.size} must be a multiple of {step} and above {native}, the own size of base {base.name}; try {2 * native}"
        )
    return len(stage_sizes(settings.size, settings.size, native=spec.native, step=spec.step)) - 1


def buckets_of(settings: AdaptationSettings, base: ResolvedBase) -> tuple[Size, ...]:
    """Heights and widths of the buckets in pixels, of which halves can be pivots, all of the stage of the square; empty where the settings ask for none.

    Raises:
        SettingsError: the ratio lets in nothing but the square; names the smallest that does not, or there is none at this size.
    """
    if settings.buckets is None:
        return ()
    spec = _spec(base)
    stage = stage_of(settings, base)

    def within(ratio: float) -> tuple[Size, ...]:
        return tuple(
            size
            for size in bucket_sizes(settings.size, step=2 * spec.step, ratio=ratio)
            if size[0] * size[1] > spec.native[0] * spec.native[1] and len(stage_sizes(*size, native=spec.native, step=spec.step)) - 1 == stage
        )

    found = within(settings.buckets)
    if len(found) < 2:
        others = [max(size) / min(size) for size in within(settings.size) if size[0] != size[1]]
        remedy = f"raise it to {min(others):.4g} or above, or unset it" if others else "unset it"
        raise SettingsError(f"adaptation.buckets={settings.buckets:g} leaves the square alone at adaptation.size={settings.size} of base {base.name}; {remedy}")
    return found


def check_processes(settings: AdaptationSettings, device: torch.device) -> None:
    """Refuse more processes than there are devices for.

    Raises:
        SettingsError: names both numbers and the setting to change.
    """
    count = settings.processes
    if count == 1 or device.type == "cpu":
        return
    if device.type != "cuda" or device.index is not None:
        raise SettingsError(f"adaptation.processes={count} train on a device each, but execution.device={device} is one; set it to cuda or to cpu")
    found = torch.cuda.device_count()
    if count > found:
        raise SettingsError(f"adaptation.processes={count} train on a GPU each, but {found} are here; lower it to {found} or below")


@contextmanager
def enough_memory(settings: AdaptationSettings, *, remedy: str) -> Iterator[None]:
    """Turns what torch raises when memory ends into one line that ends with ``remedy``, and what it raises when nothing compiles into another."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError; on the CPU there is but the text
        if settings.compiled and failed_to_compile(error):
            reason = " ".join(str(error).partition("\n\n")[0].split())[:200]
            raise SettingsError(
                f"the UNet's blocks do not compile here: {reason}; install a C++ compiler (on a CPU), or set adaptation.compiled to false"
            ) from error
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(error):
            raise
        raise SettingsError(f"out of memory with adaptation.size={settings.size} and adaptation.batch={settings.batch}; {remedy}") from None


def _spec(base: ResolvedBase) -> BaseSpec:
    """Of a base whose configurations alone are read."""
    refuse_videos(base)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(base.location, subfolder="unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(base.location, subfolder="vae"))
    return spec_of(unet, vae)


def _captions(dataset: Artifact) -> Iterator[bool]:
    """Of every kept picture, whether it has a caption."""
    for row in read_table(dataset).select(["kept", "caption"]).to_pylist():
        yield bool(row["kept"] and (row["caption"] or "").strip())
