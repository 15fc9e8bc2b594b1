"""Statistics that add up, and files of other tools."""

from __future__ import annotations

import io
import os
import pickle
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfcascade.evaluation.distances import fid
from selfcascade.evaluation.moments import Moments, check_alike
from selfcascade.evaluation.statistics import frechet
from selfcascade.settings import SettingsError


def normal(n: int, d: int, seed: int, *, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(1, 9), st.floats(-1e3, 1e3), st.randoms(use_true_random=False))
def test_merged_is_one_pass(shards, width, shift, chance):
    """Over any sharding, in any order, from one picture a shard, and far from zero: 1e-10 of the spread."""
    x = normal(sum(shards), width, sum(shards), shift=shift)
    parts = [Moments.of(part) for part in x.split(shards)]
    chance.shuffle(parts)
    merged, whole = reduce(add, parts), Moments.of(x)
    assert merged.count == len(x)
    assert torch.allclose(merged.mean, whole.mean, rtol=1e-10, atol=1e-10)
    assert torch.allclose(merged.covariance, whole.covariance, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("n", "m", "d"), [(40, 60, 5), (9, 7, 24), (3, 200, 16)])
def test_frechet_from_moments_is_frechet_from_features(n, m, d):
    """Also where covariances are singular; and it is what the features give."""
    x, y = normal(n, d, 1), normal(m, d, 2, shift=0.5)
    found = Moments.of(x).frechet(Moments.of(y))
    assert found == pytest.approx(float(frechet(x, y)), rel=1e-6)
    assert found == pytest.approx(fid(x, y), rel=1e-5)


def test_a_set_has_no_distance_from_itself():
    moments = Moments.of(normal(50, 12, 0))
    assert moments.frechet(moments) == pytest.approx(0, abs=1e-9)


def test_a_file_gives_back_what_was_written(tmp_path: Path):
    path = tmp_path / "a.npz"
    moments = Moments.of(normal(20, 6, 3), {"network": "lite0", "resize": "bicubic"})
    path.write_bytes(moments.to_npz())
    again = Moments.from_npz(path)
    assert (again.count, again.made_with) == (20, moments.made_with)
    assert torch.equal(again.mean, moments.mean)
    assert torch.equal(again.covariance, moments.covariance)


def test_files_of_other_tools_are_read(tmp_path: Path):
    """pytorch-fid, clean-fid and EDM write ``mu`` and ``sigma`` and nothing else; ADM's have pictures beside them."""
    x, y = normal(30, 5, 1), normal(30, 5, 2)
    np.savez(tmp_path / "other.npz", mu=x.mean(dim=0).numpy(), sigma=np.cov(x.numpy(), rowvar=False), arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    other = Moments.from_npz(tmp_path / "other.npz")
    assert other.count is None
    assert other.frechet(Moments.of(y, {"network": "any"})) == pytest.approx(Moments.of(x).frechet(Moments.of(y)), rel=1e-10)
    with pytest.raises(SettingsError, match="without a count"):
        other + Moments.of(y)


def _npz(**arrays: object) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "cannot be read"),
        (b"PK\x03\x04 torn", "cannot be read"),
        (pickle.dumps([1]), "cannot be read"),
        (_npz(mu=np.array([object()]), sigma=np.eye(1)), "cannot be read"),
        (_npz(a=np.eye(2)), "has no 'mu' and 'sigma' \\(it has a\\)"),
        (_npz(mu=np.zeros(3), sigma=np.eye(2)), "are no mean and covariance"),
        (_npz(mu=np.zeros(2), sigma=np.array([[1, np.nan], [np.nan, 1]])), "not finite"),
        (_npz(mu=np.zeros(2), sigma=np.array([[1.0, 0.5], [0.0, 1.0]])), "not symmetric"),
        (_npz(mu=np.zeros(2), sigma=np.diag([1.0, -1.0])), "negative variances"),
    ],
)
def test_what_is_no_statistics_is_refused(tmp_path: Path, data, said):
    path = tmp_path / "bad.npz"
    path.write_bytes(data)
    with pytest.raises(SettingsError, match=said) as caught:
        Moments.from_npz(path)
    assert "bad.npz" in str(caught.value)
    assert "\n" not in str(caught.value)


class _Runs:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_pickle_of_a_file_is_run(tmp_path: Path):
    bad = np.empty(1, dtype=object)
    bad[0] = _Runs(tmp_path / "ran")
    (tmp_path / "bad.npz").write_bytes(_npz(mu=bad, sigma=np.eye(1)))
    with pytest.raises(SettingsError):
        Moments.from_npz(tmp_path / "bad.npz")
    assert not (tmp_path / "ran").exists()


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(SettingsError, match=r"nowhere\.npz"):
        Moments.from_npz(tmp_path / "nowhere.npz")


def test_what_was_measured_differently_is_refused():
    x = normal(8, 4, 1)
    with pytest.raises(SettingsError, match="4 and 5 wide"):
        check_alike(Moments.of(x), Moments.of(normal(8, 5, 1)))
    with pytest.raises(SettingsError, match="different resize cannot be compared: 'bicubic' and 'nearest'"):
        Moments.of(x, {"network": "a", "resize": "bicubic"}).frechet(Moments.of(x, {"network": "a", "resize": "nearest"}))


@pytest.mark.parametrize("features", [torch.zeros(0, 4), torch.tensor([[1.0, float("nan")]]), torch.tensor([[float("inf")]])])
def test_broken_features_are_refused(features):
    with pytest.raises(SettingsError):
        Moments.of(features)
