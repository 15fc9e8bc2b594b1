"""One resize, one network, bytes in: what every number rests on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from selfcascade.config import FeatureSettings
from selfcascade.evaluation.distances import fid
from selfcascade.evaluation.features import as_batch, load_features, weights_path, weights_sha256
from selfcascade.evaluation.networks import lite0
from selfcascade.evaluation.networks.network import FeatureNetwork, NetworkKind
from selfcascade.evaluation.resize import RULES, resize
from selfcascade.generation.threads import torch_threads
from selfcascade.settings import SettingsError


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
def test_resize_is_pillows_bicubic_on_floats(height, width, new_height, new_width, seed):
    """Pillow resizes mode F with antialiasing and without rounding; the same to 2e-2 of 255 grey levels, for any two sizes."""
    picture = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ours = resize(as_batch([picture]), (new_height, new_width))[0].permute(1, 2, 0).numpy()
    channels = [Image.fromarray(picture[..., c].astype(np.float32)).resize((new_width, new_height), Image.Resampling.BICUBIC) for c in range(3)]
    theirs = np.stack([np.asarray(channel) for channel in channels], axis=2).clip(0, 255)
    np.testing.assert_allclose(ours, theirs, atol=2e-2)


def test_resize_does_not_alias():
    """A checkerboard shrunk by 8 is grey: no filter that picks pixels would give that."""
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    small = resize(as_batch([np.stack([board] * 3, axis=2)]), (8, 8))
    assert (small[..., 1:-1, 1:-1] - 127.5).abs().max() < 2


def test_the_other_resizes_are_what_they_are_called():
    """TensorFlow 1: pixel i of n lies at i * old / n, by hand in two loops. Bilinear: torch's, antialiased. Each leaves a right size alone."""
    picture = torch.randint(0, 256, (1, 3, 7, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found, source = resize(picture, (5, 23), "tensorflow"), picture[0].double()
    for row in range(5):
        for column in range(23):
            y, x = row * 7 / 5, column * 10 / 23
            top, left = int(y), int(x)
            low, right = min(top + 1, 6), min(left + 1, 9)
            upper = source[:, top, left] * (1 - x + left) + source[:, top, right] * (x - left)
            lower = source[:, low, left] * (1 - x + left) + source[:, low, right] * (x - left)
            torch.testing.assert_close(found[0, :, row, column].double(), upper * (1 - y + top) + lower * (y - top), atol=1e-3, rtol=0)
    expected = nn.functional.interpolate(picture.float(), size=(5, 23), mode="bilinear", antialias=True)
    torch.testing.assert_close(resize(picture, (5, 23), "bilinear"), expected)
    for rule in RULES:
        assert torch.equal(resize(picture, (7, 10), rule), picture.float())


def test_the_network_resizes_as_its_settings_say(inception_file):
    """Features by each rule are those of pictures resized by it; the digest of the settings is the old one where the rule is."""
    picture = torch.randint(0, 256, (1, 3, 40, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = {}
    for rule in RULES:
        network = load_features(FeatureSettings(network="inception-v3", weights=inception_file, resize=rule))
        found[rule] = network(picture)
        torch.testing.assert_close(found[rule], network.embed(resize(picture, (299, 299), rule)))
    assert not torch.allclose(found["clean"], found["tensorflow"])
    assert "resize" not in FeatureSettings().what()
    assert FeatureSettings(resize="bilinear").what()["resize"] == "bilinear"


def test_lite0_is_the_published_network():
    """1280 finite features that tell pictures apart, from the weights whose digest is pinned; one picture's features do not depend on its batch."""
    chosen = FeatureSettings()
    assert weights_sha256(chosen, weights_path(chosen)) == lite0.SHA256
    with torch_threads(1):
        network = load_features(chosen)
        pictures = torch.randint(0, 256, (3, 3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        together = network(pictures)
        alone = network(pictures[1:2])
    assert together.shape == (3, network.num_features) == (3, 1280)
    assert together.dtype == torch.float32
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)
    assert (together[0] - together[1]).norm() > 0.1
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_torchscript_layers_see_our_resize_and_scaling(inception_file):
    """The network is ``layers`` of the file on (x - 128) / 128 of our resize: the file's own resize is not passed."""
    network = load_features(FeatureSettings(network="inception-v3", weights=inception_file))
    pictures = torch.randint(0, 256, (2, 3, 32, 20), dtype=torch.uint8)
    with torch.inference_mode():
        expected = torch.jit.load(str(inception_file)).layers((resize(pictures, (299, 299)) - 128) / 128)
    torch.testing.assert_close(network(pictures), expected)


def test_torchmetrics_takes_the_network_itself():
    """FID of torchmetrics fed with pictures through the module equals FID of features that were computed before."""

    class Body(nn.Module):
        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            return nn.functional.adaptive_avg_pool2d(pictures / 255, 2).flatten(1)

    network = FeatureNetwork(NetworkKind("means", 12, 16, "x / 255", "none"), Body())
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randint(low, 256, (30, 3, 24, 24), dtype=torch.uint8, generator=generator) for low in (0, 60))
    metric = FrechetInceptionDistance(feature=network)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    assert float(metric.compute()) == pytest.approx(fid(network(real), network(fake)), rel=1e-4)


def test_float_pictures_are_refused(inception_file):
    network = load_features(FeatureSettings(network="inception-v3", weights=inception_file))
    with pytest.raises(TypeError, match="uint8"):
        network(torch.rand(1, 3, 8, 8))


def test_a_network_that_gives_nonsense_is_refused(tmp_path):
    class Bad(nn.Module):
        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            return torch.full((pictures.shape[0], 2048), float("nan"))

    class Script(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = Bad()

        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            return self.layers(pictures)

    torch.jit.script(Script()).save(str(tmp_path / "bad.pt"))
    network = load_features(FeatureSettings(network="inception-v3", weights=tmp_path / "bad.pt"))
    with pytest.raises(ValueError, match="not finite"):
        network(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (FeatureSettings(network="inception-v3"), "needs weights; set evaluation.features.weights"),
        (FeatureSettings(network="inception-v3", weights=Path("/nowhere/inception.pt")), "no file /nowhere/inception.pt"),
        (FeatureSettings(weights=Path("inception.pt")), "comes with its own"),
    ],
)
def test_missing_weights_are_named_with_the_way_out(chosen, message):
    with pytest.raises(SettingsError, match=message) as caught:
        load_features(chosen)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_torchscript_is_refused(tmp_path):
    for name, write in {
        "text.pt": lambda path: path.write_text("no weights"),
        "state.pt": lambda path: torch.save({"a": torch.zeros(1)}, path),
        "other.pt": lambda path: torch.jit.script(nn.Linear(1, 1)).save(str(path)),
    }.items():
        write(tmp_path / name)
        with pytest.raises(SettingsError, match=r"evaluation\.features\.weights .*" + name):
            load_features(FeatureSettings(network="inception-v3", weights=tmp_path / name))
