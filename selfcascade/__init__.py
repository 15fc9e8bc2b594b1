"""Self-Cascade diffusion: small frozen models, big pictures."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfcascade.cascade.pipeline import SelfCascadePipeline
    from selfcascade.cascade.upsampler import load_upsampler
    from selfcascade.curation.streaming import StreamedDataset, open_dataset

__all__ = ["SelfCascadePipeline", "StreamedDataset", "load_upsampler", "open_dataset"]

_PLACES = {
    "SelfCascadePipeline": "selfcascade.cascade.pipeline",
    "StreamedDataset": "selfcascade.curation.streaming",
    "load_upsampler": "selfcascade.cascade.upsampler",
    "open_dataset": "selfcascade.curation.streaming",
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:  # torch and diffusers take seconds to import; the command line's --help needs neither
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'selfcascade' has no attribute {name!r}")
