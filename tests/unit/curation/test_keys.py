"""Keys are unique, safe inside a tar, and do not depend on the order of the names."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from selfcascade.curation.keys import keys_of

NAMES = st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=()), min_size=1, max_size=120), unique=True, max_size=30)
TWISTED = st.lists(st.text("aA./-é猫1", min_size=1, max_size=6), unique=True, max_size=40)


@given(st.one_of(NAMES, TWISTED), st.randoms(use_true_random=False))
def test_keys_are_unique_safe_and_independent_of_order(names, random):
    keys = keys_of(names)
    assert set(keys) == set(names)
    assert len({key.lower() for key in keys.values()}) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,95}", key) for key in keys.values())
    shuffled = list(names)
    random.shuffle(shuffled)
    assert keys_of(shuffled) == keys


def test_a_plain_path_reads_as_its_key():
    assert keys_of(["cats/01.png", "dogs/a b.c.jpg"]) == {"cats/01.png": "cats-01", "dogs/a b.c.jpg": "dogs-a-b-c"}


def test_names_that_meet_in_one_key_all_take_a_suffix():
    keys = keys_of(["a/b.png", "a-b.jpg", "A-B.png", "c.png"])
    assert keys["c.png"] == "c"
    assert all(re.fullmatch(r"(a-b|A-B)-[0-9a-f]{8}", keys[name]) for name in ("a/b.png", "a-b.jpg", "A-B.png"))


def test_a_suffix_that_another_name_has_already_grows():
    taken = keys_of(["x.png", "x.jpg"])["x.png"]
    keys = keys_of(["x.png", "x.jpg", f"{taken}.png"])
    assert keys[f"{taken}.png"] == taken
    assert re.fullmatch(r"x-[0-9a-f]{12}", keys["x.png"])
