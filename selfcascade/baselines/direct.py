"""Direct inference: the base asked for the target size at once, from pure noise (the first row of the paper's tables)."""

from __future__ import annotations

from typing import Any

from diffusers import ImagePipelineOutput

from selfcascade.baselines.baseline import Baseline, applies
from selfcascade.cascade.pipeline import SelfCascadePipeline
from selfcascade.config import BaselineSettings


def sample(
    pipeline: SelfCascadePipeline, prompt: str | list[str] | None = None, *, height: int, width: int, settings: BaselineSettings | None = None, **call: Any
) -> ImagePipelineOutput:
    """Pictures of that size in a single stage, arguments as in :mod:`~.baseline`. The pipeline's upsampler, if any, has nothing to guide here.

    ``settings`` are not looked at: ``eta`` is that of ``call``. It matters here: ScaleCrafter and others sample this row with 1, the cascade with 0.
    """
    return pipeline(prompt, sizes=[(height, width)], **call)


DIRECT = Baseline("direct", "the target size from noise", applies, sample)
