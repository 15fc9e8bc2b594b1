"""Only what may pass by itself is tried again."""

from types import SimpleNamespace

import pytest
from prefect.states import Failed

from selfcascade.settings import SettingsError
from selfcascade.storage import IntegrityError, NotFound, StoreDenied, StoreUnreachable
from selfcascade_tasks.network import NETWORK, may_pass
from selfcascade_tasks.workers import WorkerDied


@pytest.mark.parametrize("error", [StoreUnreachable("gone"), ConnectionResetError("reset"), TimeoutError("late")])
def test_the_network_may_come_back_and_the_wait_is_told(error, capsys):
    assert may_pass(None, SimpleNamespace(name="shard 3"), Failed(data=error))
    assert capsys.readouterr().err == f"shard 3: {error}; trying again\n"


@pytest.mark.parametrize(
    "error", [StoreDenied("key"), NotFound("no"), IntegrityError("bytes"), SettingsError("value"), WorkerDied("memory"), ValueError("bug"), MemoryError()]
)
def test_nothing_else_is_tried_again(error, capsys):
    assert not may_pass(None, SimpleNamespace(name="shard 3"), Failed(data=error))
    assert capsys.readouterr().err == ""


def test_waits_grow_and_differ():
    waits = NETWORK["retry_delay_seconds"](NETWORK["retries"])
    assert waits == sorted(waits)
    assert len(set(waits)) == len(waits)
    assert NETWORK["retry_jitter_factor"] > 0
