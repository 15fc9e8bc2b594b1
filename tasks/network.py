"""How a Prefect task tries again: only what may pass by itself, later each time, and not all tasks at the same moment."""

from __future__ import annotations

import logging
from typing import Any, TypedDict

from prefect.cache_policies import NO_CACHE
from prefect.client.schemas import TaskRun
from prefect.client.schemas.objects import State
from prefect.tasks import Task, exponential_backoff

from selfcascade.storage import StoreError
from selfcascade_tasks.logs import say


class Retrying(TypedDict):
    """Keyword arguments of ``prefect.task``."""

    retries: int
    retry_delay_seconds: Any
    retry_jitter_factor: float
    retry_condition_fn: Any
    cache_policy: Any
    persist_result: bool


def may_pass(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether the failure in ``state`` is of a kind that passes: a store that does not answer, a broken connection. Says so when there is another try."""
    try:
        state.result()
    except (ConnectionError, TimeoutError, StoreError) as error:
        passing = not isinstance(error, StoreError) or error.transient
        if passing:
            say(f"{run.name}: {error}; trying again", logging.WARNING)
        return passing
    except BaseException:
        return False
    return False


NETWORK = Retrying(
    retries=3,
    retry_delay_seconds=exponential_backoff(backoff_factor=2),
    retry_jitter_factor=0.5,
    retry_condition_fn=may_pass,
    cache_policy=NO_CACHE,
    persist_result=False,
)
"""For tasks that talk to the store. State lives there, never in Prefect: no cache, no stored results."""
