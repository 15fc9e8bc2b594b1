"""A small dataset, a tiny base and settings that train in seconds."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from pair import Pair, two
from PIL import Image
from tiny_run import SIDE, tiny_settings

from selfcascade.config import AdaptationSettings, CurationSettings, FolderSource, StoreSettings
from selfcascade.curation.curate import curate
from selfcascade.storage import Store

COLOURS = {"red": (220, 40, 40), "blue": (40, 60, 220), "green": (30, 160, 60)}


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of 30 captioned pictures, 128 x 128."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    lines = []
    for index in range(30):
        name, colour = list(COLOURS.items())[index % 3]
        pixels = np.clip(np.array(colour) + random.normal(0, 40, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
        pixels[: 8 * (index % 12) + 8] = 250
        Image.fromarray(pixels).save(folder / f"p{index:02d}.png")
        lines.append(json.dumps({"file_name": f"p{index:02d}.png", "text": f"a {name} {('cat', 'dog', 'house')[index // 3 % 3]}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def curation(pictures: Path) -> CurationSettings:
    """Two shards of 15 pictures."""
    return CurationSettings(name="pictures", source=FolderSource(path=pictures), size=SIDE, tune=0.2, test=0.2, shard_inputs=15)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a base of 64 pixels."""
    return models.saved_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def world(weed: Path, curation: CurationSettings) -> Iterator[Store]:
    """A store that holds the dataset and that the tests of a session share."""
    settings = StoreSettings(folder=weed, bucket="tests", prefix=f"w-{secrets.token_hex(6)}")
    with Store.open(settings) as opened:
        curate(curation.model_copy(update={"filters": curation.filters.model_copy(update={"min_side": 32})}), opened)
        yield opened


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two ranks for all tests of a file."""
    with two(tmp_path_factory.mktemp("ranks")) as started:
        yield started


@pytest.fixture
def settings(tiny_base: Path) -> AdaptationSettings:
    """Six steps of variant A."""
    return tiny_settings(tiny_base)


@pytest.fixture
def fresh(weed: Path, curation: CurationSettings, tmp_path: Path) -> Iterator[Callable[[], Store]]:
    """Makes stores that hold the dataset and nothing else."""
    stores: list[Store] = []

    def make() -> Store:
        store = Store.open(StoreSettings(folder=weed, bucket="tests", prefix=f"f-{tmp_path.name}-{len(stores)}".replace("_", "-")))
        stores.append(store)
        curate(curation.model_copy(update={"filters": curation.filters.model_copy(update={"min_side": 32})}), store)
        return store

    yield make
    for store in stores:
        store.close()
