"""The directions of variant D's subspace, against a singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfcascade.cascade.basis import PrincipalDirections


def maps(seed: int, count: int, channels: int) -> list[torch.Tensor]:
    """Feature maps with a few strong directions and a mean far from zero, of several sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator) * torch.logspace(1, -2, channels)
    mean = 5 * torch.randn(channels, 1, 1, generator=generator)
    return [torch.einsum("cd,bdhw->bchw", mixing, torch.randn(2, channels, 3 + i % 2, 4, generator=generator)) + mean for i in range(count)]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(2, 6), channels=st.integers(5, 24))
def test_directions_are_the_first_right_singular_vectors(seed, count, channels):
    """Of the centred matrix of all vectors, up to the sign, which is fixed: the entry of largest magnitude is positive."""
    seen, features = PrincipalDirections(channels), maps(seed, count, channels)
    for feature in features:
        seen.add(feature)
    found = seen.directions(4)
    rows = torch.cat([feature.double().permute(0, 2, 3, 1).reshape(-1, channels) for feature in features])
    expected = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[:4].T.float()
    torch.testing.assert_close(found, expected * (found * expected).sum(0).sign(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.T @ found, torch.eye(4), atol=1e-5, rtol=0)
    assert (found.gather(0, found.abs().argmax(0, keepdim=True)) > 0).all()


def test_neither_pieces_nor_their_precision_show():
    """Half precision is widened before it is summed; one map at a time or all at once."""
    features = [feature.bfloat16() for feature in maps(1, 4, 8) if feature.shape[2] == 3]
    together, apart = PrincipalDirections(8), PrincipalDirections(8)
    together.add(torch.cat(features))
    for feature in features:
        apart.add(feature[:1])
        apart.add(feature[1:])
    torch.testing.assert_close(together.directions(4), apart.directions(4), atol=1e-6, rtol=0)


def test_no_vector_has_no_direction():
    with pytest.raises(ValueError, match="at least one feature vector"):
        PrincipalDirections(8).directions(4)
