"""The common face of what the cascade is compared with.

Every baseline samples by ``sample(pipeline, prompt=None, *, height, width, settings, **call)``, and says beside its own code only what it adds:

* ``pipeline``: a ``SelfCascadePipeline`` that holds the base; it stays as it is.
* ``prompt``: one or a list, as the pipeline takes it.
* ``height``, ``width``: of the pictures, in pixels.
* ``settings``: of all baselines. Those that sample the target in a single stage take eta from there unless ``call`` has one.
* ``call``: whatever else the pipeline's call takes, its ``output_type`` and ``return_dict`` included.

The pictures are an ``ImagePipelineOutput``, or a tuple, as from the pipeline's call. What that raises a baseline raises too, and a ``SettingsError`` where it
does not apply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from diffusers import ImagePipelineOutput

from selfcascade.cascade.families import BaseSpec
from selfcascade.config import BaselineSettings


@dataclass(frozen=True)
class Baseline:
    """One way to a picture of the target size that is not the cascade. A new one is a new file with a constant of this type, and a line in the registry."""

    name: str
    """As in ``generation.method`` and in every table."""
    summary: str
    """What it does, in half a sentence."""
    refusal: Callable[[BaseSpec, int, int, BaselineSettings], str | None]
    """Takes a base, height and width in pixels, and settings; returns why the baseline does not apply there, or None where it does."""
    sample: Callable[..., ImagePipelineOutput]
    """The pictures; this module's docstring says what it takes and returns."""


def applies(spec: BaseSpec, height: int, width: int, settings: BaselineSettings) -> None:
    """The ``refusal`` of a baseline that knows every base and size."""
    return None


def pixel_ratio(spec: BaseSpec, height: int, width: int) -> float:
    """Pixels of a picture of that size over pixels of the base's own: 4 for the paper's 4x."""
    return height * width / (spec.native[0] * spec.native[1])
