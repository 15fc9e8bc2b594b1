"""Keys are unique, safe inside a tar, and do not depend on the order of the names."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from selfcascade.curation import keys
from selfcascade.curation.rows import Rows, matched

NAMES = st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=()), min_size=1, max_size=120), unique=True, max_size=30)
TWISTED = st.lists(st.text("aA./-é猫1", min_size=1, max_size=6), unique=True, max_size=40)


def keys_of(names):
    """As a source asks for them: sorted on disk."""
    with Rows() as rows:
        for name in names:
            rows.add(keys.folded(name), name)
        return {row[1]: key for row, key in keys.keys_of(rows)}


@given(st.one_of(NAMES, TWISTED), st.randoms(use_true_random=False))
def test_keys_are_unique_safe_and_independent_of_order(names, random):
    found = keys_of(names)
    assert set(found) == set(names)
    assert len({key.lower() for key in found.values()}) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,95}", key) for key in found.values())
    shuffled = list(names)
    random.shuffle(shuffled)
    assert keys_of(shuffled) == found


def test_a_plain_path_reads_as_its_key():
    assert keys_of(["cats/01.png", "dogs/a b.c.jpg"]) == {"cats/01.png": "cats-01", "dogs/a b.c.jpg": "dogs-a-b-c"}


def test_names_that_meet_in_one_key_all_take_a_suffix():
    found = keys_of(["a/b.png", "a-b.jpg", "A-B.png", "c.png"])
    assert found["c.png"] == "c"
    assert all(re.fullmatch(r"(a-b|A-B)-[0-9a-f]{8}", found[name]) for name in ("a/b.png", "a-b.jpg", "A-B.png"))


def test_a_suffix_that_another_name_has_already_grows():
    taken = keys_of(["x.png", "x.jpg"])["x.png"]
    found = keys_of(["x.png", "x.jpg", f"{taken}.png"])
    assert found[f"{taken}.png"] == taken
    assert re.fullmatch(r"x-[0-9a-f]{12}", found["x.png"])


TEXTS = st.text(st.characters(exclude_categories=()), max_size=4) | st.sampled_from(["", " ", "a", "a ", "a!", 'a"', "aa", "\ud800"])


@given(st.lists(TEXTS, max_size=20), st.lists(TEXTS, max_size=20))
def test_rows_match_whatever_their_texts(left, right):
    """A join on disk finds what a dictionary finds, each row once, also where texts sort unlike their JSON."""
    with Rows() as ours, Rows() as theirs:
        for number, text in enumerate(left):
            ours.add(text, number)
        for number, text in enumerate(right):
            theirs.add(text, number)
        found = {row[1]: sorted(other[1] for other in others) for row, others in matched(ours, theirs)}
        assert bool(ours) == bool(left)
    assert found == {number: [place for place, other in enumerate(right) if other == text] for number, text in enumerate(left)}
