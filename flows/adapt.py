"""Adaptation: from a dataset and a frozen base to a trained upsampler."""

from __future__ import annotations

from prefect import flow

from selfcascade.config import AdaptationSettings, ExecutionSettings, StoreSettings
from selfcascade.storage import ArtifactRef
from selfcascade_tasks import adapt as tasks
from selfcascade_tasks.artifacts import counts_rows, show_table
from selfcascade_tasks.stage import counts_of, running


@flow(name="adapt", flow_run_name="{settings.name}", validate_parameters=True)
def adapt(settings: AdaptationSettings, store: StoreSettings = StoreSettings(), execution: ExecutionSettings = ExecutionSettings()) -> ArtifactRef:
    """Train the upsampler of ``settings`` on its dataset and publish it."""
    plan = tasks.plan(settings, store, execution)
    with running("adapt", plan, store, execution) as run:
        if not plan.published:
            run.wait(tasks.encode_shard.submit(index, settings, store, plan, execution) for index in plan.shards_todo)
            if plan.training_todo:
                run.wait([tasks.train.submit(settings, store, plan, execution)])
            tasks.publish(settings, store, plan, execution)
    tasks.show(plan.ref, store)
    show_table("adapt", settings.name, counts_rows(plan.ref, counts_of(plan, store)), title=f"Counts of {plan.ref}")
    return plan.ref
