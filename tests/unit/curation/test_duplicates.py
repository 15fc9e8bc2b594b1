"""Exact duplicates: the first by key survives, if it survives at all."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from selfcascade.config import FilterSettings
from selfcascade.curation.duplicates import mark_duplicates
from selfcascade.curation.record import Entry, version_of_listing

ENTRIES = st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.sampled_from(["png", "jpg", "jpeg"])), max_size=30).map(
    lambda rows: [Entry(f"k{n:03d}", f"k{n:03d}.{ext}", 1, f"sha256:{content}", "c", "bad: x" if bad else None) for n, (content, bad, ext) in enumerate(rows)]
)


@given(ENTRIES)
def test_each_content_survives_once(entries):
    marked = list(mark_duplicates(entries, FilterSettings()))
    survivors = [entry for entry in marked if entry.reason is None]
    identity = {(entry.digest, entry.source.endswith("png")) for entry in entries if entry.reason is None}
    assert len(survivors) == len(identity)
    first = {}
    for before, after in zip(entries, marked, strict=True):
        if before.reason is not None:
            assert after == before
            continue
        key = first.setdefault((before.digest, before.source.endswith("png")), before.key)
        assert after.reason == (None if key == before.key else f"duplicate of {key}")


@given(ENTRIES)
def test_lines_round_trip_and_fix_the_version(entries):
    assert [Entry.from_line(entry.to_line()) for entry in entries] == entries
    assert version_of_listing(entries) == version_of_listing(list(entries))
    if entries:
        assert version_of_listing(entries[:-1]) != version_of_listing(entries)
