"""SIGTERM, as a machine that is taken away sends it, against a real process that trains."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from test_adapt import bytes_of
from tiny_run import tiny_settings

from selfcascade.adaptation.adapt import adapt, plan_adaptation
from selfcascade.adaptation.checkpoint import newest_step
from selfcascade.adaptation.preemption import Preempted, Preemption
from selfcascade.adaptation.trainer import Trainer
from selfcascade.adaptation.training_run import TrainingStep
from selfcascade.config import AdaptationSettings, UpsamplerSettings
from selfcascade.storage import Store

STEPS = 20
TRAINS = """
import json, sys
from selfcascade.adaptation.adapt import adapt
from selfcascade.config import AdaptationSettings, StoreSettings
from selfcascade.storage import Store

settings, store = json.loads(sys.argv[1])


def progress(reached):
    print(reached.step, flush=True)
    sys.stdin.readline()


adapt(AdaptationSettings(**settings), Store.open(StoreSettings(**store)), progress=progress)
"""


def rare(base: Path, **changes: object) -> AdaptationSettings:
    """A run whose only checkpoint by itself is the last."""
    common = {"steps": STEPS, "checkpoint_steps": 1000, "validation_steps": 3, "validation_samples": 2, "upsampler": UpsamplerSettings(variant="C")}
    return tiny_settings(base, **(common | changes))


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.full), pytest.param(2, marks=pytest.mark.full)])
def test_a_preempted_run_goes_on_from_the_very_step(fresh: Callable[[], Store], tiny_base: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """SIGTERM from outside at a random step: the process ends by it, a checkpoint holds its last step, and the next run takes the others, each once.

    What both published, weights, log and validations, has the bytes of an undisturbed run.
    """
    settings = rare(tiny_base, early_stop=5)
    whole, preempted = fresh(), fresh()
    adapt(settings, whole)
    moment = random.Random(seed).randrange(1, STEPS - 5)
    arguments = json.dumps([json.loads(settings.model_dump_json()), json.loads(preempted.settings.model_dump_json())])
    words, variables = [sys.executable, "-c", TRAINS, arguments], os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as run:
        assert run.stdin is not None
        assert run.stdout is not None
        seen = 0
        for line in run.stdout:
            seen = int(line)
            run.stdin.write("heard\n")  # each step waits for it, so that the signal comes within the next one and never too late
            if seen == moment:
                run.send_signal(signal.SIGTERM)
    assert run.returncode == -signal.SIGTERM
    reached = newest_step(preempted, plan_adaptation(settings, preempted).ref.version)
    assert moment <= seen <= reached < STEPS
    taken: list[int] = []
    advance = Trainer.advance
    monkeypatch.setattr(Trainer, "advance", lambda self: (advance(self), taken.append(self.step)))
    adapt(settings, preempted)
    assert taken == list(range(reached + 1, STEPS + 1))
    assert bytes_of(preempted, settings) == bytes_of(whole, settings)


def test_a_handler_of_the_users_own_is_called_and_the_run_says_where_it_is(fresh: Callable[[], Store], tiny_base: Path) -> None:
    """Where SIGTERM does not end the process: one line, the last step stored though no checkpoint and no validation was due, and the handler back."""
    store, settings, heard = fresh(), rare(tiny_base, steps=9), []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("mine"))
    try:
        handler = signal.getsignal(signal.SIGTERM)
        with pytest.raises(Preempted, match="training of tiny was asked to end at step 3 of 9; the same command goes on from there"):
            adapt(settings, store, progress=_signal_at(2))
        assert heard == ["mine"]
        assert signal.getsignal(signal.SIGTERM) is handler
        assert newest_step(store, plan_adaptation(settings, store).ref.version) == 3
        whole = fresh()
        adapt(settings, whole)
        adapt(settings, store)
        assert bytes_of(store, settings) == bytes_of(whole, settings)
    finally:
        signal.signal(signal.SIGTERM, before)


def _signal_at(step: int) -> Callable[[TrainingStep], None]:
    """Sends the signal in the midst of the step after ``step``."""

    def progress(reached: TrainingStep) -> None:
        if reached.step == step:
            advance = Trainer.advance

            def signalled(self: Trainer) -> None:
                Trainer.advance = advance  # type: ignore[method-assign]
                signal.raise_signal(signal.SIGTERM)
                advance(self)

            Trainer.advance = signalled  # type: ignore[method-assign]

    return progress


def test_other_threads_and_those_who_ignore_it_are_left_alone() -> None:
    """A thread cannot handle signals; what is ignored stays ignored."""
    handler = signal.getsignal(signal.SIGTERM)

    def enter() -> None:
        with Preemption() as preemption:
            assert not preemption.asked

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is handler
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with Preemption() as preemption:
            signal.raise_signal(signal.SIGTERM)
        assert not preemption.asked
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, handler)
