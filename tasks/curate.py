"""Curation as Prefect tasks: list the source, make one shard, commit the dataset."""

from __future__ import annotations

from prefect import task

from selfcascade.config import CurationSettings, ExecutionSettings, StoreSettings
from selfcascade.curation.curate import CurationPlan, curate_unit, plan_curation, publish_curation, stage_listing
from selfcascade.storage import ArtifactRef
from selfcascade_tasks.network import NETWORK
from selfcascade_tasks.record import UnitCost
from selfcascade_tasks.store import opened
from selfcascade_tasks.workers import workers


@task(name="plan-dataset", task_run_name="list the source of {settings.name}", tags=["curate"], **NETWORK)
def plan(settings: CurationSettings, store: StoreSettings) -> CurationPlan:
    """The address of the dataset and the shards that are not in the store."""
    return plan_curation(settings, opened(store))


@task(name="stage-listing", task_run_name="stage the listing of {settings.name}", tags=["curate"], **NETWORK)
def stage(settings: CurationSettings, store: StoreSettings, plan: CurationPlan) -> None:
    """Leave each remaining shard its slice of the listing."""
    stage_listing(settings, opened(store), plan)


@task(name="curate-shard", task_run_name="shard {index} of {settings.name}", tags=["curate"], **NETWORK)
def curate_shard(index: int, settings: CurationSettings, store: StoreSettings, plan: CurationPlan, execution: ExecutionSettings) -> UnitCost:
    """Decode, filter and store one shard in a worker process."""
    measured = workers(execution).run(curate_unit, settings, opened(store), plan, index, tries=execution.retries + 1, unit=index)
    return UnitCost.of(index, measured, measured.value["inputs"], pictures=measured.value["kept"])


@task(name="publish-dataset", task_run_name="publish {settings.name}", tags=["curate"], **NETWORK)
def publish(settings: CurationSettings, store: StoreSettings, plan: CurationPlan) -> ArtifactRef:
    """Commit the dataset."""
    return publish_curation(settings, opened(store), plan)
