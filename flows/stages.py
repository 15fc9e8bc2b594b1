"""The stages of a run by name: the flow of each, and its arguments out of the settings of the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from selfcascade.config import PipelineSettings

Stage = Literal["run", "curate", "pretrain", "adapt", "generate", "evaluate"]
"""``run`` is all of them."""


def flow_of(stage: Stage, settings: PipelineSettings) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The flow of a stage and its arguments. Only the stage that is asked for is imported."""
    where = {"store": settings.store, "execution": settings.execution}
    match stage:
        case "curate":
            from selfcascade_flows.curate import curate

            return curate, {"settings": settings.curation, **where}
        case "pretrain":
            from selfcascade_flows.pretrain import pretrain

            return pretrain, {"settings": settings.pretraining, **where}
        case "adapt":
            from selfcascade_flows.adapt import adapt

            return adapt, {"settings": settings.adaptation, **where}
        case "generate":
            from selfcascade_flows.generate import generate
            from selfcascade_flows.variants import variant

            return generate, {"settings": variant(settings, settings.generation.method), **where}
        case "evaluate":
            from selfcascade_flows.evaluate import evaluate
            from selfcascade_flows.variants import variants

            samples = {label: f"samples/{sampling.name}" for label, sampling in variants(settings).items()}
            return evaluate, {"settings": settings.evaluation, "samples": samples, **where}
        case "run":
            from selfcascade_flows.pipeline import pipeline

            return pipeline, {"settings": settings}
