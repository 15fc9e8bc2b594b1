"""Inception-v3 from a file: the TorchScript one that clean-fid and EDM2 use, or the state dict of torch-fidelity and pytorch-fid."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfcascade.config import FeatureSettings
from selfcascade.evaluation.networks.inception_layers import InceptionV3
from selfcascade.evaluation.networks.network import NetworkKind
from selfcascade.settings import SettingsError

SCRIPT = NetworkKind("Inception-v3 (TorchScript of 2015-12-05)", 2048, 299, "(x - 128) / 128", "Apache-2.0", 1008)
STATE = NetworkKind("Inception-v3 (state dict of 2015-12-05)", 2048, 299, "(x - 128) / 128", "Apache-2.0", 1008)

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
"""torch-fidelity's state dict; the name's end is the beginning of its SHA-256."""
GET = "set evaluation.features.weights to the TorchScript file inception-2015-12-05.pt that clean-fid and EDM2 use, or to torch-fidelity's .pth"


def locate(settings: FeatureSettings) -> Path:
    """The file that is set, else torch-fidelity's in the cache of torch's hub.

    Raises:
        SettingsError: there is no such file, or none is set and torch-fidelity's is not here and may not be downloaded.
    """
    if settings.weights is None:
        return _cached(download=settings.download)
    if not settings.weights.is_file():
        raise SettingsError(f"evaluation.features.weights: no file {settings.weights}; {GET}")
    return settings.weights


def kind_of(path: Path) -> NetworkKind:
    """Which of the two the file holds."""
    return SCRIPT if _is_script(path) else STATE


def load(path: Path) -> nn.Module:
    """The body.

    Raises:
        SettingsError: the file is neither.
    """
    return _script(path) if _is_script(path) else _state(path)


class _TorchScriptInception(nn.Module):
    """The layers of the TorchScript Inception-v3, without the resize and the scaling that the file would do by itself."""

    def __init__(self, script: Any) -> None:
        super().__init__()
        self.layers = script.layers
        self.head: Tensor | None = script.output.weight.detach() if hasattr(script, "output") else None

    def forward(self, pictures: Tensor) -> Tensor:
        features: Tensor = self.layers((pictures.contiguous() - 128) / 128)
        return features


def _script(path: Path) -> nn.Module:
    try:
        script = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:120]
        raise SettingsError(f"evaluation.features.weights {path} is not a TorchScript file that loads: {reason}; {GET}") from None
    if not hasattr(script, "layers"):
        raise SettingsError(f"evaluation.features.weights {path} is TorchScript but has no 'layers'; {GET}")
    return _TorchScriptInception(script)


def _is_script(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _state(path: Path) -> nn.Module:
    try:
        return InceptionV3.of(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load and load_state_dict raise many kinds on a file that is something else
        reason = " ".join(str(error).split())[:120]
        raise SettingsError(f"evaluation.features.weights {path} is no state dict of Inception-v3: {reason}; {GET}") from None


def _cached(*, download: bool) -> Path:
    path = Path(torch.hub.get_dir(), "checkpoints", URL.rsplit("/", 1)[1])
    if path.is_file():
        return path
    missing = f"feature network inception-v3 needs weights; {GET}, or keep evaluation.features.network at efficientnet-lite0, which works offline"
    if not download:
        raise SettingsError(f"{missing}, or allow its download by evaluation.features.download=true")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(URL, str(path), hash_prefix="6726825d", progress=False)
    except (OSError, RuntimeError) as error:
        raise SettingsError(f"{missing} (download of {URL} failed: {' '.join(str(error).split())[:120]})") from None
    return path
