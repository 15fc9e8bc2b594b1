"""I3D, the network of FVD and KVD: 400 logits of Kinetics-400 for a clip, from the TorchScript file that StyleGAN-V and most work since measure with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from selfcascade.config import ClipSettings
from selfcascade.evaluation.networks.network import NetworkKind
from selfcascade.settings import SettingsError

SCALING = "bilinear, not antialiased; 2 x / 255 - 1"
KIND = NetworkKind("I3D (Kinetics-400, TorchScript of StyleGAN-V)", 400, 224, SCALING, "Apache-2.0 (deepmind/kinetics-i3d)")
SHORTEST = 10
"""Frames that tools which measure with this file ask for: its last pooling takes two steps of time, an eighth of the frames."""

SOURCE = "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1"
"""Where StyleGAN-V takes it from; a file share, so it is never downloaded without the user's hand."""
GET = f"download i3d_torchscript.pt of StyleGAN-V from {SOURCE} and set evaluation.clips.weights to its path"


def locate(settings: ClipSettings) -> Path:
    """The file that is set.

    Raises:
        SettingsError: none is, or there is no such file; says what to download and where to put it.
    """
    if settings.weights is None:
        raise SettingsError(f"clips are measured by I3D, which needs weights; {GET}")
    if not settings.weights.is_file():
        raise SettingsError(f"evaluation.clips.weights: no file {settings.weights}; {GET}")
    return settings.weights


class ClipNetwork(nn.Module):
    """Clips in, features out."""

    def __init__(self, script: Any) -> None:
        super().__init__()
        self.script = script

    @staticmethod
    def resized(clip: Tensor) -> Tensor:
        """A clip, (T, 3, H, W) uint8, at the network's size: (3, T, 224, 224) float32 in 0..255, not rounded. It is the file's own resize, done early, so
        that clips of several sizes make a batch; to what has the size already the file does nothing.
        """
        return interpolate(clip.float(), size=(KIND.side, KIND.side), mode="bilinear", align_corners=False).transpose(0, 1)

    @torch.inference_mode()
    def forward(self, clips: Tensor) -> Tensor:
        """Features, (N, 400) float32, of clips as :meth:`resized` gives them, (N, 3, T, 224, 224).

        Raises:
            SettingsError: the file is another network's.
            ValueError: a feature is not finite.
        """
        try:
            features: Tensor = self.script(clips.contiguous(), rescale=True, resize=True, return_features=True)
        except RuntimeError as error:
            raise SettingsError(f"evaluation.clips.weights does not take clips as I3D does: {_short(error)}; {GET}") from None
        if features.shape != (len(clips), KIND.num_features):
            raise SettingsError(f"evaluation.clips.weights gave shape {tuple(features.shape)} for {len(clips)} clips, not ({len(clips)}, 400); {GET}")
        if not bool(torch.isfinite(features).all()):
            raise ValueError("the clip network gave a number that is not finite")
        return features.float()


def load(path: Path) -> ClipNetwork:
    """The network.

    Raises:
        SettingsError: the file is no TorchScript.
    """
    try:
        script = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise SettingsError(f"evaluation.clips.weights {path} is not a TorchScript file that loads: {_short(error)}; {GET}") from None
    return ClipNetwork(script)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
