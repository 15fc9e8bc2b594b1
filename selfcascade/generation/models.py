"""The networks of a run: loaded once a process, in the precision and memory layout that samples fastest."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar, cast

import safetensors.torch
import torch
from diffusers import AutoencoderKL, StableDiffusionUpscalePipeline, UNet2DConditionModel

from selfcascade.baselines import full, lora
from selfcascade.baselines.finetune import KINDS, NAMES, Way, find_finetune
from selfcascade.baselines.upscaler_x4 import load_upscaler, resolve_upscaler
from selfcascade.bases import ResolvedBase, names_artifact, refuse_videos, resolve_base
from selfcascade.cascade.compilation import compile_blocks
from selfcascade.cascade.families import BaseSpec, spec_of
from selfcascade.cascade.latent_upscaler import LatentUpscaler, load_latent_upscaler
from selfcascade.cascade.memory import TIERS
from selfcascade.cascade.pipeline import SelfCascadePipeline
from selfcascade.cascade.solver import solver_on
from selfcascade.cascade.upsampler import FeatureUpsampler, load_upsampler
from selfcascade.cascade.upsampler_set import UpsamplerSet
from selfcascade.config import Dtype, Memory, Scheduler
from selfcascade.settings import SettingsError, digest_of
from selfcascade.storage import Store

Value = TypeVar("Value")
ROLES: Mapping[Way, str] = MappingProxyType({"lora": "adapter", "full": "unet"})
"""What a plan's inputs call a LoRA and a fine-tuned UNet."""

_held: dict[str, tuple[Any, Any]] = {}
_lock = threading.RLock()


class OutOfMemory(SettingsError):
    """The networks, or a batch, do not fit the device."""


def is_memory(error: BaseException) -> bool:
    """Whether an error is want of memory: CUDA has an error of its own for it, the CPU's allocator says it in words."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error) or "out of memory" in str(error).lower()


def load_pipeline(
    base: str,
    upsampler: str | None = None,
    store: Store | None = None,
    *,
    upscaler: str | None = None,
    finetuned: tuple[Way, str] | None = None,
    versions: Mapping[str, str] = MappingProxyType({}),
    scheduler: Scheduler = "ddim",
    dtype: Dtype = "float32",
    compiled: bool = False,
    device: str = "auto",
) -> SelfCascadePipeline:
    """A cascade of a base, ready to sample by DDIM, the paper's sampler, whichever the base ships, or by another solver.

    Its networks stay in memory for the next call. Pipelines of one base share its networks, whatever guides or enlarges. The autoencoder and a latent
    upscaler are in fp32 whatever ``dtype`` is.

    Args:
        base: as :func:`selfcascade.bases.resolve_base` takes it.
        upsampler: artifact (with its version), folder or hub id of a feature upsampler.
        store: where artifacts are looked up.
        upscaler: artifact (with its version), folder or hub id of a latent upscaler.
        finetuned: "lora" or "full", and artifact (with its version) or folder of a LoRA or a fine-tuned UNet, which then takes the place of the base's UNet. A
            LoRA shares the base's weights.
        versions: what "base", "upsampler", "upscaler", "adapter" and "unet" must be, as a plan's inputs name them; any, where one is left out.
        scheduler: solver of every stage, on the base's own noise schedule.
        dtype: of UNet, text encoders and upsampler.
        compiled: whether the blocks of the UNet that samples are compiled, see :func:`~selfcascade.cascade.compilation.compile_blocks`.
        device: torch device, or "auto".

    Raises:
        OutOfMemory: the networks do not fit the device.
        SettingsError: base or what is added to it does not load, or they do not belong together, or are not of that version; or the device does not exist.
    """
    where, precision = resolve_device(device), getattr(torch, dtype)
    base_version, version = versions.get("base"), versions.get("upsampler")
    tuned_key = None if finetuned is None else (*finetuned, versions.get(ROLES[finetuned[0]]), base, versions.get("base"), dtype, compiled, str(where))
    with _lock:
        if _held.get("finetuned", (None, None))[0] != tuned_key:
            _held.pop("finetuned", None)  # it shares weights with its base, or is as large as one: it makes room before another base is loaded
        pipeline = _once("base", (base, base_version, dtype, compiled, str(where)), lambda: _load_base(base, store, base_version, precision, where))
        added: dict[str, Any] = {} if scheduler == "ddim" else {"scheduler": solver_on(pipeline.scheduler, scheduler)}
        if upsampler is not None:
            key = (upsampler, version, dtype, str(where))
            added["upsampler"] = _once("upsampler", key, lambda: _load_upsampler(upsampler, store, version, precision, where))
        if upscaler is not None:
            planned = versions.get("upscaler")
            added["latent_upscaler"] = _once("upscaler", (upscaler, planned, str(where)), lambda: _load_upscaler(upscaler, store, planned, where))
        if finetuned is not None:
            added["unet"] = _once("finetuned", tuned_key, lambda: _load_finetuned(pipeline, *finetuned, store, versions, where))
        if compiled:
            compile_blocks(added.get("unet", pipeline.unet))
        return _quiet(SelfCascadePipeline.from_pipe(pipeline, **added)) if added else pipeline


def load_x4(model: str, *, version: str | None = None, dtype: Dtype = "float32", device: str = "auto") -> StableDiffusionUpscalePipeline:
    """The x4 upscaler, its autoencoder in fp32. It stays in memory for the next call.

    Args:
        model: folder or hub id.
        version: what it must be, as a plan's inputs name it; any, where unset.
        dtype: of its UNet and text encoder.
        device: torch device, or "auto".

    Raises:
        OutOfMemory: it does not fit the device.
        SettingsError: it does not load, or is not of that version.
    """
    where, precision = resolve_device(device), getattr(torch, dtype)
    with _lock:
        found, upscaler = _once("x4", (model, dtype, str(where)), lambda: _load_x4(model, precision, where))
    if version is not None and found.version != version:
        raise SettingsError(f"x4 upscaler {model!r} is now at version {found.version[:12]} but was planned as {version[:12]}; run again")
    return upscaler


def release(pipeline: SelfCascadePipeline, memory: Memory) -> None:
    """Make room for a tier: give cached blocks back to the device, and for tier "offload" leave on it only the network whose turn it is."""
    device = pipeline._execution_device
    if TIERS[memory].offload and device.type != "cpu" and not getattr(pipeline, "_all_hooks", []):
        pipeline.to("cpu")
        pipeline.enable_model_cpu_offload(device=device)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def outline(base: ResolvedBase) -> tuple[BaseSpec, str]:
    """What the cascade knows of a base, and the ``name@version`` that upsamplers know it by, from its configuration alone: no weight is read."""
    refuse_videos(base)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(base.location, subfolder="unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(base.location, subfolder="vae"))
    # A saved cascade remembers the base that it was made from.
    return spec_of(unet, vae), SelfCascadePipeline.load_config(base.location).get("base") or str(base)


def upsampler_version(reference: str, store: Store | None = None) -> str:
    """The version of an upsampler: ``name@version`` of an artifact whose reference says so in full, else the SHA-256 of configuration and weights."""
    return _version(reference, "upsamplers", lambda: load_upsampler(reference, store))


def upscaler_version(reference: str, store: Store | None = None) -> str:
    """The version of a latent upscaler, as :func:`upsampler_version` has it."""
    return _version(reference, "upscalers", lambda: load_latent_upscaler(reference, store))


def finetuned_version(way: Way, reference: str, store: Store | None = None) -> str:
    """The version of a LoRA or a fine-tuned UNet, as :func:`upsampler_version` has it."""
    if names_artifact(reference, KINDS[way]):
        return reference.removeprefix(f"{KINDS[way]}/")
    return find_finetune(reference, way, store).version


def _version(reference: str, kind: str, load: Callable[[], Any]) -> str:
    if names_artifact(reference, kind):
        return reference.removeprefix(f"{kind}/")
    network = load()
    config = {name: value for name, value in network.config.items() if not name.startswith("_")}
    weights = hashlib.sha256(safetensors.torch.save({name: tensor.contiguous() for name, tensor in sorted(network.state_dict().items())}))
    return digest_of({"config": json.loads(json.dumps(config)), "weights": weights.hexdigest()})


def resolve_device(name: str) -> torch.device:
    """The torch device of a setting; "auto" is CUDA, then Apple's MPS, then the CPU.

    Raises:
        SettingsError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a CPU build asserts that CUDA was compiled in
        raise SettingsError(f"execution.device {name!r} cannot be used here: {str(error).splitlines()[0]}; use auto or cpu") from None
    return device


def _load_base(base: str, store: Store | None, version: str | None, dtype: torch.dtype, device: torch.device) -> SelfCascadePipeline:
    found = resolve_base(base, store)
    refuse_videos(found)
    if version is not None and str(found) != version:
        raise SettingsError(f"base {found.name!r} is now at version {found.version[:12]} but was planned as {version[:80]}; run again")
    try:
        pipeline = SelfCascadePipeline.from_pretrained(base, store=store, torch_dtype=dtype).to(device)
    except (RuntimeError, MemoryError) as error:
        if not is_memory(error):
            raise
        raise OutOfMemory(
            f"out of memory while loading base {found.name!r} on {device}; set generation.compute.dtype to bfloat16 or lower execution.workers"
        ) from error
    pipeline.register_modules(upsampler=None, latent_upscaler=None)  # a saved cascade may bring them along; which ones work is a setting
    # Ancestral or multistep samplers know no eta; a base that ships one is sampled by DDIM on the same noise schedule.
    pipeline.scheduler = solver_on(pipeline.scheduler, "ddim")
    for network in pipeline.components.values():
        if isinstance(network, torch.nn.Module):
            network.eval().requires_grad_(False)
    # Measured: the autoencoder is twice as fast in channels-last, the UNet a tenth in fp32; in bf16 on a CPU its group norm is then five times slower.
    pipeline.vae.to(memory_format=torch.channels_last)
    if _last(device, dtype):
        pipeline.unet.to(memory_format=torch.channels_last)
    return _quiet(pipeline)


def _last(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a UNet samples fastest in channels-last."""
    return device.type != "cpu" or dtype == torch.float32


def _load_x4(model: str, dtype: torch.dtype, device: torch.device) -> tuple[ResolvedBase, StableDiffusionUpscalePipeline]:
    found = resolve_upscaler(model)
    try:
        upscaler = load_upscaler(found, dtype).to(device)
    except (RuntimeError, MemoryError) as error:
        if not is_memory(error):
            raise
        raise OutOfMemory(f"out of memory while loading x4 upscaler {model!r} on {device}; set generation.compute.dtype to bfloat16") from error
    upscaler.set_progress_bar_config(disable=True)
    return found, upscaler


def _load_upsampler(reference: str, store: Store | None, version: str | None, dtype: torch.dtype, device: torch.device) -> FeatureUpsampler | UpsamplerSet:
    if version is not None and upsampler_version(reference, store) != version:
        raise SettingsError(f"upsampler {reference!r} has changed since it was planned as {version[:80]}; run again")
    upsampler: FeatureUpsampler | UpsamplerSet = load_upsampler(reference, store, dtype=dtype).to(device)
    upsampler.requires_grad_(False)
    return upsampler


def _load_upscaler(reference: str, store: Store | None, version: str | None, device: torch.device) -> LatentUpscaler:
    if version is not None and upscaler_version(reference, store) != version:
        raise SettingsError(f"latent upscaler {reference!r} has changed since it was planned as {version[:80]}; run again")
    upscaler: LatentUpscaler = load_latent_upscaler(reference, store).to(device)
    upscaler.requires_grad_(False)
    return upscaler


def _load_finetuned(
    pipeline: SelfCascadePipeline, way: Way, reference: str, store: Store | None, versions: Mapping[str, str], device: torch.device
) -> UNet2DConditionModel:
    planned = versions.get(ROLES[way])
    if planned is not None and finetuned_version(way, reference, store) != planned:
        raise SettingsError(f"{NAMES[way]} {reference!r} has changed since it was planned as {planned[:80]}; run again")
    found = find_finetune(reference, way, store)
    found.check_base(pipeline.config.base)
    try:
        unet: UNet2DConditionModel = (lora if way == "lora" else full).adapted(pipeline.unet, found)
        unet = unet.to(device)
    except (RuntimeError, MemoryError) as error:
        if not is_memory(error):
            raise
        raise OutOfMemory(f"out of memory while loading {NAMES[way]} {reference!r} on {device}; set generation.compute.dtype to bfloat16") from error
    return unet.to(memory_format=torch.channels_last) if way == "full" and _last(device, unet.dtype) else unet


def _quiet(pipeline: SelfCascadePipeline) -> SelfCascadePipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _once(slot: str, key: Any, make: Callable[[], Value]) -> Value:
    """The value of ``key``, made unless the slot holds it; what the slot held before is let go first, so that two bases are never in memory at once."""
    if _held.get(slot, (None, None))[0] != key:
        _held.pop(slot, None)
        _held[slot] = (key, make())
    return cast(Value, _held[slot][1])
