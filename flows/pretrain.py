"""Pretraining: from a dataset to a small base."""

from __future__ import annotations

from prefect import flow

from selfcascade.config import ExecutionSettings, PretrainingSettings, StoreSettings
from selfcascade.storage import ArtifactRef
from selfcascade_tasks import pretrain as tasks
from selfcascade_tasks.artifacts import counts_rows, show_table
from selfcascade_tasks.stage import counts_of, running


@flow(name="pretrain", flow_run_name="{settings.name}", validate_parameters=True)
def pretrain(settings: PretrainingSettings, store: StoreSettings = StoreSettings(), execution: ExecutionSettings = ExecutionSettings()) -> ArtifactRef:
    """Train autoencoder, text encoder and UNet of a small base on a dataset and publish it as a diffusers folder."""
    plan = tasks.plan(settings, store, execution)
    with running("pretrain", plan, store, execution) as run:
        if not plan.published:
            run.wait([tasks.train.submit(settings, store, plan, execution)])
            tasks.publish(settings, store, plan)
    show_table("pretrain", settings.name, counts_rows(plan.ref, counts_of(plan, store)), title=f"Counts of {plan.ref}")
    return plan.ref
