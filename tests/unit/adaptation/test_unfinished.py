from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_run import tiny_settings

from selfcascade.adaptation.adapt import adapt, plan_adaptation
from selfcascade.adaptation.checkpoint import newest_step
from selfcascade.adaptation.training_run import TrainingStep
from selfcascade.adaptation.unfinished import differences
from selfcascade.config import AdaptationSettings, UpsamplerSettings
from selfcascade.settings import SettingsError
from selfcascade.storage import Store


def interrupted(settings: AdaptationSettings, store: Store, *, at: int = 2) -> str:
    """A run that is left at a step; its version."""

    def progress(reached: TrainingStep) -> None:
        if reached.step >= at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapt(settings, store, progress=progress)
    version = plan_adaptation(settings, store).ref.version
    assert newest_step(store, version) == at
    return version


@pytest.fixture
def c(tiny_base: Path) -> AdaptationSettings:
    return tiny_settings(tiny_base, upsampler=UpsamplerSettings(variant="C"), name="changed")


def test_a_resumed_run_whose_settings_changed_is_refused(fresh: Callable[[], Store], c: AdaptationSettings) -> None:
    """In one line that names the run, its step, every key that differs and no other; nothing is written, and with its own settings the run goes on."""
    store = fresh()
    version = interrupted(c, store)
    changed = c.model_copy(
        update={"lr": 3e-3, "snr_gamma": 5.0, "upsampler": UpsamplerSettings(variant="C", shared=True), "checkpoint_steps": 1, "log_steps": 2}
    )
    before = {info.key for info in store.list("")}
    with pytest.raises(SettingsError) as refused:
        plan_adaptation(changed, store)
    assert str(refused.value) == (
        f"upsamplers/changed@{version[:12]} is at step 2 of 6 and was begun with other settings: lr 0.01 there, 0.003 here, "
        "and snr_gamma unset there, 5.0 here, and upsampler.shared False there, True here; go on with those of that run, "
        "set adaptation.name to train beside it, or adaptation.restart=true to give it up and delete its checkpoints"
    )
    assert {info.key for info in store.list("")} == before
    done: list[int] = []
    adapt(c, store, progress=lambda reached: done.append(reached.step))
    assert done == [3, 4, 5, 6]


def test_inputs_and_missing_settings_are_differences() -> None:
    """Equal settings on data that was curated anew would begin at step 0 too; a setting may be one that the earlier run did not know."""
    assert differences({"lr": 1, "dataset": "ab"}, {"lr": 1, "dataset": "cd"}) == "dataset ab there, cd here"
    assert differences({"lr": 1}, {"lr": 1, "later": 2}) == "later unset there, 2 here"


def test_another_name_trains_beside_it_and_a_restart_gives_it_up(fresh: Callable[[], Store], c: AdaptationSettings) -> None:
    """Under another name nothing is asked and the checkpoints stay; a restart deletes them when it trains, not when it is planned, and ends."""
    store = fresh()
    version = interrupted(c, store)
    changed = c.model_copy(update={"lr": 3e-3})
    adapt(changed.model_copy(update={"name": "beside"}), store)
    restarted = changed.model_copy(update={"restart": True})
    assert plan_adaptation(restarted, store).step == 0
    assert newest_step(store, version) == 2
    assert adapt(restarted, store).version == plan_adaptation(changed, store).ref.version
    assert list(store.list("cache/checkpoints/")) == []
    assert plan_adaptation(c, store).step == 0


def test_a_run_that_ended_is_in_nobodys_way(fresh: Callable[[], Store], c: AdaptationSettings) -> None:
    """Published, or left before its first checkpoint, it does not stop a run with other settings."""
    store = fresh()
    adapt(c, store)
    changed = c.model_copy(update={"lr": 3e-3, "checkpoint_steps": 100})
    with pytest.raises(ZeroDivisionError):
        adapt(changed, store, progress=lambda reached: 1 // 0)
    store.delete([info.key for info in store.list("cache/checkpoints/") if "/step-" in info.key])
    adapt(c.model_copy(update={"lr": 2e-3}), store)


def test_two_unfinished_runs_both_go_on(fresh: Callable[[], Store], c: AdaptationSettings) -> None:
    """A run with a checkpoint of its own goes on, whatever lies beside it."""
    store = fresh()
    interrupted(c, store)
    kept = {info.key: store.read(info.key) for info in store.list("cache/checkpoints/")}
    other = c.model_copy(update={"lr": 3e-3})
    interrupted(other.model_copy(update={"restart": True}), store)
    for key, data in kept.items():
        store.put_cache(key, data)
    assert plan_adaptation(c, store).step == plan_adaptation(other, store).step == 2
    with pytest.raises(SettingsError, match="at step 2 of 6"):
        plan_adaptation(c.model_copy(update={"seed": 9}), store)
