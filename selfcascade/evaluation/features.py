"""The feature networks that metrics share, by the name that the settings give them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfcascade.config import FeatureSettings
from selfcascade.evaluation.networks import clip, dinov2, inception, lite0
from selfcascade.evaluation.networks.network import FeatureNetwork, NetworkKind
from selfcascade.evaluation.networks.weights import sha256_of
from selfcascade.settings import SettingsError

NETWORKS = {"efficientnet-lite0": lite0, "inception-v3": inception, "clip": clip, "dinov2": dinov2}


def load_features(settings: FeatureSettings) -> FeatureNetwork:
    """The network that ``settings`` name: one of :data:`NETWORKS`, never another one where its weights are missing.

    Raises:
        SettingsError: the package or the weights are missing or of another network, or are not those of ``settings.sha256``; names what to install or set.
    """
    path = weights_path(settings)
    if settings.sha256 is not None:  # files of gigabytes are not read for nothing
        weights_sha256(settings, path)
    network = NETWORKS[settings.network]
    return FeatureNetwork(network.kind_of(path), network.load(path), settings.resize)


def network_kind(settings: FeatureSettings, path: Path) -> NetworkKind:
    """Which network the weights at ``path`` belong to."""
    kind: NetworkKind = NETWORKS[settings.network].kind_of(path)
    return kind


def weights_path(settings: FeatureSettings) -> Path:
    """File that holds the weights, checked to be there.

    Raises:
        SettingsError: it is not; names what to install or set.
    """
    path: Path = NETWORKS[settings.network].locate(settings)
    return path


def weights_sha256(settings: FeatureSettings, path: Path) -> str:
    """SHA-256 of the weights file, in hex.

    Raises:
        SettingsError: it is not the one that ``settings`` ask for.
    """
    found = sha256_of(path)
    if settings.sha256 is not None and found != settings.sha256:
        raise SettingsError(f"evaluation.features.sha256: {path} has {found}, not {settings.sha256}; these are other weights")
    return found


def as_batch(pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
    """(N, 3, H, W) uint8 from pictures of one size, (H, W, 3) each."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
