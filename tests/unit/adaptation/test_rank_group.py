"""Processes that train together, really started by torchrun: what their parent hears of them, and how each way to fail ends all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from rank_work import failing, group, told
from test_adapt import bytes_of
from tiny_run import tiny_settings

from selfcascade.adaptation.adapt import adapt, plan_adaptation, train_upsampler
from selfcascade.adaptation.checkpoint import newest_step
from selfcascade.adaptation.preemption import Preempted
from selfcascade.adaptation.rank import RankFailed
from selfcascade.adaptation.rank_group import RankDied, RankLine
from selfcascade.config import AdaptationSettings, UpsamplerSettings
from selfcascade.settings import SettingsError
from selfcascade.storage import Store


def test_what_ranks_tell_write_and_return_is_heard() -> None:
    lines: list[RankLine] = []
    reached: list[int] = []
    assert group(lines.append).run(told, progress=reached.append) == 21
    assert sorted(reached) == [0, 1]
    assert {str(line) for line in lines} >= {"rank 0: hello from 0 of 2", "rank 1: hello from 1 of 2"}


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("foreseen", SettingsError, "^set the other thing$"),
        ("passing", ConnectionResetError, "^the store went away$"),
        ("defect", RankFailed, "^rank 1 of 2 failed: ValueError: a defect$"),
        ("killed", RankDied, "^rank 1 of 2 was ended from outside, most likely out of memory; lower adaptation.processes"),
    ],
)
def test_the_first_failure_is_told_and_nobody_is_left(kind: str, error: type[Exception], message: str) -> None:
    """What one rank met is raised here, not that the other then waited in vain; of a defect the traceback is heard."""
    lines: list[str] = []
    pids: list[int] = []
    with pytest.raises(error, match=message):
        group(lambda line: lines.append(str(line))).run(failing, kind, progress=pids.append)
    assert len(pids) == 2
    assert gone(pids, seconds=120)
    assert any(line.startswith("rank 1:") and "ValueError: a defect" in line for line in lines) is (kind == "defect")


PARENT = """
import sys
sys.path[:0] = sys.argv[1:]
from rank_work import group, waiting
group().run(waiting, progress=lambda pid: print(pid, flush=True))
"""


def test_ranks_do_not_outlive_a_parent_that_is_killed() -> None:
    here = [str(Path(__file__).parent), *sys.path]
    with subprocess.Popen([sys.executable, "-c", PARENT, *here], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(parent.stdout.readline()) for _ in range(2)]
        parent.kill()
    assert gone(pids, seconds=120)


def gone(pids: list[int], *, seconds: float) -> bool:
    """Whether all of them end in time."""
    processes = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(pid))
    return not psutil.wait_procs(processes, timeout=seconds)[1]


def together(base: Path, **changes: object) -> AdaptationSettings:
    common: dict[str, object] = {"processes": 2, "upsampler": UpsamplerSettings(variant="C"), "validation_steps": 3, "validation_samples": 2}
    return tiny_settings(base, **(common | changes))


@pytest.mark.parametrize(
    ("how", "what"),
    [("killed", "whole"), *(pytest.param(*case, marks=pytest.mark.full) for case in (("asked", "whole"), ("killed", "sharded"), ("asked", "sharded")))],
)
def test_two_processes_that_are_interrupted_publish_the_bytes_of_two_that_were_not(fresh: Callable[[], Store], tiny_base: Path, how: str, what: str) -> None:
    """A rank is killed, or the parent is asked to leave as by a machine that is taken away: the next run goes on, to the same weights, log and validations.

    So many steps before the next checkpoint and before the end that ranks do not come to it while this process waits for its turn on a loaded machine.
    """
    shards = {"trainable": "full", "sharded": True, "previews": 1} if what == "sharded" else {}
    settings = together(tiny_base, steps=24, checkpoint_steps=12, preview_steps=13, validation_steps=8, **shards)
    whole, disturbed = fresh(), fresh()
    adapt(settings, whole)
    plan = plan_adaptation(settings, disturbed)
    steps: list[int] = []

    def disturb(reached: Any) -> None:
        steps.append(reached.step)
        if reached.step == 13:
            commands = {each.pid: each.cmdline() for each in psutil.Process().children(recursive=True)}
            ranks = [pid for pid, words in commands.items() if "selfcascade.adaptation.rank" in words and "torch.distributed.run" not in words]
            os.kill(os.getpid() if how == "asked" else ranks[-1], signal.SIGTERM if how == "asked" else signal.SIGKILL)

    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        with pytest.raises(Preempted if how == "asked" else RankDied):
            train_upsampler(settings, disturbed, plan, progress=disturb)
    finally:
        signal.signal(signal.SIGTERM, before)
    reached = newest_step(disturbed, plan.ref.version)
    # Before a preview there is a checkpoint too.
    assert reached in {"whole": (12,), "sharded": (12, 13)}[what] if how == "killed" else 13 <= reached < 24
    adapt(settings, disturbed)
    assert bytes_of(disturbed, settings) == bytes_of(whole, settings)
