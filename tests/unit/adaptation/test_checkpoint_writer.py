from __future__ import annotations

import threading

import pytest
import torch

from selfcascade.adaptation.checkpoint import CheckpointFolder
from selfcascade.adaptation.checkpoint_writer import CheckpointWriter
from selfcascade.storage import Store
from selfcascade.storage.errors import StoreFull


class Slow(CheckpointFolder):
    """A folder whose writes wait until they are let go, and fail from a step on."""

    def __init__(self, store: Store, fails_at: int = 10**9) -> None:
        super().__init__(store, version="a" * 64, latents="b" * 64)
        self.go, self.fails_at = threading.Event(), fails_at
        self.writing, self.most = 0, 0

    def save(self, step, tensors, record):  # type: ignore[no-untyped-def]
        self.writing += 1
        self.most = max(self.most, self.writing)
        assert self.go.wait(20)
        if step >= self.fails_at:
            raise StoreFull("the embedded store has no room left for checkpoint; free space")
        super().save(step, tensors, record)
        self.writing -= 1


def weights(folder: CheckpointFolder) -> float:
    newest = folder.newest()
    assert newest is not None
    return float(newest.tensors["weights/w"][0])


def test_what_is_stored_is_the_state_of_the_moment(store: Store) -> None:
    """The loop goes on at once, and what it changes while the thread writes, in place, is not in the checkpoint."""
    folder, weight, record = Slow(store), torch.full((3,), 1.0), {"step": 1}
    with CheckpointWriter(folder) as writer:
        writer.save(1, {"weights/w": weight}, record)
        assert folder.steps() == []
        weight.fill_(2.0)
        record["step"] = 2
        folder.go.set()
    newest = folder.newest()
    assert newest is not None
    assert (newest.step, newest.record, newest.tensors["weights/w"].tolist()) == (1, {"step": 1}, [1.0, 1.0, 1.0])


def test_one_is_under_way_at_a_time(store: Store) -> None:
    """The second waits for the first, the third for the second; the newest two are there at the end."""
    folder = Slow(store)
    threading.Timer(0.3, folder.go.set).start()
    with CheckpointWriter(folder) as writer:
        for step in (1, 2, 3):
            writer.save(step, {"weights/w": torch.full((1,), float(step))}, {})
    assert folder.most == 1
    assert folder.steps() == [2, 3]
    assert weights(folder) == 3.0


@pytest.mark.parametrize("notice", ["save", "check", "wait", "end"])
def test_a_full_store_stops_the_loop_with_its_own_line(store: Store, notice: str) -> None:
    """Whatever the loop does next, it hears what the thread failed with, and the checkpoint before is whole."""
    folder = Slow(store, fails_at=2)
    folder.go.set()

    def loop() -> None:
        with CheckpointWriter(folder) as writer:
            writer.save(1, {"weights/w": torch.ones(1)}, {})
            writer.save(2, {"weights/w": torch.ones(1)}, {})
            while notice == "check":
                writer.check()
            if notice == "wait":
                writer.wait()
            if notice == "save":
                writer.save(3, {"weights/w": torch.ones(1)}, {})
            if notice != "end":
                pytest.fail("the error was lost")

    with pytest.raises(StoreFull, match="no room left for checkpoint"):
        loop()
    assert folder.steps() == [1]
    assert weights(folder) == 1.0


def test_an_error_of_the_loop_loses_no_checkpoint(store: Store) -> None:
    """It arrives as it is, after what was handed over has been stored."""
    folder = Slow(store)
    threading.Timer(0.3, folder.go.set).start()

    def loop() -> None:
        with CheckpointWriter(folder) as writer:
            writer.save(7, {"weights/w": torch.ones(1)}, {})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop()
    assert folder.steps() == [7]
