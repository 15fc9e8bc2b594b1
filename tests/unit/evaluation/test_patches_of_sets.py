"""Patches of sets that are compared by hand, and what a second comparison of them costs: nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selfcascade.evaluation.comparison import compare
from selfcascade.evaluation.crops import crop_corners, cut
from selfcascade.evaluation.distances import fid, kid
from selfcascade.evaluation.evaluate import read_results
from selfcascade.evaluation.features import as_batch, load_features
from selfcascade.evaluation.networks.network import FeatureNetwork
from selfcascade.evaluation.resize import resize


def pictures(folder: Path, shapes: list[tuple[int, int]], *, seed: int) -> list[np.ndarray]:
    """Noise, written as PNG."""
    generator = np.random.default_rng(seed)
    folder.mkdir()
    made = [generator.integers(0, 200, (*shape, 3)).astype(np.uint8) for shape in shapes]
    for index, image in enumerate(made):
        Image.fromarray(image).save(folder / f"{index:03d}.png")
    return made


def no_store():
    raise AssertionError("the store was opened although no artifact is compared")


@pytest.fixture
def passed(monkeypatch) -> list[int]:
    """How many pictures or crops each pass of the network has had."""
    counts: list[int] = []
    embed = FeatureNetwork.embed

    def counted(network, batch):
        counts.append(len(batch))
        return embed(network, batch)

    monkeypatch.setattr(FeatureNetwork, "embed", counted)
    return counts


def test_patches_are_those_of_the_report(scene, settings):
    """The same crops of the same pictures: the numbers of the table."""
    found = compare(settings, [str(scene.dataset), str(scene.samples["tuned"])], lambda: scene.store, device="cpu").rows[0]
    numbers = next(row for row in read_results(scene.store, scene.report).rows if row.label == "tuned").numbers
    assert (found.patch_kid, found.patch_kid_spread) == (numbers["pkid_r"].value, numbers["pkid_r"].spread)
    assert (found.patch_fid, found.kid, found.patches) == (numbers["pfid_r"].value, numbers["kid_r"].value, "")


def test_larger_pictures_of_the_reference_are_cut_at_the_size_of_the_others(settings, tmp_path):
    """A reference of mixed sizes against sets of two sizes: resized first, rounded to bytes, then cut where the other's picture of that rank is."""
    real = pictures(tmp_path / "real", [(50 + index % 3, 60) for index in range(9)], seed=1)
    network = load_features(settings.features)
    sets = {size: pictures(tmp_path / str(size[0]), [size] * 7, seed=size[0]) for size in ((40, 32), (24, 50))}
    found = compare(settings, [str(tmp_path / name) for name in ("real", "40", "24")], no_store, device="cpu")

    def crops(images: list[np.ndarray], size: tuple[int, int]) -> torch.Tensor:
        at_size = [resize(as_batch([image]), size)[0].round().to(torch.uint8).permute(1, 2, 0).numpy() for image in images]
        corners = [crop_corners(rank, size=size, side=16, count=2, seed=settings.seed) for rank in range(len(images))]
        return torch.cat([network(as_batch(list(cut(image, corner, 16)))) for image, corner in zip(at_size, corners, strict=True)])

    for row, (size, images) in zip(found.rows, sets.items(), strict=True):
        x, y = crops(real, size), crops(images, size)
        kernel = kid(x, y, subset=settings.kid_subset, subsets=settings.kid_subsets, seed=settings.seed)
        assert row.patch_fid == pytest.approx(fid(x, y), rel=1e-4)
        assert (row.patch_kid, row.patch_kid_spread) == (pytest.approx(kernel.mean, rel=1e-4), pytest.approx(kernel.spread, rel=1e-4))


def test_where_there_are_no_patches_the_reason_is_said(settings, tmp_path):
    for name, shapes in (("large", [(40, 40)] * 4), ("small", [(30, 50)] * 4), ("mixed", [(40, 40), (41, 40)] * 2), ("tiny", [(12, 40)] * 4)):
        pictures(tmp_path / name, shapes, seed=len(name))
    names = [str(tmp_path / name) for name in ("small", "large", "mixed", "tiny")]
    found = compare(settings, names, no_store, device="cpu")
    (tmp_path / "small.npz").write_bytes(found.statistics)
    said = ("has pictures smaller than the 40 x 40 px", "from 40 x 40 px to 41 x 40 px", "evaluation.crop is 16; lower it", "statistics alone")
    *from_cache, itself = compare(settings, [*names, str(tmp_path / "small.npz"), names[0]], no_store, device="cpu").rows
    assert tuple(from_cache[:3]) == found.rows
    for row, words in zip(from_cache, said, strict=True):
        assert words in row.patches
        assert (row.patch_fid, row.patch_kid) == (None, None)
    assert all(f"no patches: {row.patches}" in found.notes for row in found.rows)
    assert itself.patch_fid == pytest.approx(0, abs=1e-6)


def test_what_was_seen_once_is_not_passed_again(settings, tmp_path, cache, passed):
    """Same bytes, no pass of the network and the same numbers; other crops cost passes of crops alone; an added picture, passes of its set."""
    pictures(tmp_path / "one", [(40, 40)] * 5, seed=1)
    pictures(tmp_path / "other", [(32, 32)] * 3, seed=2)
    names = [str(tmp_path / name) for name in ("one", "other")]
    first = compare(settings, names, no_store, device="cpu")
    assert sum(passed) == 3 * (5 + 3)
    passed.clear()
    assert compare(settings, names, no_store, device="cpu") == first
    assert passed == []
    others = settings.model_copy(update={"seed": 1})
    compare(others, names, no_store, device="cpu")
    assert sum(passed) == 2 * (5 + 3)
    passed.clear()
    (tmp_path / "other" / "003.png").write_bytes((tmp_path / "one" / "000.png").read_bytes())
    assert "differ in size" in compare(settings, names, no_store, device="cpu").rows[0].patches
    assert sum(passed) == 4
    assert all(path.parent == cache / "selfcascade" / "features" for path in cache.rglob("*") if path.is_file())


@pytest.mark.parametrize("change", ["order", "rule", "batch"])
def test_what_shapes_features_is_in_their_address(settings, tmp_path, passed, change):
    made = pictures(tmp_path / "one", [(40, 40)] * 5, seed=1)
    names = [str(tmp_path / "one"), str(tmp_path / "one")]
    compare(settings, names, no_store, device="cpu")
    passed.clear()
    features = settings.features
    if change == "order":
        Image.fromarray(made[0]).save(tmp_path / "one" / "001.png")
        Image.fromarray(made[1]).save(tmp_path / "one" / "000.png")
    else:
        features = features.model_copy(update={"resize": "bilinear"} if change == "rule" else {"batch": 3})
    compare(settings.model_copy(update={"features": features}), names, no_store, device="cpu")
    assert sum(passed) == 5 * 3


def test_a_damaged_cache_is_made_again(settings, tmp_path, cache, passed):
    pictures(tmp_path / "one", [(40, 40)] * 4, seed=1)
    pictures(tmp_path / "other", [(40, 40)] * 4, seed=2)
    names = [str(tmp_path / name) for name in ("one", "other")]
    first = compare(settings, names, no_store, device="cpu")
    passed.clear()
    kept = [path for path in cache.rglob("*") if path.is_file()]
    for path in kept:
        path.write_bytes(path.read_bytes()[:-1])
    assert (len(kept), compare(settings, names, no_store, device="cpu")) == (4, first)
    assert sum(passed) == 2 * 4 * 3
