"""Inception-v3 from a file: the TorchScript one that clean-fid and EDM2 use, or torch-fidelity's state dict where torch-fidelity imports."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfcascade.config import FeatureSettings
from selfcascade.evaluation.networks.network import NetworkKind
from selfcascade.settings import SettingsError

SCRIPT = NetworkKind("Inception-v3 (TorchScript of 2015-12-05)", 2048, 299, "(x - 128) / 128", "Apache-2.0")
FIDELITY = NetworkKind("Inception-v3 (torch-fidelity)", 2048, 299, "rounded to bytes, then (x - 128) / 128", "Apache-2.0")

GET = "set evaluation.features.weights to the TorchScript file inception-2015-12-05.pt that clean-fid and EDM2 use"


def locate(settings: FeatureSettings) -> Path:
    """The file that is set, else torch-fidelity's.

    Raises:
        SettingsError: there is no such file, or none is set and torch-fidelity's is not here and may not be downloaded.
    """
    if settings.weights is None:
        return _fidelity_weights(download=settings.download)
    if not settings.weights.is_file():
        raise SettingsError(f"evaluation.features.weights: no file {settings.weights}; {GET}")
    return settings.weights


def kind_of(path: Path) -> NetworkKind:
    """Which of the two the file holds."""
    return SCRIPT if _is_script(path) else FIDELITY


def load(path: Path) -> nn.Module:
    """The body.

    Raises:
        SettingsError: the file is neither, or torch-fidelity does not import.
    """
    return _script(path) if _is_script(path) else _fidelity(path)


class _TorchScriptInception(nn.Module):
    """The layers of the TorchScript Inception-v3, without the resize and the scaling that the file would do by itself."""

    def __init__(self, script: Any) -> None:
        super().__init__()
        self.layers = script.layers

    def forward(self, pictures: Tensor) -> Tensor:
        features: Tensor = self.layers((pictures.contiguous() - 128) / 128)
        return features


class _FidelityInception(nn.Module):
    """torch-fidelity's Inception-v3, which scales bytes by itself."""

    def __init__(self, extractor: Any) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, pictures: Tensor) -> Tensor:
        # It takes bytes only; 299 px passes through its own bilinear resize unchanged.
        features: Tensor = self.extractor(pictures.round().to(torch.uint8))[0]
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


def _fidelity(path: Path) -> nn.Module:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError):
        raise SettingsError(
            f"evaluation.features.weights {path} is not a TorchScript file, and torch-fidelity, which reads a state dict, does not import; {GET}"
        ) from None
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity itself would run whatever a pickle holds
        return _FidelityInception(FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)))
    except Exception as error:  # torch.load and load_state_dict raise many kinds on a file that is something else
        reason = " ".join(str(error).split())[:120]
        raise SettingsError(f"evaluation.features.weights {path} is not Inception-v3 for torch-fidelity: {reason}; {GET}") from None


def _fidelity_weights(*, download: bool) -> Path:
    """Where torch-fidelity keeps its weights, in the cache of torch's hub."""
    missing = f"feature network inception-v3 needs weights; {GET}, or keep evaluation.features.network at efficientnet-lite0, which works offline"
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    except (ImportError, RuntimeError):
        raise SettingsError(missing) from None
    path = Path(torch.hub.get_dir(), "checkpoints", URL_INCEPTION_V3.rsplit("/", 1)[1])
    if not path.is_file():
        if not download:
            raise SettingsError(f"{missing}, or allow its download by evaluation.features.download=true")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix="6726825d", progress=False)
        except (OSError, RuntimeError) as error:
            raise SettingsError(f"{missing} (download of {URL_INCEPTION_V3} failed: {' '.join(str(error).split())[:120]})") from None
    return path
