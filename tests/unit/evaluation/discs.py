"""Pictures whose layout and number of objects are known, and artifacts made of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from selfcascade.config import CascadeSettings, CurationSettings, FilterSettings, FolderSource, GenerationSettings, Method, PromptSettings
from selfcascade.curation.curate import curate
from selfcascade.generation.samples import Sample, shard_table, write_shard
from selfcascade.generation.seeds import SampleSpec
from selfcascade.storage import Artifact, ArtifactRef, Store

Picture = NDArray[np.uint8]
COUNT = 8


def disc(seed: int, side: int, *, discs: int = 1, noise: float = 0.0, light: float = 1.0) -> Picture:
    """A picture, (side, side, 3): coloured discs on white, or on grey where ``light`` is below 1."""
    generator = np.random.default_rng(seed)
    colour = generator.integers(0, 200, 3)
    y, x = np.mgrid[0:side, 0:side] / side
    picture = np.full((side, side, 3), 255.0)
    columns = int(np.ceil(np.sqrt(discs)))
    for place in range(discs):
        row, column = divmod(place, columns)
        centre = (np.array([row, column]) + 0.5) / columns
        picture[np.hypot(y - centre[0], x - centre[1]) < 0.35 / columns] = colour
    picture = picture * light + (generator.normal(0, noise, picture.shape) if noise else 0)
    return np.asarray(picture.round().clip(0, 255).astype(np.uint8))


def publish_samples(
    store: Store, folder: Path, method: Method, pictures: Sequence[Picture], *, eta: float = 0.0, name: str = "", prompts: Sequence[str] | None = None
) -> ArtifactRef:
    """Pictures as a samples artifact, as the generation stage leaves one; ``folder`` is for a file in between."""
    settings = GenerationSettings(
        name=name or method,
        method=method,
        upsampler="upsamplers/x" if method == "tuned" else None,
        cascade=CascadeSettings(eta=eta),
        prompts=PromptSettings(count=len(pictures)),
    )
    artifact = Artifact.plan(store, "samples", settings.name, settings, {"base": "tiny@" + "0" * 64, "prompts": "1" * 64})
    ids = prompts or [f"p{number:03d}" for number in range(len(pictures))]
    specs = [SampleSpec(f"{prompt}-0000", prompt, f"<b>disc</b> & {prompt}", "", 0, number) for number, prompt in enumerate(ids)]
    path = folder / "shard.tar"
    write_shard(path, [Sample(spec, picture) for spec, picture in zip(specs, pictures, strict=True)], method=method, settings=settings.digest())
    artifact.put("00000.tar", path)
    artifact.put("00000.parquet", shard_table(path))
    return artifact.publish(counts={"samples": len(pictures)})


def publish_dataset(store: Store, folder: Path) -> ArtifactRef:
    """A dataset of 40 discs of 48 px, most of them in the test split, none in the tune split."""
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(40):
        Image.fromarray(disc(1000 + number, 48)).save(pictures / f"{number:03d}.png")
        (pictures / f"{number:03d}.txt").write_text(f"disc {number}")
    chosen = CurationSettings(name="discs", source=FolderSource(path=pictures), size=48, filters=FilterSettings(min_side=48), tune=0, test=0.9)
    return curate(chosen, store)


def publish_methods(store: Store, folder: Path) -> dict[str, ArtifactRef]:
    """Every method on eight prompts: direct repeats its disc (and darkens it with eta 0), the cascade keeps it, tuning cleans it."""
    base = [disc(seed, 24) for seed in range(COUNT)]
    enlarged = [np.asarray(Image.fromarray(picture).resize((48, 48), Image.Resampling.LANCZOS)) for picture in base]
    sets: dict[str, tuple[Method, float, list[Picture]]] = {
        "base": ("base", 0, base),
        "lanczos": ("lanczos", 0, enlarged),
        "direct eta 0": ("direct", 0, [disc(seed, 48, discs=4, light=0.5) for seed in range(COUNT)]),
        "direct eta 1": ("direct", 1, [disc(seed, 48, discs=4) for seed in range(COUNT)]),
        "tuning-free": ("tuning-free", 0, [disc(seed, 48, noise=20) for seed in range(COUNT)]),
        "tuned": ("tuned", 0, [disc(seed, 48, noise=2) for seed in range(COUNT)]),
    }
    return {label: publish_samples(store, folder, method, pictures, eta=eta, name=label.replace(" ", "-")) for label, (method, eta, pictures) in sets.items()}
