"""CLIP's image and text encoders: what CMMD and the CLIP score are measured with (Jayasumana et al., 2024; Hessel et al., 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfcascade.config import FeatureSettings
from selfcascade.evaluation.networks.network import NetworkKind
from selfcascade.evaluation.networks.weights import MODEL, config_of, model_folder, not_loading, pretrained

HUB_ID = "openai/clip-vit-large-patch14-336"
"""The encoder that CMMD was published with; MIT."""
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def locate(settings: FeatureSettings) -> Path:
    """The weights file of the folder that is set, else of the model in the hub's cache.

    Raises:
        SettingsError: it is not there.
    """
    return model_folder(settings, default=HUB_ID, others=TOKENIZER) / MODEL


def kind_of(path: Path) -> NetworkKind:
    """Size and width as the folder's ``config.json`` has them.

    Raises:
        SettingsError: it is no CLIP.
    """
    config_of(path, "clip", "CLIP")
    config = _config(path)
    vision = config.vision_config
    name = f"CLIP ({vision.num_hidden_layers} layers of {vision.hidden_size}, patches of {vision.patch_size})"
    return NetworkKind(name, config.projection_dim, vision.image_size, "(x / 255 - mean) / deviation of CLIP's training", "MIT")


def load(path: Path) -> Encoders:
    """Both encoders; their features are the projections into the shared space, not normalised.

    Raises:
        SettingsError: the weights are not those of the configuration.
    """
    from transformers import AutoTokenizer, CLIPModel

    model = pretrained(CLIPModel, path, "CLIP")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent)
    except (OSError, ValueError, RuntimeError) as error:
        raise not_loading(path, "CLIP", error) from None
    return Encoders(model, tokenizer)


class Encoders(nn.Module):
    """Pictures, float (N, 3, side, side) in 0..255, or texts, to (N, d) of one space."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        """Projected image embeddings."""
        pooled = self.model.vision_model(pixel_values=(pictures / 255 - self.mean) / self.std).pooler_output
        embedded: Tensor = self.model.visual_projection(pooled)
        return embedded

    @torch.inference_mode()
    def read(self, texts: Sequence[str]) -> Tensor:
        """Projected text embeddings, (N, d) float32; what is longer than the text encoder takes is cut."""
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.model.config.text_config.max_position_embeddings, return_tensors="pt"
        ).to(self.mean.device)
        pooled = self.model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        embedded: Tensor = self.model.text_projection(pooled).float()
        return embedded


def _config(path: Path) -> Any:
    from transformers import CLIPConfig

    return CLIPConfig.from_pretrained(path.parent)
