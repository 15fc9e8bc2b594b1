"""HiDiffusion (arXiv 2311.17528) as its authors' package: the installed peer, extra ``peers``, not an implementation of ours."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput

from selfcascade.baselines import direct
from selfcascade.baselines.baseline import Baseline
from selfcascade.baselines.hooks import refuse_compiled
from selfcascade.cascade.families import BaseSpec, spec_of
from selfcascade.cascade.pipeline import SelfCascadePipeline
from selfcascade.config import BaselineSettings
from selfcascade.settings import SettingsError

KNOWN_AS: Mapping[str, str] = MappingProxyType({"sd": "stabilityai/stable-diffusion-2-1-base", "sdxl": "stabilityai/stable-diffusion-xl-base-1.0"})
"""The name by which the package knows the topology of a family. It does not know others."""
MOVED: Mapping[str, str] = MappingProxyType(
    {"diffusers.pipelines.controlnet.multicontrolnet": "diffusers.models.controlnets.multicontrolnet"}  # by diffusers 0.33; the package imports the old name
)
WINDOW_SEED = 0
"""The package shifts its attention windows by torch's default generator; under this seed samples with generators of their own are reproducible."""


@contextmanager
def hidiffused(pipeline: DiffusionPipeline) -> Iterator[None]:
    """HiDiffusion in every call of this pipeline inside the ``with`` block; the UNet is afterwards as it was, to the last attribute.

    Unlike our own baselines the package changes the UNet's modules themselves and counts the calls: no other thread may use the UNet meanwhile, every call
    must run to its end, and blocks do not nest.

    Args:
        pipeline: stock or cascade, of SD 1.5, SD 2.1 or SDXL.

    Raises:
        SettingsError: the package is not there or does not load, or does not know the base; or the UNet is compiled.
    """
    unet, family = pipeline.unet, spec_of(pipeline.unet).family.name
    if family not in KNOWN_AS:
        raise SettingsError(f"hidiffusion does not apply: {_unknown(family)}")
    refuse_compiled(unet)
    package = _package()
    before = {module: (type(module), set(vars(module))) for module in unet.modules()}
    upsamplers = unet.num_upsamplers
    try:
        package.apply_hidiffusion(_face(pipeline, KNOWN_AS[family]))
        yield
    finally:
        package.remove_hidiffusion(unet)
        unet.num_upsamplers = upsamplers
        for module, (kind, names) in before.items():
            module.__class__ = kind
            for name in set(vars(module)) - names:
                delattr(module, name)


def sample(
    pipeline: SelfCascadePipeline,
    prompt: str | list[str] | None = None,
    *,
    height: int,
    width: int,
    settings: BaselineSettings = BaselineSettings(),
    **call: Any,
) -> ImagePipelineOutput:
    """Pictures of that size in a single stage under HiDiffusion, arguments as in :mod:`~.baseline`.

    With a ``generator`` the windows' shifts are the same in every call.

    Raises:
        SettingsError: as :func:`hidiffused`, or as the pipeline's call.
    """
    with hidiffused(pipeline), nullcontext() if call.get("generator") is None else torch.random.fork_rng(devices=[]):
        if call.get("generator") is not None:
            torch.manual_seed(WINDOW_SEED)
        return direct.sample(pipeline, prompt, height=height, width=width, **{"eta": settings.eta} | call)


def refusal(spec: BaseSpec, height: int, width: int, settings: BaselineSettings) -> str | None:
    """Why the package cannot be used on a base, or None."""
    if spec.family.name not in KNOWN_AS:
        return _unknown(spec.family.name)
    try:
        _package()
    except SettingsError as error:
        return str(error)
    return None


def _unknown(family: str) -> str:
    return f"not applicable to a base of family {family!r}; the package knows SD 1.5, SD 2.1 and SDXL only"


def _package() -> Any:
    if importlib.util.find_spec("hidiffusion") is None:
        raise SettingsError("the package hidiffusion is not installed; pip install 'selfcascade[peers]'")
    lent = {old: importlib.import_module(new) for old, new in MOVED.items() if old not in sys.modules}
    sys.modules.update(lent)
    try:
        return importlib.import_module("hidiffusion")
    except (ImportError, AttributeError) as error:
        raise SettingsError(f"the package hidiffusion does not load beside the installed diffusers: {' '.join(str(error).split())}") from None
    finally:
        for name in lent:
            sys.modules.pop(name, None)


def _face(pipeline: DiffusionPipeline, name: str) -> Any:
    """What the package wants to see of a pipeline. It knows a pipeline by the name of its class, and a base by the name it was loaded from."""
    steps = property(lambda _: pipeline._num_timesteps)
    return type("DiffusionPipeline", (), {"unet": pipeline.unet, "name_or_path": name, "_num_timesteps": steps})()


HIDIFFUSION = Baseline("hidiffusion", "the target size from noise by the peer package HiDiffusion", refusal, sample)
