"""Work by threads ahead of whoever asks: in order, bounded, and done with when nobody asks any more."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfcascade.curation.ahead import mapped


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(), max_size=30), st.integers(1, 4), st.integers(1, 8))
def test_it_is_map(items, threads, ahead):
    assert list(mapped(lambda item: item * 2, items, threads=threads, ahead=ahead)) == [item * 2 for item in items]


def test_later_items_wait_for_no_slow_one_and_come_after_it():
    gate, done = threading.Event(), []

    def work(item):
        if item == 0:
            assert gate.wait(30)
        else:
            done.append(item)
            if len(done) == 3:
                gate.set()
        return item

    assert list(mapped(work, range(6), threads=2, ahead=4)) == list(range(6))


@pytest.mark.parametrize("ahead", [1, 3])
def test_no_more_is_drawn_than_was_asked_for_ahead(ahead):
    drawn = []

    def items():
        for item in range(20):
            drawn.append(item)
            yield item

    results = mapped(lambda item: item, items(), threads=2, ahead=ahead)
    for given_out in range(1, 10):
        next(results)
        assert len(drawn) == given_out + ahead
    results.close()
    assert len(drawn) == 9 + ahead


def test_an_error_comes_where_its_result_would_and_leaves_no_thread():
    before = threading.active_count()

    def work(item):
        if item == 2:
            raise OSError("broken")
        return item

    results = mapped(work, range(100), threads=2, ahead=8)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(OSError, match="broken"):
        next(results)
    deadline = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
