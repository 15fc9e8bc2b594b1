"""Half precisions on a CPU that computes them more slowly: the same pictures, later."""

from __future__ import annotations

import logging
import time
from functools import cache

import torch
from torch.nn.functional import conv2d

from selfcascade.config import Dtype
from selfcascade.generation.threads import torch_threads

log = logging.getLogger(__name__)

NOTICED = 1.25
"""Times slower than float32 from which on it is worth a word: below, it is the probe's own scatter."""
ROUNDS, ENOUGH = 5, 0.1
"""Rounds of the probe, and seconds after which it is content with fewer."""
CHANNELS, SIDE = 128, 32


def warn_of_slow_precision(setting: str, dtype: Dtype, device: torch.device) -> None:
    """Say, before anything runs, that networks in ``dtype`` will be slow on this device and what to set instead.

    Args:
        setting: what chose the precision, such as "generation.compute.dtype".
        dtype: of the networks.
        device: that they run on.
    """
    if device.type != "cpu" or dtype == "float32":
        return
    slower = slowdown(dtype)
    if slower >= NOTICED:
        log.warning("%s=%s is %.1f times slower than float32 on this CPU; set it to float32, or use a GPU", setting, dtype, slower)


@cache
def slowdown(dtype: Dtype) -> float:
    """Time of a convolution as UNets have them in ``dtype``, over its time in float32, on this CPU; measured once a process, in tens of milliseconds.

    Measured because no flag says it: of two x86 processors with AVX512-BF16 and without AMX one computed bfloat16 faster than float32, the other took half as
    long again; where oneDNN has no kernels at all, torch's own take up to a hundred times as long.
    """
    with torch_threads(1):
        return _seconds(getattr(torch, dtype)) / _seconds(torch.float32)


@torch.inference_mode()
def _seconds(dtype: torch.dtype) -> float:
    """Of this thread alone, the shortest of some rounds: what disturbs only adds."""
    weight, picture = torch.ones(CHANNELS, CHANNELS, 3, 3, dtype=dtype), torch.ones(2, CHANNELS, SIDE, SIDE, dtype=dtype)
    conv2d(picture, weight, padding=1)  # kernels are made the first time
    seconds: list[float] = []
    while len(seconds) < ROUNDS and sum(seconds) < ENOUGH:
        started = time.thread_time()
        conv2d(picture, weight, padding=1)
        seconds.append(time.thread_time() - started)
    return min(seconds)
