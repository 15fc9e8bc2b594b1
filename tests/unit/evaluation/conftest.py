"""What evaluation tests share: a small Inception stand-in in TorchScript, and published sets of pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from selfcascade.config import CascadeSettings, CurationSettings, EvaluationSettings, FeatureSettings, FilterSettings, FolderSource, GenerationSettings, PromptSettings
from selfcascade.curation.curate import curate
from selfcascade.evaluation.features import torch_threads
from selfcascade.generation.samples import Sample, shard_table, write_shard
from selfcascade.generation.seeds import SampleSpec
from selfcascade.storage import Artifact, ArtifactRef, Store


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


@pytest.fixture
def settings(inception_file: Path) -> EvaluationSettings:
    """Small, and quick: the stand-in network, few half-samples."""
    features = FeatureSettings(network="inception-v3", weights=inception_file, batch=8)
    return EvaluationSettings(name="small", features=features, crop=16, crops_per_image=2, kid_subsets=10, half_samples=20, sheet_prompts=3)


def disc(seed: int, side: int, *, discs: int = 1, noise: float = 0.0) -> NDArray[np.uint8]:
    """A picture, (side, side, 3): coloured discs on white."""
    generator = np.random.default_rng(seed)
    colour = generator.integers(0, 200, 3)
    y, x = np.mgrid[0:side, 0:side] / side
    picture = np.full((side, side, 3), 255.0)
    columns = int(np.ceil(np.sqrt(discs)))
    for place in range(discs):
        row, column = divmod(place, columns)
        centre = (np.array([row, column]) + 0.5) / columns
        picture[np.hypot(y - centre[0], x - centre[1]) < 0.35 / columns] = colour
    picture += generator.normal(0, noise, picture.shape) if noise else 0
    return picture.round().clip(0, 255).astype(np.uint8)


@pytest.fixture
def publish_samples(store: Store, tmp_path: Path) -> Callable[..., ArtifactRef]:
    """Publishes pictures as a samples artifact, as the generation stage would."""

    def publish(method: str, pictures: list[NDArray[np.uint8]], *, eta: float = 0.0, name: str = "", prompts: list[str] | None = None) -> ArtifactRef:
        generation = GenerationSettings(
            name=name or method,
            method=method,
            upsampler="upsamplers/x" if method == "tuned" else None,
            cascade=CascadeSettings(eta=eta),
            prompts=PromptSettings(count=len(pictures)),
        )
        artifact = Artifact.plan(store, "samples", generation.name, generation, {"base": "tiny@" + "0" * 64, "prompts": "1" * 64})
        prompts = prompts or [f"p{number:03d}" for number in range(len(pictures))]
        specs = [SampleSpec(f"{prompt}-0000", prompt, f"<b>disc</b> & {prompt}", "", 0, number) for number, prompt in enumerate(prompts)]
        path = tmp_path / "shard.tar"
        write_shard(path, [Sample(spec, picture) for spec, picture in zip(specs, pictures, strict=True)], method=method, settings=generation.digest())
        artifact.put("00000.tar", path)
        artifact.put("00000.parquet", shard_table(path))
        return artifact.publish(counts={"samples": len(pictures)})

    return publish


@pytest.fixture
def dataset(store: Store, tmp_path: Path) -> ArtifactRef:
    """A dataset of 40 discs of 48 px, most of them in the test split."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(40):
        Image.fromarray(disc(1000 + number, 48)).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"disc {number}")
    chosen = CurationSettings(name="discs", source=FolderSource(path=folder), size=48, filters=FilterSettings(min_side=48), tune=0.05, test=0.9)
    return curate(chosen, store)
