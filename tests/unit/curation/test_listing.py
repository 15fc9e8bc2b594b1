"""Listings: sorted on disk, the same whatever the order of the source, flat in memory."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from selfcascade.curation import listing
from selfcascade.curation.listing import Listing
from selfcascade.curation.record import Entry, version_of_listing


def entries(count: int) -> list[Entry]:
    return [Entry(f"k-{number:07d}", f"k/{number}.png", number, f"sha256:{number:064d}", f"thing\u2028{number}\n") for number in range(count)]


@pytest.mark.parametrize("run", [7, 100, 1000])
def test_a_listing_is_the_sorted_entries_whatever_their_order(monkeypatch, run):
    """Also when the runs are so many that they are merged in between; its version is that of the sorted entries."""
    monkeypatch.setattr(listing, "RUN", run)
    plain = [*entries(950), Entry("k", "k.png", 1, "", None), Entry("k-0000003a", "x", 1, "", None), Entry("K", "K.png", 1, "", None)]
    expected = sorted(plain, key=lambda entry: entry.key)
    random.Random(run).shuffle(plain)
    made = Listing(iter(plain))
    assert (list(made), len(made), made.version) == (expected, len(plain), version_of_listing(expected))
    assert list(zip(made, made, strict=True)) == list(zip(expected, expected, strict=True))


def test_of_entries_with_one_key_the_same_one_keeps_it_and_none_is_lost(monkeypatch):
    monkeypatch.setattr(listing, "RUN", 5)
    repeated = [Entry("a", "http://x/a", 0, "url:1", text) for text in ("one", "two", "two", "one")] + [Entry("a", "http://y/a", 0, "url:2", "other")]
    made = []
    for seed in range(5):
        shuffled = [*repeated, *entries(20)]
        random.Random(seed).shuffle(shuffled)
        made.append(list(Listing(shuffled)))
    assert all(other == made[0] for other in made)
    found = made[0][:5]
    assert len({entry.key for entry in made[0]}) == 25
    assert (found[0].key, found[0].caption, found[0].reason) == ("a", "one", None)
    assert sorted(entry.reason for entry in found[1:]) == ["duplicate of a"] * 3 + ["key taken: a is that of http://x/a too"]
    assert [entry.key for entry in made[0]] == sorted(entry.key for entry in made[0])


def test_memory_does_not_grow_with_the_listing(monkeypatch):
    """The peak at ten times the entries is within a tenth of the peak."""
    monkeypatch.setattr(listing, "RUN", 500)

    def peak(count: int) -> int:
        tracemalloc.start()
        made = Listing(Entry(f"{number * 7919 % count:07d}", "x" * 60, 1, "", "y" * 100) for number in range(count))
        assert sum(1 for _ in made) == count
        _, top = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return top

    small, large = peak(5_000), peak(50_000)
    # Each run holds an open file with its buffer; what grows is no more than that.
    assert large < small + 130 * 2**16
    assert large < 50_000 * 160


def test_optional_fields_of_an_entry_leave_the_lines_of_others_as_they_are():
    plain = Entry("k", "k.png", 3, "sha256:0", "a thing", None)
    assert plain.to_line() == b'["k","k.png",3,"sha256:0","a thing",null]\n'
    full = Entry("k", "k.png", 3, "sha256:0", "a thing", None, "tune", {"licence": "CC0"})
    assert Entry.from_line(full.to_line()) == full
    assert Entry.from_line(plain.to_line()) == plain
