"""Pictures that are looked at ahead of the network: the same table in whatever order threads finish, and a bounded number of pictures in memory."""

import random
from dataclasses import fields

import numpy as np
import pytest
from torch import nn

from selfcascade.curation.ahead import PICTURES
from selfcascade.curation.shards import Stored
from selfcascade.evaluation.embeddings import Embedding
from selfcascade.evaluation.measured_set import _pass
from selfcascade.evaluation.networks.network import FeatureNetwork, NetworkKind
from selfcascade.evaluation.tables import CropPlan, Extraction, Picture
from selfcascade.generation.samples import read_generated
from selfcascade.storage import Artifact


class Means(nn.Module):
    """Features that see a picture's coarse colours."""

    def forward(self, pictures):
        return nn.functional.adaptive_avg_pool2d(pictures, 2).flatten(1).clone()


@pytest.fixture
def network():
    return FeatureNetwork(NetworkKind("means", 12, 24, "", ""), Means())


@pytest.fixture(scope="module")
def pictures():
    generator = np.random.Generator(np.random.PCG64(3))
    return [
        Picture(f"{rank:03d}", f"{rank // 2:03d}", generator.integers(0, 256, (48, 48, 3), dtype=np.uint8), f"thing {rank}") for rank in range(3 * PICTURES)
    ]


def extraction(network):
    return Extraction(network, small=(12, 12), crops=CropPlan((40, 40), 16, 2, seed=5), batch=5)


def test_looking_ahead_changes_nothing(network, pictures):
    """By threads through the pass of a report, and by hand in an order of chance, the table is that of one picture after another, to the bit."""
    plain, shuffled, ahead = (extraction(network) for _ in range(3))
    embedding = Embedding(network, batch=7)
    for picture in pictures:
        plain.add(picture)
        embedding.add(picture)
    order = random.Random(1).sample(range(len(pictures)), len(pictures))
    looks = {place: shuffled.look(place, pictures[place]) for place in order}
    for place in range(len(pictures)):
        shuffled.take(looks[place])
    beside = Embedding(network, batch=7)
    _pass(iter(pictures), ahead, [beside])
    wanted = plain.result()
    for other in (shuffled.result(), ahead.result()):
        for field in fields(wanted):
            one, two = getattr(wanted, field.name), getattr(other, field.name)
            assert np.array_equal(one, two), field.name
    assert np.array_equal(embedding.result().features, beside.result().features)


def test_few_pictures_are_held_ahead(scene, monkeypatch):
    """Of published samples no more are decoded than the reader may hold, however slow the one who asks."""
    decoded, pixels = [], Stored.pixels
    monkeypatch.setattr(Stored, "pixels", lambda stored: decoded.append(stored.fields["key"]) or pixels(stored))
    monkeypatch.setattr("selfcascade.generation.samples.PICTURES", 2)
    found = read_generated(Artifact(scene.store, scene.samples["tuned"]))
    keys = []
    for sample in found:
        keys.append(sample.key)
        assert len(decoded) <= len(keys) + 2
    assert keys == sorted(keys) == sorted(decoded)
