"""What a user is told of a precision that the processor computes slowly."""

import time

import pytest
import torch

from selfcascade.config import ComputeSettings
from selfcascade.generation import precision
from selfcascade.generation.generate import generate_unit, part_of, plan_generation
from selfcascade.generation.precision import slowdown, warn_of_slow_precision

CPU = torch.device("cpu")


@pytest.fixture
def probed(monkeypatch):
    """A processor on which the probe takes so many times as long as in float32."""

    def build(**slower):
        monkeypatch.setattr(precision, "slowdown", lambda dtype: slower[dtype])

    return build


def test_the_probe_is_a_ratio_of_times(monkeypatch):
    """Of the same call in both precisions, whose times are known here: a real convolution takes what the processor makes of it."""
    seconds = {torch.float32: 0.01, torch.bfloat16: 0.05}

    def slow(picture, weight, padding):
        until = time.thread_time() + seconds[picture.dtype]
        while time.thread_time() < until:
            pass
        return picture

    monkeypatch.setattr(precision, "conv2d", slow)
    slowdown.cache_clear()
    try:
        assert 2 < slowdown("bfloat16") < 8
    finally:
        slowdown.cache_clear()


def test_it_is_measured_once_and_leaves_torchs_generator_alone():
    before = torch.random.get_rng_state()
    slowdown.cache_clear()
    assert slowdown("bfloat16") == slowdown("bfloat16") > 0
    assert slowdown.cache_info().misses == 1
    assert torch.equal(torch.random.get_rng_state(), before)


def test_only_a_cpu_that_is_slow_is_warned_of(probed, caplog):
    probed(bfloat16=2.04, float16=1.1)
    with caplog.at_level("WARNING"):
        warn_of_slow_precision("generation.compute.dtype", "bfloat16", torch.device("cuda"))
        warn_of_slow_precision("generation.compute.dtype", "float32", CPU)
        warn_of_slow_precision("generation.compute.dtype", "float16", CPU)
        assert not caplog.records
        warn_of_slow_precision("generation.compute.dtype", "bfloat16", CPU)
    assert caplog.messages == ["generation.compute.dtype=bfloat16 is 2.0 times slower than float32 on this CPU; set it to float32, or use a GPU"]


def test_generation_is_warned_of_once_a_run(store, generation, probed, caplog):
    """Two units, one line, before the first picture is made."""
    probed(bfloat16=3.0)
    slow = generation.model_copy(update={"compute": ComputeSettings(dtype="bfloat16")})
    plan = plan_generation(slow, store)
    with caplog.at_level("WARNING"):
        for index in plan.todo:
            generate_unit(slow, store, part_of(slow, store, plan, [index]), index, "cpu")
    assert len(plan.todo) == 2
    assert caplog.messages.count("generation.compute.dtype=bfloat16 is 3.0 times slower than float32 on this CPU; set it to float32, or use a GPU") == 1
