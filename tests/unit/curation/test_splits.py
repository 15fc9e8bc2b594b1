"""Splits follow from the key alone, and their shares are what was asked for."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from selfcascade.curation.splits import split_of

SHARE = st.floats(0, 0.49)


@given(st.text(max_size=40), SHARE, SHARE, SHARE)
def test_a_larger_test_share_keeps_all_that_were_in_it(key, tune, test, more):
    if split_of(key, tune, test) == "test":
        assert split_of(key, tune, max(test, more)) == "test"
    assert split_of(key, tune, test) == split_of(key, tune, test)


def test_shares_are_met_to_three_sigma():
    counts = Counter(split_of(f"key-{number}", 0.1, 0.25) for number in range(20_000))
    for split, share in (("tune", 0.1), ("test", 0.25), ("train", 0.65)):
        assert abs(counts[split] / 20_000 - share) < 3 * (share * (1 - share) / 20_000) ** 0.5


def test_known_keys_never_move():
    """Published datasets rest on it: this table may only change together with the salt."""
    assert [split_of(key, 0.2, 0.3) for key in ("1f34e-white", "1f34e-pale-blue", "cats-01", "猫", "")] == ["test", "test", "train", "train", "test"]


def test_no_share_no_member():
    assert {split_of(str(number), 0, 0) for number in range(500)} == {"train"}
