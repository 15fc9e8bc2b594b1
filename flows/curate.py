"""Curation: from a pile of pictures to a dataset."""

from __future__ import annotations

from prefect import flow

from selfcascade.config import CurationSettings, ExecutionSettings, StoreSettings
from selfcascade.storage import ArtifactRef
from selfcascade_tasks import curate as tasks
from selfcascade_tasks.artifacts import counts_rows, show_table
from selfcascade_tasks.stage import counts_of, running


@flow(name="curate", flow_run_name="{settings.name}", validate_parameters=True)
def curate(settings: CurationSettings, store: StoreSettings = StoreSettings(), execution: ExecutionSettings = ExecutionSettings()) -> ArtifactRef:
    """Decode, filter and split the pictures of ``settings.source`` and publish them as one dataset."""
    plan = tasks.plan(settings, store)
    with running("curate", plan, store, execution) as run:
        if not plan.published:
            tasks.stage(settings, store, plan)
            run.wait(tasks.curate_shard.submit(index, settings, store, plan, execution) for index in plan.todo)
            tasks.publish(settings, store, plan)
    show_table("curate", settings.name, counts_rows(plan.ref, counts_of(plan, store)), title=f"Counts of {plan.ref}")
    return plan.ref
