"""What a training and a stage say of themselves on a line."""

import pytest

from selfcascade.adaptation.training_run import TrainingStep
from selfcascade_tasks import progress as module
from selfcascade_tasks.adapt import how_it_goes
from selfcascade_tasks.progress import StageProgress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the progress sees, and what it sends to the UI."""
    now, sent = [1000.0], []
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module, "create_progress_artifact", lambda percent, key, description: sent.append((percent, description)) or "id")
    monkeypatch.setattr(module, "update_progress_artifact", lambda artifact, percent, description: sent.append((percent, description)))
    return now, sent


def test_a_training_tells_losses_speed_and_memory():
    reached = TrainingStep(step=5, steps=9, loss=0.12345, lr=1e-3, samples_per_second=13.26, seconds_left=40.0, memory_bytes=3 << 29)
    assert how_it_goes(reached) == "loss 0.1235, 13.3 samples/s, 1.5 GiB"
    assert how_it_goes(TrainingStep(**{**vars(reached), "validation": 0.5})) == "loss 0.1235, validation 0.5000, 13.3 samples/s, 1.5 GiB"


def test_the_time_that_is_left_follows_the_pace_of_this_run(clock):
    """Of ten units four were done before; two more took 20 s, so the other four take 40 s. Nothing is said before anything is done, or when all is."""
    now, sent = clock
    with StageProgress("adapt", "x", start=4, total=10) as progress:
        now[0] += 20
        progress.reach(6)
        progress.reach(10)
    assert sent == [(40.0, "4 of 10 units"), (60.0, "6 of 10 units, 40 s left"), (100.0, "10 of 10 units")]


@pytest.mark.parametrize(("seconds", "told"), [(80, "80 s"), (100, "2 min"), (3600, "60 min"), (9000, "2.5 h")])
def test_who_knows_better_says_what_is_left(clock, seconds, told):
    _, sent = clock
    with StageProgress("train", "x", start=0, total=10, what="steps") as progress:
        progress.reach(1, note="loss 1", seconds_left=seconds)
    assert sent[-1] == (10.0, f"1 of 10 steps, loss 1, {told} left")


def test_plain_lines_say_it_too(clock, capsys):
    now, _ = clock
    with StageProgress("train", "x", start=0, total=4, what="steps") as progress:
        now[0] += 11
        progress.reach(1, note="loss 1")
    assert capsys.readouterr().err.splitlines()[0] == "train x: 1 of 4 steps, loss 1 in 11 s, 33 s left"
