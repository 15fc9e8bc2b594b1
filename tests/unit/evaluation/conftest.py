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


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrices gain nothing from a second thread."""
    with torch_threads(1):
        yield


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TorchScript file with the interface of the real one, and 2048 features that do see pictures."""
    path = tmp_path_factory.mktemp("weights") / "inception.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.jit.script(_Script()).save(str(path))
    return path


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
