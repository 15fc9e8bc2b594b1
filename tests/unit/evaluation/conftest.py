"""What evaluation tests share: a small Inception stand-in in TorchScript, and a report on pictures whose answer is known."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from discs import publish_dataset, publish_methods
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Dinov2Config, Dinov2Model

from selfcascade.config import EvaluationSettings, FeatureSettings, StoreSettings
from selfcascade.evaluation.evaluate import evaluate
from selfcascade.generation.threads import torch_threads
from selfcascade.storage import ArtifactRef, Store


class _Layers(nn.Module):
    """Colour and coarse shape, spread over 2048 features."""

    def __init__(self) -> None:
        super().__init__()
        self.spread = nn.Linear(3 * 9, 2048)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.spread(nn.functional.adaptive_avg_pool2d(pictures, 3).flatten(1)).relu()


class _Script(nn.Module):
    """The outer shape of the TorchScript file that clean-fid and EDM2 use: ``layers`` inside, an unwanted resize around."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = _Layers()

    def forward(self, pictures: Tensor) -> Tensor:
        return self.layers(nn.functional.interpolate(pictures.float(), size=(299, 299)))


class _Classifier(_Script):
    """With the head that the real file has."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(2048, 1008)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrices gain nothing from a second thread."""
    with torch_threads(1):
        yield


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, empty: no test reads what another left, or what the machine has."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TorchScript file with the interface of the real one, and 2048 features that do see pictures."""
    path = tmp_path_factory.mktemp("weights") / "inception.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.jit.script(_Script()).save(str(path))
    return path


@pytest.fixture(scope="session")
def classifier_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``inception_file``, with classes."""
    path = tmp_path_factory.mktemp("weights") / "classifier.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        torch.jit.script(_Classifier()).save(str(path))
    return path


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP as the hub has it, of its own topology but narrow, with weights of chance and a vocabulary of letters."""
    folder = tmp_path_factory.mktemp("weights") / "clip"
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz"), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={unit: number for number, unit in enumerate(letters)}, merges=[])
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = size | {"vocab_size": len(letters), "max_position_embeddings": 12, "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=size | {"image_size": 28, "patch_size": 7}, projection_dim=12))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)  # as initialised it hardly sees its input
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dinov2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DINOv2 as the hub has it, narrow, with weights of chance."""
    folder = tmp_path_factory.mktemp("weights") / "dinov2"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Dinov2Model(Dinov2Config(hidden_size=20, num_hidden_layers=2, num_attention_heads=2, image_size=518, patch_size=14))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def settings(inception_file: Path) -> EvaluationSettings:
    """Small, and quick: the stand-in network, few half-samples."""
    features = FeatureSettings(network="inception-v3", weights=inception_file, batch=8)
    return EvaluationSettings(name="small", features=features, crop=16, crops_per_image=2, kid_subsets=10, half_samples=20, sheet_prompts=3)


@dataclass(frozen=True)
class Scene:
    """A store with a dataset, samples of every method, and the report on them."""

    store: Store
    dataset: ArtifactRef
    samples: dict[str, ArtifactRef]
    report: ArtifactRef


@pytest.fixture(scope="session")
def scene(weed: Path, settings: EvaluationSettings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Published once, to be read only."""
    folder = tmp_path_factory.mktemp("scene")
    with Store.open(StoreSettings(folder=weed, bucket="tests", prefix=f"scene-{secrets.token_hex(6)}")) as store, torch_threads(1):
        dataset, samples = publish_dataset(store, folder), publish_methods(store, folder)
        yield Scene(store, dataset, samples, evaluate(settings, store, dataset, samples))
