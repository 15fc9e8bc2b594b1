"""What a Prefect server is to hold, as `infra/prefect.yaml` says it: pools with queues, deployments, automations."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from selfcascade.settings import SettingsError
from selfcascade_flows.stages import Stage

SHIPPED = "selfcascade_infra"
"""Package that holds the shipped file, next to which nothing of it is code."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Queue(_Part):
    """A work queue of a pool."""

    name: str
    concurrency_limit: int | None = Field(None, ge=0)
    priority: int | None = Field(None, ge=1)


class Pool(_Part):
    """A work pool. Its job template is the type's own unless someone changed it in the UI, which stays."""

    name: str
    type: str = "process"
    description: str | None = None
    concurrency_limit: int | None = Field(None, ge=0)
    queues: tuple[Queue, ...] = ()


class Place(_Part):
    """Where the runs of a deployment wait."""

    name: str
    work_queue_name: str | None = None
    job_variables: dict[str, Any] = {}


class Schedule(_Part):
    """A cron schedule in a time zone."""

    cron: str
    timezone: str = "Etc/UTC"
    active: bool = True


class Limit(_Part):
    """Runs of a deployment side by side."""

    limit: int = Field(ge=1)
    collision_strategy: Literal["ENQUEUE", "CANCEL_NEW"] = "ENQUEUE"


class Parameters(_Part):
    """Those of the flow ``scheduled``."""

    stage: Stage = "run"
    config: str
    overrides: tuple[str, ...] = ()
    store: str | None = None


class Deployment(_Part):
    """A deployment of the flow ``scheduled``."""

    name: str
    description: str = ""
    entrypoint: Literal["selfcascade_flows.scheduled.scheduled"] = "selfcascade_flows.scheduled.scheduled"
    parameters: Parameters
    tags: tuple[str, ...] = ("selfcascade",)
    work_pool: Place
    schedules: tuple[Schedule, ...] = ()
    concurrency_limit: Limit | None = None


class Automation(_Part):
    """An automation. ``block`` and ``deployment`` of an action are names, which the server knows by an id."""

    name: str
    description: str = ""
    enabled: bool = True
    trigger: dict[str, Any]
    actions: tuple[dict[str, Any], ...]


class Desired(_Part):
    """The whole file."""

    name: str = "selfcascade"
    work_pools: tuple[Pool, ...] = ()
    deployments: tuple[Deployment, ...] = ()
    automations: tuple[Automation, ...] = ()


def read(path: Path | None) -> Desired:
    """The file at ``path``, or the shipped one.

    Raises:
        SettingsError: it is missing, no such file of ours, or names a configuration that there is not; says where.
    """
    where = files(SHIPPED).joinpath("prefect.yaml") if path is None else path
    try:
        found = Desired.model_validate(yaml.safe_load(where.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise SettingsError(f"--file {path} does not exist") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise SettingsError(f"{where}: {_first(error)}") from None
    for deployment in found.deployments:
        _check(deployment, str(where))
    return found


def _check(deployment: Deployment, where: str) -> None:
    """Whatever would fail in the night fails here: the run's settings, and the schedules."""
    from prefect.client.schemas.schedules import CronSchedule

    from selfcascade_flows.configuration import load

    try:
        load(deployment.parameters.config, list(deployment.parameters.overrides))
        for schedule in deployment.schedules:
            CronSchedule(cron=schedule.cron, timezone=schedule.timezone)
    except ValidationError as error:
        raise SettingsError(f"{where}: deployment {deployment.name!r}: schedule {_first(error)}") from None
    except SettingsError as error:
        raise SettingsError(f"{where}: deployment {deployment.name!r}: {error}") from None


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or '(whole)'}: {first['msg'].removeprefix('Value error, ')}"
