"""Self-Cascade diffusion: small frozen models, big pictures."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfcascade.cascade.pipeline import SelfCascadePipeline
    from selfcascade.curation.streaming import StreamedDataset

__all__ = ["SelfCascadePipeline", "StreamedDataset"]


def __getattr__(name: str) -> Any:
    if name == "SelfCascadePipeline":  # torch and diffusers take seconds to import; the command line's --help needs neither
        from selfcascade.cascade.pipeline import SelfCascadePipeline

        return SelfCascadePipeline
    if name == "StreamedDataset":
        from selfcascade.curation.streaming import StreamedDataset

        return StreamedDataset
    raise AttributeError(f"module 'selfcascade' has no attribute {name!r}")
