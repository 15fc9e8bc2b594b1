"""CLIP and DINOv2: the encoders of transformers on our own resize, from a folder, the hub's cache, or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPModel, Dinov2Model

from selfcascade.config import FeatureSettings
from selfcascade.evaluation.features import as_batch, load_features, weights_path, weights_sha256
from selfcascade.evaluation.networks import clip, dinov2
from selfcascade.settings import SettingsError


def pictures(count, side, seed=0):
    return [np.random.default_rng([seed, number]).integers(0, 256, (side, side, 3), dtype=np.uint8) for number in range(count)]


def pixels(batch, mean, std):
    return torch.from_numpy(np.stack([(picture / 255 - mean) / std for picture in batch])).permute(0, 3, 1, 2).float()


def test_clip_is_that_of_transformers(clip_folder):
    """Pictures and texts, normalised, are the embeddings that transformers' whole model gives; a text's neighbours in a batch do not change it."""
    network = load_features(FeatureSettings(network="clip", weights=clip_folder))
    batch, texts = pictures(3, 28), ["a cat", "x", "a text that is longer than twelve tokens"]
    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), AutoTokenizer.from_pretrained(clip_folder)
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
    with torch.inference_mode():
        expected = model(pixel_values=pixels(batch, clip.MEAN, clip.STD), **tokens)
    found = network(as_batch(batch))
    assert found.shape == (3, network.num_features) == (3, 12)
    torch.testing.assert_close(normalize(found), expected.image_embeds, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(normalize(network.read(texts)), expected.text_embeds, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(network.read(texts[1:2]), network.read(texts)[1:2], atol=1e-5, rtol=1e-4)
    assert (found[0] - found[1]).norm() > 1e-2


def test_dinov2_is_the_class_token_of_transformers(dinov2_folder):
    network = load_features(FeatureSettings(network="dinov2", weights=dinov2_folder))
    batch = pictures(2, 224)
    with torch.inference_mode():
        expected = Dinov2Model.from_pretrained(dinov2_folder).eval()(pixel_values=pixels(batch, dinov2.MEAN, dinov2.STD)).last_hidden_state[:, 0]
    found = network(as_batch(batch))
    assert found.shape == (2, network.num_features) == (2, 20)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert network.read is None


def test_a_picture_of_another_size_is_resized_by_our_rule(clip_folder):
    network = load_features(FeatureSettings(network="clip", weights=clip_folder))
    large = as_batch(pictures(1, 64))
    torch.testing.assert_close(network(large), network.embed(network.resized(large)))
    assert network.resized(large).shape == (1, 3, 28, 28)


def test_the_digest_that_is_asked_for_is_checked(dinov2_folder):
    chosen = FeatureSettings(network="dinov2", weights=dinov2_folder)
    found = weights_sha256(chosen, weights_path(chosen))
    load_features(chosen.model_copy(update={"sha256": found}))
    with pytest.raises(SettingsError, match=rf"{found}, not {'0' * 64}"):
        load_features(chosen.model_copy(update={"sha256": "0" * 64}))


def broken(source, folder, **changes):
    shutil.copytree(source, folder)
    for name, change in changes.items():
        path = folder / name.replace("__", ".")
        path.unlink() if change is None else path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return folder


@pytest.mark.parametrize(
    ("network", "changes", "said"),
    [
        ("clip", {"model__safetensors": None}, "has no model.safetensors; clip needs"),
        ("clip", {"tokenizer__json": None}, "has no tokenizer.json"),
        ("clip", {"config__json": {"model_type": "siglip"}}, "of type 'siglip', not CLIP"),
        ("clip", {"config__json": {"projection_dim": 13}}, "does not load as CLIP|lacks"),
        ("dinov2", {"config__json": {"model_type": "vit"}}, "of type 'vit', not DINOv2"),
        ("dinov2", {"config__json": {"num_hidden_layers": 3}}, r"lacks encoder\.layer\.2"),
    ],
)
def test_a_folder_that_is_something_else_is_refused(clip_folder, dinov2_folder, tmp_path, network, changes, said):
    folder = broken(clip_folder if network == "clip" else dinov2_folder, tmp_path / "there", **changes)
    with pytest.raises(SettingsError, match=said) as caught:
        load_features(FeatureSettings(network=network, weights=folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("network", ["clip", "dinov2"])
def test_nothing_is_downloaded_unless_it_is_allowed(network, tmp_path, monkeypatch):
    """Without a folder and with an empty cache no request is made, and no other network stands in."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    asked = []
    monkeypatch.setattr("socket.getaddrinfo", lambda host, *rest, **more: asked.append(host) or pytest.fail(f"{host} was looked up"))
    with pytest.raises(SettingsError, match=r"not in the cache of the model hub; allow its download by evaluation\.features\.download=true"):
        load_features(FeatureSettings(network=network))
    with pytest.raises(SettingsError, match="no folder /nowhere/here"):
        load_features(FeatureSettings(network=network, weights=Path("/nowhere/here")))
    assert asked == []


def test_the_cache_of_the_hub_is_found(clip_folder, tmp_path, monkeypatch):
    """The layout that the hub's own client makes: a reference, and a snapshot of that commit."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    home = tmp_path / "models--someone--clip"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("a" * 40)
    shutil.copytree(clip_folder, home / "snapshots" / ("a" * 40))
    assert load_features(FeatureSettings(network="clip", weights=Path("someone/clip"))).num_features == 12
