"""Freed memory goes back to the system while pictures come."""

from pathlib import Path

import numpy as np
import pytest

from selfcascade.evaluation.heap import EVERY, Heap

FREED = 64 << 20


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_freed_room_between_what_stays_goes_back_after_some_pictures():
    """64 MiB that were freed in blocks of 64 KiB, each between two small ones that stay: glibc keeps them until the pictures that were seen amount to EVERY."""
    blocks = [(np.ones(64 << 10, np.uint8), np.ones(2 << 10, np.uint8)) for _ in range(FREED >> 16)]
    stays = [small for _, small in blocks]
    del blocks
    heap, before = Heap(), resident()
    heap.passed(EVERY - 1)
    assert before - resident() < FREED // 4
    heap.passed(1)
    assert before - resident() > FREED // 2
    assert len(stays) == FREED >> 16
