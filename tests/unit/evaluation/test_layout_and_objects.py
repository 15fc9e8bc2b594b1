"""Crops, layout and objects on pictures whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from selfcascade.evaluation.crops import crop_corners, cut
from selfcascade.evaluation.layout import analysis_size, layout_distances, shrink
from selfcascade.evaluation.objects import background, component_areas, count_objects
from selfcascade.settings import SettingsError


def scene(*centres: tuple[float, float], side: int = 96, radius: float = 0.12, paper: tuple[int, int, int] = (255, 255, 255)) -> np.ndarray:
    """Red discs at relative places on a plain background."""
    y, x = np.mgrid[0:side, 0:side] / side
    picture = np.empty((side, side, 3), np.uint8)
    picture[:] = paper
    for row, column in centres:
        picture[np.hypot(y - row, x - column) < radius] = (200, 30, 30)
    return picture


@pytest.mark.parametrize("paper", [(255, 255, 255), (180, 210, 240), (250, 220, 60)])
@pytest.mark.parametrize("centres", [(), ((0.5, 0.5),), ((0.3, 0.3), (0.7, 0.7)), ((0.2, 0.2), (0.2, 0.8), (0.8, 0.2), (0.8, 0.8))])
def test_objects_are_counted_on_any_plain_background(centres, paper):
    assert count_objects(scene(*centres, paper=paper)) == len(centres)


def test_an_object_that_touches_the_border_does_not_become_the_background():
    picture = scene((0.5, 0.0), (0.5, 0.9), radius=0.15)
    assert background(picture).tolist() == [255, 255, 255]
    assert count_objects(picture) == 2


def test_dust_and_faint_noise_are_not_objects():
    picture = scene((0.5, 0.5))
    picture[5, 5] = 0
    picture[80, 10:12] = 0
    noisy = (picture + np.random.default_rng(0).normal(0, 4, picture.shape)).clip(0, 255).astype(np.uint8)
    assert count_objects(noisy) == 1


@settings(max_examples=60, deadline=None)
@given(arrays(np.bool_, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_components_are_those_of_a_flood_fill(mask):
    """Union of runs gives the areas that a plain 8-connected flood fill gives, for every mask."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    areas = []
    while left:
        stack, area = [left.pop()], 0
        while stack:
            y, x = stack.pop()
            area += 1
            for neighbour in [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]:
                if neighbour in left:
                    left.remove(neighbour)
                    stack.append(neighbour)
        areas.append(area)
    assert sorted(component_areas(mask)) == sorted(areas)


def test_layout_sees_what_moves_and_not_what_is_merely_larger():
    """An enlarged picture is where it was; a moved object is not; black and white are at distance 1."""
    base = scene((0.3, 0.3), side=32)
    enlarged = scene((0.3, 0.3), side=128)
    moved = scene((0.7, 0.7), side=128)
    repeated = scene((0.3, 0.3), (0.7, 0.7), side=128)
    small = np.stack([shrink(picture, (32, 32)) for picture in (base, enlarged, repeated, moved)])
    same, larger, twice, elsewhere = layout_distances(small, np.stack([base] * 4))
    assert same == 0
    assert larger < 0.1 < twice < elsewhere
    black, white = np.zeros((1, 4, 4, 3), np.uint8), np.full((1, 4, 4, 3), 255, np.uint8)
    assert layout_distances(black, white)[0] == 1


@pytest.mark.parametrize(("base", "size"), [((128, 128), (128, 128)), ((512, 512), (128, 128)), ((512, 256), (128, 64)), ((64, 96), (64, 96))])
def test_layout_is_read_at_the_bases_size_or_less(base, size):
    assert analysis_size(base) == size


@given(st.integers(0, 10_000), st.integers(8, 64), st.integers(8, 64), st.integers(1, 8), st.integers(0, 9))
def test_crops_lie_inside_and_depend_on_rank_and_seed_alone(rank, height, width, side, seed):
    corners = crop_corners(rank, size=(height, width), side=side, count=3, seed=seed)
    assert (corners == crop_corners(rank, size=(height, width), side=side, count=3, seed=seed)).all()
    assert (corners >= 0).all()
    assert (corners <= [height - side, width - side]).all()
    picture = np.random.default_rng(rank).integers(0, 256, (height, width, 3), dtype=np.uint8)
    for (top, left), crop in zip(corners, cut(picture, corners, side), strict=True):
        assert (crop == picture[top : top + side, left : left + side]).all()


def test_crops_reach_every_corner():
    corners = np.concatenate([crop_corners(rank, size=(10, 12), side=8, count=4, seed=0) for rank in range(100)])
    assert set(map(tuple, corners.tolist())) == {(top, left) for top in range(3) for left in range(5)}


def test_a_crop_that_does_not_fit_is_refused():
    with pytest.raises(SettingsError, match=r"evaluation\.crop is 64 px but the pictures have 32 x 48 px"):
        crop_corners(0, size=(32, 48), side=64, count=1, seed=0)
