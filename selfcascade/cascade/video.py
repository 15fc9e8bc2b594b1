"""Videos as what a picture's code can do frame by frame: frames out of a video and back, and what a call returns of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers.utils import BaseOutput
from torch import Tensor


@dataclass
class VideoOutput(BaseOutput):
    """Videos of a call."""

    frames: Any
    """Lists of PIL pictures, one list a video; numpy (B, F, H, W, 3) or torch (B, F, 3, H, W), [0, 1]; or clean scaled latents (B, C, F, h, w), fp32."""


def frames_of(tensor: Tensor) -> Tensor:
    """Frames of videos as a batch, (B, C, F, h, w) to (B F, C, h, w), video by video, as the UNet folds them; pictures, (B, C, h, w), as they are."""
    return tensor if tensor.ndim == 4 else tensor.transpose(1, 2).flatten(0, 1)


def stacked_as(like: Tensor, frames: Tensor) -> Tensor:
    """Frames, (B F, C, h, w), as the videos that ``like`` holds, (B, C, F, h, w): the inverse of :func:`frames_of`. Where it holds pictures, as they are."""
    return frames if like.ndim == 4 else frames.reshape(len(like), -1, *frames.shape[1:]).transpose(1, 2)
