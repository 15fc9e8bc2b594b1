"""What samples are made from besides prompts: base, upsampler, latent upscaler, tuned weights. Found, fixed at a version, and held against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from selfcascade.bases import HUB_ID, ResolvedBase, names_artifact, resolve_base
from selfcascade.config import BaselineSettings, CascadeSettings, GenerationSettings, Method
from selfcascade.settings import SettingsError
from selfcascade.storage import Kind, Store, resolve

if TYPE_CHECKING:
    from selfcascade.baselines.finetune import Way
    from selfcascade.cascade.families import BaseSpec

_STAGES = ("start", "upscale", "t_min", "strength", "later_steps", "guidance_interval", "pivot_every")
_UNUSED: Mapping[Method, tuple[str, ...]] = MappingProxyType(
    {
        "base": _STAGES,
        "lanczos": _STAGES,
        "latent-sr": _STAGES,
        "x4-upscaler": _STAGES,
        "direct": _STAGES,
        "attention-scaling": (*_STAGES, "eta"),
        "scalecrafter": (*_STAGES, "eta"),
        "hidiffusion": (*_STAGES, "eta"),
        "lora": (*_STAGES, "eta"),
        "full": (*_STAGES, "eta"),
        "tuning-free": ("t_min", "strength", "pivot_every"),
        "tuned": (),
    }
)
"""Settings of the cascade that a method does not look at."""
_INSIDE_BLOCKS: frozenset[Method] = frozenset({"attention-scaling", "scalecrafter", "hidiffusion"})
"""Methods that change the UNet inside the blocks that ``compiled`` compiles: they sample with one that is not."""
_USED: Mapping[Method, tuple[str, ...]] = MappingProxyType(
    {
        "x4-upscaler": ("x4",),
        "attention-scaling": ("eta",),
        "scalecrafter": ("eta", "scalecrafter"),
        "hidiffusion": ("eta",),
        "lora": ("eta",),
        "full": ("eta",),
    }
)
"""Settings of the baselines that a method looks at. Of these methods each applies to some bases and sizes only."""


@dataclass(frozen=True)
class Networks:
    """The networks of a run as a worker finds them again, at a fixed version where they are artifacts."""

    base: str
    upsampler: str | None
    upscaler: str | None
    finetuned: str | None
    versions: dict[str, str]
    """Of each, and of an x4 upscaler, by its role."""
    resolved: ResolvedBase


def relevant(settings: GenerationSettings) -> GenerationSettings:
    """Settings in which whatever the method does not look at has its default, so that a sweep over ``start`` does not sample the base again."""
    defaults = CascadeSettings()
    unused = {name: getattr(defaults, name) for name in _UNUSED[settings.method]}
    used = {name: getattr(settings.baselines, name) for name in _USED.get(settings.method, ())}
    changes = {"cascade": settings.cascade.model_copy(update=unused), "baselines": BaselineSettings().model_copy(update=used)}
    return settings.model_copy(update=changes | {"compiled": settings.compiled and settings.method not in _INSIDE_BLOCKS})


def needs_upscaler(settings: GenerationSettings) -> bool:
    """Whether the latent upscaler has a part in these samples."""
    return settings.method == "latent-sr" or (settings.method in ("tuning-free", "tuned") and settings.cascade.upscale == "learned")


def find_networks(settings: GenerationSettings, store: Store) -> Networks:
    """What ``settings`` name. Writes nothing, loads no weights but those of upsampler and latent upscaler.

    Raises:
        SettingsError: one is missing.
    """
    base, base_reference = _find_base(settings, store)
    versions = {"base": str(base)}
    upsampler = upscaler = finetuned = None
    if settings.method == "tuned":
        upsampler, versions["upsampler"] = _find_upsampler(settings, store)
    if needs_upscaler(settings):
        upscaler, versions["upscaler"] = _find_upscaler(settings, store)
    if settings.method in ("lora", "full"):
        finetuned, role, version = _find_finetuned(settings, store)
        versions[role] = version
    if settings.method == "x4-upscaler":
        from selfcascade.baselines.upscaler_x4 import resolve_upscaler

        versions["x4"] = resolve_upscaler(settings.baselines.x4.model, store).version
    return Networks(base_reference, upsampler, upscaler, finetuned, versions, base)


def check_networks(settings: GenerationSettings, store: Store, networks: Networks) -> None:
    """Refuse before the first unit what the first unit would refuse.

    Raises:
        SettingsError: an upsampler or LoRA of another base, or a size or method that the base cannot do.
    """
    from selfcascade.cascade.latent_upscaler import load_latent_upscaler
    from selfcascade.cascade.schedule import stage_sizes
    from selfcascade.cascade.upsampler import load_upsampler
    from selfcascade.generation.models import outline

    base = networks.resolved
    spec, known_as = outline(base)
    sizes = stage_sizes(settings.cascade.height, settings.cascade.width, native=spec.native, step=spec.step)
    _check_method(settings, base, spec)
    if networks.upsampler is not None:
        phi = load_upsampler(networks.upsampler, store)
        phi.check_fits(spec, known_as)
        phi.check_stages(len(sizes) - 1)
    if networks.upscaler is not None:
        load_latent_upscaler(networks.upscaler, store).check_fits(spec, known_as)
    if networks.finetuned is not None:
        from selfcascade.baselines.finetune import find_finetune

        find_finetune(networks.finetuned, way_of(settings), store).check_base(known_as)


def check_method(settings: GenerationSettings, store: Store) -> None:
    """Refuse, before anything is made for it, a method that does not apply to the base or the size. Reads the base's configuration alone.

    Raises:
        SettingsError: names method, base and reason; or there is no such base.
    """
    from selfcascade.generation.models import outline

    if settings.method in _USED:
        base, _ = _find_base(settings, store)
        _check_method(settings, base, outline(base)[0])


def _check_method(settings: GenerationSettings, base: ResolvedBase, spec: BaseSpec) -> None:
    from selfcascade.baselines.registry import BASELINES

    reason = BASELINES[settings.method].refusal(spec, settings.cascade.height, settings.cascade.width, settings.baselines) if settings.method in _USED else None
    if reason is not None:
        raise SettingsError(f"method {settings.method!r} does not apply to base {base.name!r}: {reason}")


def _find_base(settings: GenerationSettings, store: Store) -> tuple[ResolvedBase, str]:
    if names_artifact(settings.base, "bases"):
        ref = resolve(store, settings.base, "bases").ref
        reference = f"bases/{ref.name}@{ref.version}"
        return resolve_base(reference, store), reference
    return resolve_base(settings.base, store), settings.base


def _find_upsampler(settings: GenerationSettings, store: Store) -> tuple[str, str]:
    """Reference and version of the upsampler."""
    if settings.upsampler is None:
        raise SettingsError("method 'tuned' needs an upsampler; set generation.upsampler (upsamplers/NAME, a folder or a hub id), or use method 'tuning-free'")
    from selfcascade.generation.models import upsampler_version

    reference = _fixed(settings.upsampler, "upsamplers", "upsampler", store)
    return reference, upsampler_version(reference, store)


def _find_upscaler(settings: GenerationSettings, store: Store) -> tuple[str, str]:
    """Reference and version of the latent upscaler."""
    if settings.upscaler is None:
        needs, other = ("method 'latent-sr'", "method 'lanczos'") if settings.method == "latent-sr" else ("cascade.upscale 'learned'", "'bilinear'")
        raise SettingsError(f"{needs} needs a latent upscaler; set generation.upscaler (upscalers/NAME, a folder or a hub id), or use {other}")
    from selfcascade.generation.models import upscaler_version

    reference = _fixed(settings.upscaler, "upscalers", "latent upscaler", store)
    return reference, upscaler_version(reference, store)


def _find_finetuned(settings: GenerationSettings, store: Store) -> tuple[str, str, str]:
    """Reference of the LoRA or the fine-tuned UNet, what the inputs call it, and its version."""
    from selfcascade.baselines.finetune import KINDS, NAMES
    from selfcascade.generation.models import ROLES, finetuned_version

    way = way_of(settings)
    if settings.finetuned is None:
        raise SettingsError(
            f"method {way!r} needs a {NAMES[way]}; train one by `selfcascade adapt --set adaptation.trainable={way}` and set generation.finetuned "
            f"({KINDS[way]}/NAME or a folder)"
        )
    reference = settings.finetuned
    if names_artifact(reference, KINDS[way]):
        ref = resolve(store, reference, KINDS[way]).ref
        reference = f"{KINDS[way]}/{ref.name}@{ref.version}"
    return reference, ROLES[way], finetuned_version(way, reference, store)


def way_of(settings: GenerationSettings) -> Way:
    """What was tuned of the base that the method samples."""
    return "full" if settings.method == "full" else "lora"


def _fixed(reference: str, kind: Kind, what: str, store: Store) -> str:
    """A reference as a worker finds it again: an artifact at its whole version, a folder or hub id as it is."""
    if names_artifact(reference, kind):
        ref = resolve(store, reference, kind).ref
        return f"{kind}/{ref.name}@{ref.version}"
    if not (Path(reference).is_dir() or HUB_ID.fullmatch(reference)):
        raise SettingsError(f"{what} {reference!r} is neither an artifact ({kind}/NAME), nor a folder, nor a hub id (owner/name)")
    return reference
