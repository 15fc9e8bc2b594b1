"""DINOv2's image encoder, whose Fréchet distance follows people's judgement of diffusion samples better than Inception's (Stein et al., 2023)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfcascade.config import FeatureSettings
from selfcascade.evaluation.networks.network import NetworkKind
from selfcascade.evaluation.networks.weights import MODEL, config_of, model_folder, pretrained

HUB_ID = "facebook/dinov2-large"
"""The encoder of EDM2's FD-DINOv2; Apache-2.0."""
SIDE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def locate(settings: FeatureSettings) -> Path:
    """The weights file of the folder that is set, else of the model in the hub's cache.

    Raises:
        SettingsError: it is not there.
    """
    return model_folder(settings, default=HUB_ID) / MODEL


def kind_of(path: Path) -> NetworkKind:
    """Width as the folder's ``config.json`` has it.

    Raises:
        SettingsError: it is no DINOv2.
    """
    config = config_of(path, "dinov2", "DINOv2")
    name = f"DINOv2 ({config['num_hidden_layers']} layers of {config['hidden_size']}, patches of {config['patch_size']})"
    return NetworkKind(name, config["hidden_size"], SIDE, "(x / 255 - mean) / deviation of ImageNet", "Apache-2.0")


def load(path: Path) -> nn.Module:
    """The encoder; its features are the class token after the last norm.

    Raises:
        SettingsError: the weights are not those of the configuration.
    """
    from transformers import Dinov2Model

    return Encoder(pretrained(Dinov2Model, path, "DINOv2"))


class Encoder(nn.Module):
    """Pictures, float (N, 3, side, side) in 0..255, to (N, d)."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        """Class tokens."""
        embedded: Tensor = self.model(pixel_values=(pictures / 255 - self.mean) / self.std).pooler_output
        return embedded
