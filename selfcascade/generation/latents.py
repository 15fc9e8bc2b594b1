"""Clean latents of the base stage, kept in the store's cache: base, lanczos, tuning-free and tuned sample stage 0 of a chunk once between them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import diffusers
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from selfcascade.config import GenerationSettings
from selfcascade.generation.seeds import SampleSpec
from selfcascade.settings import digest_of
from selfcascade.storage import NotFound, Store

FORMAT = 1
"""Raised by hand whenever the code of the base stage would give other latents."""


def latents_key(specs: Sequence[SampleSpec], settings: GenerationSettings, *, base: str, dtype: torch.dtype, compiled: bool, device: torch.device) -> str:
    """Key in the store of the base latents of a chunk: a digest of everything that shapes their bytes.

    That is the base's version, each sample's prompt, negative prompt and seed in order, size, scheduler, steps, guidance and eta, precision, compilation,
    batch, memory tier and threads, and the versions and the kind of hardware whose kernels sum in an order of their own.
    """
    cascade = settings.cascade
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else device.type
    shaped_by = {
        "format": FORMAT,
        "base": base,
        "samples": [[spec.prompt, spec.negative_prompt, spec.seed] for spec in specs],
        "size": [cascade.height, cascade.width],
        "scheduler": cascade.scheduler,
        "steps": cascade.steps,
        "guidance_scale": cascade.guidance_scale,
        "eta": cascade.eta,
        "batch": settings.batch,
        "memory": settings.memory,
        "dtype": str(dtype),
        "compiled": compiled,
        "threads": torch.get_num_threads(),
        "device": [device.type, kind],
        "versions": [torch.__version__, diffusers.__version__, transformers.__version__],
    }
    return f"cache/base-latents/{digest_of(shaped_by)}.safetensors"


def cached_latents(store: Store, key: str, compute: Callable[[], Tensor]) -> Tensor:
    """The latents under ``key``, bit for bit as ``compute`` gives them: read where they are whole, else computed and left for the next method.

    Two processes that miss at once both compute and both write the same bytes.
    """
    found = _read(store, key)
    if found is None:
        found = compute().cpu().contiguous()
        store.put_cache(key, save({"latents": found, "sha256": _digest(found)}))
    return found


def _read(store: Store, key: str) -> Tensor | None:
    """What is cached under ``key``, if it is whole: a cache may be cut short or damaged, and is then made anew."""
    try:
        tensors = load(store.read(key))
    except (NotFound, SafetensorError):
        return None
    latents, digest = tensors.get("latents"), tensors.get("sha256")
    return latents if latents is not None and digest is not None and torch.equal(digest, _digest(latents)) else None


def _digest(latents: Tensor) -> Tensor:
    return torch.frombuffer(bytearray(hashlib.sha256(latents.numpy().tobytes()).digest()), dtype=torch.uint8)
