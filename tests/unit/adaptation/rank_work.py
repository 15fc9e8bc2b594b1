"""What ranks are given to do where only their group is tested: without networks, which each would import anew."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch

from selfcascade.adaptation.rank_group import RankGroup, RankLine
from selfcascade.adaptation.ranks import Ranks
from selfcascade.settings import SettingsError


def group(heard: Callable[[RankLine], None] = lambda line: None) -> RankGroup:
    return RankGroup(2, torch.device("cpu"), heard=heard)


def told(*, ranks: Ranks, progress: Callable[[Any], None]) -> int:
    """Tells its rank, writes a line, and returns what all agree on."""
    progress(ranks.rank)
    print(f"hello from {ranks.rank} of {ranks.count}")
    return int(ranks.total([10.0 + ranks.rank])[0])


def failing(kind: str, *, ranks: Ranks, progress: Callable[[Any], None]) -> None:
    """The second rank fails; the first waits for it meanwhile."""
    progress(os.getpid())
    if not ranks.first:
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise {"foreseen": SettingsError("set the other thing"), "passing": ConnectionResetError("the store went away")}.get(kind, ValueError("a defect"))
    ranks.total([0.0])


def waiting(*, ranks: Ranks, progress: Callable[[Any], None]) -> None:
    progress(os.getpid())
    time.sleep(600)
