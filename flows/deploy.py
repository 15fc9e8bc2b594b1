"""`selfcascade deploy`: bring a Prefect server to what a file says, and show what that changes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from selfcascade.settings import SettingsError, canonical_json
from selfcascade_flows.desired import Automation, Deployment, Desired, Pool, Queue, read
from selfcascade_flows.server import PrefectServer

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

FLOW = "scheduled"


@dataclass(frozen=True)
class Change:
    """One thing on the server, as it is and as it is to be."""

    kind: str
    name: str
    found: Mapping[str, Any] | None
    wanted: Mapping[str, Any]
    apply: Callable[[], object]
    missing: str = ""
    """What must be on the server before it can be there; it is then left out."""

    @property
    def state(self) -> str:
        """``create``, ``update``, ``same`` or ``left out``."""
        if self.missing:
            return "left out"
        return "create" if self.found is None else "same" if canonical_json(self.found) == canonical_json(self.wanted) else "update"

    def lines(self) -> Iterator[str]:
        """What is told: the thing, and of an update each value that changes."""
        yield f"{self.state:9} {self.kind} {self.name}" + (f"  ({self.missing})" if self.missing else "")
        if self.state == "update":
            assert self.found is not None
            for name, value in self.wanted.items():
                if canonical_json(self.found[name]) != canonical_json(value):
                    yield f"            {name}: {_shown(self.found[name])} -> {_shown(value)}"


def deploy(path: Path | None, *, dry_run: bool) -> int:
    """Apply the file to the server of ``PREFECT_API_URL``, else to the local database that `selfcascade serve` and `make ui` use; print every change.

    Again, it changes nothing. What is on the server and not in the file is left alone.

    Raises:
        SettingsError: the file does not say what it must, or the server does not answer.
    """
    desired = read(path)
    with PrefectServer() as server:
        server.wait()
        from prefect import get_client

        with get_client(sync_client=True) as client:
            changed = 0
            for change in changes(client, desired):
                print("\n".join(change.lines()))
                if change.state in ("create", "update"):
                    changed += 1
                    if not dry_run:
                        change.apply()
    print(f"{changed} to change; nothing was changed" if dry_run else f"{changed} changed")
    return 0


def changes(client: SyncPrefectClient, desired: Desired) -> Iterator[Change]:
    """Everything that the file holds, in an order in which it can be applied one by one."""
    yield _block_type(client)
    for pool in desired.work_pools:
        yield _pool(client, pool)
        yield from (_queue(client, pool, queue) for queue in pool.queues)
    for deployment in desired.deployments:
        yield _deployment(client, deployment)
    for automation in desired.automations:
        yield _automation(client, automation, {f"{FLOW}/{deployment.name}" for deployment in desired.deployments})


def _block_type(client: SyncPrefectClient) -> Change:
    """The block with a store's keys: its type alone; who has the keys makes the block."""
    from prefect.exceptions import ObjectNotFound

    from selfcascade_flows.store_access import StoreAccess

    slug, wanted = StoreAccess.get_block_type_slug(), {"schema": StoreAccess._calculate_schema_checksum()}
    found = None
    with contextlib.suppress(ObjectNotFound):
        found = {"schema": client.read_block_schema_by_checksum(wanted["schema"]).checksum}
    return Change("block type", slug, found, wanted, StoreAccess.register_type_and_schema)


def _pool(client: SyncPrefectClient, pool: Pool) -> Change:
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound

    wanted: dict[str, Any] = {"type": pool.type, "description": pool.description, "concurrency_limit": pool.concurrency_limit}
    try:
        there = client.read_work_pool(pool.name)
    except ObjectNotFound:
        return Change("work pool", pool.name, None, wanted, lambda: client.create_work_pool(WorkPoolCreate(name=pool.name, **wanted)))
    if there.type != pool.type:
        raise SettingsError(
            f"work pool {pool.name!r} is of type {there.type!r} on this server, the file says {pool.type!r}; name another pool, or delete that one"
        )
    found = {"type": there.type, "description": there.description, "concurrency_limit": there.concurrency_limit}
    update = WorkPoolUpdate(description=pool.description, concurrency_limit=pool.concurrency_limit)
    return Change("work pool", pool.name, found, wanted, lambda: client.update_work_pool(pool.name, update))


def _queue(client: SyncPrefectClient, pool: Pool, queue: Queue) -> Change:
    from prefect.exceptions import ObjectNotFound

    wanted: dict[str, Any] = {"concurrency_limit": queue.concurrency_limit} | ({} if queue.priority is None else {"priority": queue.priority})
    name = f"{pool.name}/{queue.name}"
    try:
        there = client.read_work_queue_by_name(queue.name, work_pool_name=pool.name)
    except ObjectNotFound:
        return Change("work queue", name, None, wanted, lambda: client.create_work_queue(queue.name, work_pool_name=pool.name, **wanted))
    found = {key: getattr(there, key) for key in wanted}
    return Change("work queue", name, found, wanted, lambda: client.update_work_queue(there.id, **wanted))


def _deployment(client: SyncPrefectClient, deployment: Deployment) -> Change:
    from prefect.exceptions import ObjectNotFound

    limit = deployment.concurrency_limit
    wanted: dict[str, Any] = {
        "description": deployment.description,
        "entrypoint": deployment.entrypoint,
        "parameters": deployment.parameters.model_dump(mode="json"),
        "tags": sorted(deployment.tags),
        "work_pool": deployment.work_pool.name,
        "work_queue": deployment.work_pool.work_queue_name or "default",
        "job_variables": deployment.work_pool.job_variables,
        "schedules": sorted((schedule.model_dump() for schedule in deployment.schedules), key=canonical_json),
        "concurrency_limit": None if limit is None else limit.model_dump(),
        "form": _form(),
    }
    name = f"{FLOW}/{deployment.name}"
    try:
        there = client.read_deployment_by_name(name)
    except ObjectNotFound:
        return Change("deployment", name, None, wanted, lambda: _create(client, deployment, wanted))
    slots, strategy = there.global_concurrency_limit, there.concurrency_options
    found: dict[str, Any] = {
        "description": there.description or "",
        "entrypoint": there.entrypoint,
        "parameters": there.parameters,
        "tags": sorted(there.tags),
        "work_pool": there.work_pool_name,
        "work_queue": there.work_queue_name,
        "job_variables": there.job_variables or {},
        "schedules": sorted((_schedule(schedule.schedule, active=schedule.active) for schedule in there.schedules), key=canonical_json),
        "concurrency_limit": slots and {"limit": slots.limit, "collision_strategy": strategy.collision_strategy.value if strategy else "ENQUEUE"},
        "form": there.parameter_openapi_schema,
    }
    return Change("deployment", name, found, wanted, lambda: _create(client, deployment, wanted))


def _schedule(schedule: Any, *, active: bool) -> dict[str, Any]:
    """A schedule of the server's as the file would have it; of another kind than cron, in words that no file has."""
    if not hasattr(schedule, "cron"):
        return {"cron": str(schedule), "timezone": "", "active": active}
    return {"cron": schedule.cron, "timezone": schedule.timezone or "Etc/UTC", "active": active}


def _create(client: SyncPrefectClient, deployment: Deployment, wanted: Mapping[str, Any]) -> UUID:
    """Create the deployment, or put it in place of the one that there is."""
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.objects import ConcurrencyOptions
    from prefect.client.schemas.schedules import CronSchedule

    limit = deployment.concurrency_limit
    made = client.create_deployment(
        flow_id=client.create_flow_from_name(FLOW),
        name=deployment.name,
        description=deployment.description,
        entrypoint=deployment.entrypoint,
        parameters=wanted["parameters"],
        parameter_openapi_schema=wanted["form"],
        enforce_parameter_schema=True,
        tags=list(deployment.tags),
        work_pool_name=deployment.work_pool.name,
        work_queue_name=wanted["work_queue"],
        job_variables=deployment.work_pool.job_variables,
        concurrency_limit=None if limit is None else limit.limit,
        concurrency_options=None if limit is None else ConcurrencyOptions(collision_strategy=limit.collision_strategy),
        schedules=[
            DeploymentScheduleCreate(schedule=CronSchedule(cron=schedule.cron, timezone=schedule.timezone), active=schedule.active)
            for schedule in deployment.schedules
        ],
    )
    if not deployment.schedules:  # the server keeps those that there are when it is given none
        for schedule in client.read_deployment_schedules(made):
            client.delete_deployment_schedule(made, schedule.id)
    return made


def _form() -> dict[str, Any]:
    from prefect.utilities.callables import parameter_schema

    from selfcascade_flows.scheduled import scheduled

    return parameter_schema(scheduled).model_dump_for_openapi()


def _automation(client: SyncPrefectClient, automation: Automation, deployments: set[str]) -> Change:
    from prefect.events.schemas.automations import AutomationCore

    actions, missing = [], ""
    for action in automation.actions:
        resolved, lacks = _resolved(client, dict(action), deployments)
        actions.append(resolved)
        missing = missing or lacks
    there = client.read_automations_by_name(automation.name)
    wanted = {"description": automation.description, "enabled": automation.enabled, "trigger": automation.trigger, "actions": actions}
    if missing:
        return Change("automation", automation.name, None, wanted, lambda: None, missing)
    unknown = [action for action in actions if action.get("deployment_id", "") is None]
    core = None if unknown else AutomationCore.model_validate({"name": automation.name, **wanted})
    if core is not None:
        wanted = _plain(core)
    if not there:
        return Change("automation", automation.name, None, wanted, lambda: client.create_automation(_known(core)))
    found = _plain(there[0])
    return Change("automation", automation.name, found, wanted, lambda: client.update_automation(there[0].id, _known(core)))


def _plain(automation: Any) -> dict[str, Any]:
    """What of an automation can be compared; sets of events, which Prefect writes in any order, in one."""
    plain: dict[str, Any] = automation.model_dump(mode="json", include={"description", "enabled", "trigger", "actions"})
    trigger = {name: value for name, value in plain["trigger"].items() if name != "id"}
    return plain | {"trigger": {name: sorted(value) if name in ("after", "expect", "for_each") else value for name, value in trigger.items()}}


def _known(core: Any) -> Any:
    assert core is not None  # its deployments were applied before it
    return core


def _resolved(client: SyncPrefectClient, action: dict[str, Any], deployments: set[str]) -> tuple[dict[str, Any], str]:
    """An action with ids in place of names, and what of it the server lacks. The id of a deployment that is yet to be made is None."""
    from prefect.exceptions import ObjectNotFound

    if (name := action.pop("deployment", None)) is not None:
        try:
            action |= {"source": "selected", "deployment_id": str(client.read_deployment_by_name(name).id)}
        except ObjectNotFound:
            if name not in deployments:
                raise SettingsError(f"an automation starts deployment {name!r}, which is neither in the file nor on the server") from None
            action |= {"source": "selected", "deployment_id": None}
    if (name := action.pop("block", None)) is not None:
        kind, _, document = str(name).partition("/")
        try:
            action["block_document_id"] = str(client.read_block_document_by_name(document, kind).id)
        except ObjectNotFound:
            return action, f"there is no block {name} on this server"
    return action, ""


def _shown(value: Any) -> str:
    text = canonical_json(value).decode()
    return text if len(text) <= 200 else text[:197] + "..."
