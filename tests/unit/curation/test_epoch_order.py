"""The order of an epoch: who reads what, and when, from counts alone."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from selfcascade.curation.order import parts, shard_order, share_of_rank, share_of_worker, shuffled

FIXED = [6, 5, 7, 8, 12, 13, 10, 9, 15, 11, 14, 16]
FIXED_SHARDS = [1, 2, 0, 4, 3]
COUNTS = st.lists(st.integers(1, 9), min_size=1, max_size=9)


def indices_of(samples, ranks, workers, uneven, window, epoch=0):
    """Indices of the stream by rank, in the order in which its workers hand them out, one worker after another."""
    for rank in range(ranks):
        shares = [share_of_worker(*share_of_rank(samples, rank, ranks, uneven), worker, workers) for worker in range(workers)]
        yield [index for start, stop in shares for index in shuffled(start, stop, window=window, seed=3, epoch=epoch).tolist()]


@given(COUNTS, st.integers(1, 7), st.integers(1, 5), st.integers(1, 40))
def test_ranks_and_workers_read_every_sample_once(counts, ranks, workers, window):
    read = [
        (shard, place)
        for indices in indices_of(sum(counts), ranks, workers, "keep", window)
        for index in indices
        for shard, first, _, _ in parts(counts, index, index + 1)
        for place in [first]
    ]
    assert sorted(read) == [(shard, place) for shard, count in enumerate(counts) for place in range(count)]


@given(COUNTS, st.integers(1, 7), st.integers(1, 5))
def test_padded_and_cut_shares_are_equal(counts, ranks, workers):
    """Pad reads everything, and the fewest twice; drop reads nothing twice, and leaves out the fewest."""
    samples = sum(counts)
    padded = list(indices_of(samples, ranks, workers, "pad", 4))
    assert {len(indices) for indices in padded} == {-(-samples // ranks)}
    assert {index % samples for indices in padded for index in indices} == set(range(samples))
    cut = list(indices_of(samples, ranks, workers, "drop", 4))
    assert {len(indices) for indices in cut} == {samples // ranks}
    flat = [index for indices in cut for index in indices]
    assert len(set(flat)) == len(flat) == samples // ranks * ranks
    for uneven in ("pad", "drop"):
        by_rank = [[share_of_worker(*share_of_rank(samples, rank, ranks, uneven), worker, workers) for worker in range(workers)] for rank in range(ranks)]
        assert len({tuple(stop - start for start, stop in shares) for shares in by_rank}) == 1


@given(COUNTS, st.integers(0, 30), st.integers(0, 60))
def test_parts_are_the_stream_cut_at_shards(counts, start, length):
    stream = [(shard, place) for shard, count in enumerate(counts) for place in range(count)]
    found = [(index + place - first, (shard, place)) for shard, first, end, index in parts(counts, start, start + length) for place in range(first, end)]
    assert found == [(index, stream[index % len(stream)]) for index in range(start, start + length)]


@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 64), st.integers(0, 5))
def test_a_sample_moves_by_less_than_the_window(start, length, window, epoch):
    """So that what is held is bounded: between an index and what was handed out before it there are never more than `window`."""
    order = shuffled(start, start + length, window=window, seed=0, epoch=epoch)
    assert sorted(order.tolist()) == list(range(start, start + length))
    newest = np.maximum.accumulate(order) if length else order
    held = newest - start + 1 - np.arange(1, length + 1)
    assert (held < window).all()
    pending_oldest = np.minimum.accumulate(order[::-1])[::-1] if length else order
    assert (newest - pending_oldest < window).all()


def test_the_shuffle_is_a_function_of_seed_and_epoch():
    """Fixed numbers: another machine, or another version of numpy, reads the same order."""
    assert shuffled(5, 17, window=6, seed=1, epoch=2).tolist() == FIXED
    assert shard_order(["00000.tar", "00001.tar", "00002.tar", "00003.tar", "00004.tar"], seed=1, epoch=2) == FIXED_SHARDS
    assert shuffled(5, 17, window=6, seed=1, epoch=3).tolist() != FIXED
    assert shuffled(5, 17, window=6, seed=2, epoch=2).tolist() != FIXED


def test_the_shuffle_of_an_index_does_not_depend_on_who_reads_it():
    """Jitter belongs to the index: a part's order is that of the whole, without the others."""
    whole, part = shuffled(0, 400, window=50, seed=4, epoch=0), shuffled(130, 290, window=50, seed=4, epoch=0)
    assert [index for index in whole.tolist() if 130 <= index < 290] == part.tolist()


def test_the_window_mixes():
    """Neighbours end far from one another: the mean move of an index is a third of the window's width, as for two independent uniform draws."""
    order = shuffled(0, 20_000, window=300, seed=0, epoch=0)
    rank = np.empty(len(order))
    rank[order] = np.arange(len(order))
    steps = np.abs(np.diff(rank)).mean()
    assert abs(steps / 100 - 1) < 0.05
