"""Count, mean and covariance of features: all that FID needs, in memory that does not grow with the pictures, and the `.npz` files that tools exchange."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfcascade.settings import SettingsError

SYMMETRY = 1e-6
"""Largest asymmetry of a covariance, and most negative eigenvalue, relative to its largest entry."""


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """A set of n features, (n, d). Sets that do not overlap add up: ``Moments.of(x) + Moments.of(y)`` is ``Moments.of`` both."""

    count: int | None
    """None where a file of another tool does not say it: such a set cannot be added to."""
    mean: Tensor
    """(d,), float64."""
    covariance: Tensor
    """(d, d), float64, unbiased."""
    made_with: dict[str, str] = field(default_factory=dict)
    """Network, weights and resize rule by name, where they are known."""

    @classmethod
    def of(cls, features: Tensor, made_with: dict[str, str] | None = None) -> Moments:
        """Of (n, d) features.

        Raises:
            SettingsError: there is no feature, or a number that is not finite.
        """
        x = features.double()
        if x.ndim != 2 or not len(x):
            raise SettingsError("a set of pictures is empty; there is nothing to compare")
        if not bool(torch.isfinite(x).all()):
            raise SettingsError("a feature is not a finite number; the network or its input is broken")
        mean = x.mean(dim=0)
        centred = x - mean
        return cls(len(x), mean, centred.T @ centred / max(1, len(x) - 1), made_with or {})

    def __add__(self, other: Moments) -> Moments:
        """Of both sets (Chan, Golub and LeVeque, 1983, equation 2.1): no sum of squares is ever formed, so nothing cancels.

        Raises:
            SettingsError: a count is not known, or the features are of different networks.
        """
        check_alike(self, other)
        if self.count is None or other.count is None:
            raise SettingsError("statistics without a count of pictures cannot be merged; make them again from the pictures")
        n, m = self.count, other.count
        gap = other.mean - self.mean
        scatter = (n - 1) * self.covariance + (m - 1) * other.covariance + torch.outer(gap, gap) * (n * m / (n + m))
        return Moments(n + m, self.mean + gap * (m / (n + m)), scatter / (n + m - 1), self.made_with)

    def frechet(self, other: Moments) -> float:
        """Fréchet distance of the two Gaussians (Dowson and Landau, 1982). The root is taken of a symmetric matrix: it is real, for singular ones too.

        Raises:
            SettingsError: the features are of different networks.
        """
        check_alike(self, other)
        values, vectors = torch.linalg.eigh(self.covariance)
        root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
        roots = torch.linalg.eigvalsh(root @ other.covariance @ root).clamp_min(0).sqrt().sum()
        gap = (self.mean - other.mean).square().sum()
        return max(0.0, float(gap + self.covariance.trace() + other.covariance.trace() - 2 * roots))

    def to_npz(self) -> bytes:
        """``mu`` and ``sigma``, as pytorch-fid, clean-fid and EDM read them, with the count and what they were made with beside them."""
        arrays: dict[str, NDArray[np.generic]] = {"mu": self.mean.numpy(), "sigma": self.covariance.numpy()}
        if self.count is not None:
            arrays["count"] = np.array(self.count)
        arrays |= {name: np.array(value) for name, value in self.made_with.items()}
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        return buffer.getvalue()

    @classmethod
    def from_npz(cls, path: Path) -> Moments:
        """Of a file of this or another tool. Nothing in it is unpickled.

        Raises:
            SettingsError: no such file, no ``mu`` and ``sigma`` in it, or they are not the mean and covariance of anything.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                if not {"mu", "sigma"} <= set(file.files):
                    raise SettingsError(f"{path} has no 'mu' and 'sigma' (it has {', '.join(file.files) or 'nothing'}); give the statistics of a FID tool")
                mu, sigma = np.asarray(file["mu"], np.float64), np.asarray(file["sigma"], np.float64)
                count = int(file["count"]) if "count" in file.files else None
                made_with = {name: str(file[name]) for name in file.files if file[name].dtype.kind == "U"}
        except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            raise SettingsError(f"{path} cannot be read as .npz statistics: {' '.join(str(error).split())[:120]}") from None
        _check_gaussian(path, mu, sigma)
        return cls(count, torch.from_numpy(mu), torch.from_numpy(sigma), made_with)


def check_alike(one: Moments, other: Moments) -> None:
    """Refuse what was measured differently.

    Raises:
        SettingsError: other widths, or a network, weights or resize rule that both sides know and that differ; names it.
    """
    if len(one.mean) != len(other.mean):
        raise SettingsError(f"features of different networks cannot be compared: {len(one.mean)} and {len(other.mean)} wide")
    for name in sorted(one.made_with.keys() & other.made_with.keys()):
        if one.made_with[name] != other.made_with[name]:
            raise SettingsError(f"statistics of different {name} cannot be compared: {one.made_with[name]!r} and {other.made_with[name]!r}")


def _check_gaussian(path: Path, mu: NDArray[np.float64], sigma: NDArray[np.float64]) -> None:
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise SettingsError(f"{path}: 'mu' of shape {mu.shape} and 'sigma' of shape {sigma.shape} are no mean and covariance; they must be (d,) and (d, d)")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise SettingsError(f"{path} holds a number that is not finite; make the statistics again")
    scale = float(np.abs(sigma).max(initial=0.0))
    if np.abs(sigma - sigma.T).max(initial=0.0) > SYMMETRY * scale or np.linalg.eigvalsh(sigma).min(initial=0.0) < -SYMMETRY * scale * len(mu):
        raise SettingsError(f"{path}: 'sigma' is no covariance: it is not symmetric, or it has negative variances")
