"""Generation: from prompts and one method to samples."""

from __future__ import annotations

from prefect import flow

from selfcascade.config import ExecutionSettings, GenerationSettings, StoreSettings
from selfcascade.storage import ArtifactRef
from selfcascade_tasks import generate as tasks
from selfcascade_tasks.artifacts import counts_rows, show_table
from selfcascade_tasks.stage import counts_of, running


@flow(name="generate", flow_run_name="{settings.name}", validate_parameters=True)
def generate(settings: GenerationSettings, store: StoreSettings = StoreSettings(), execution: ExecutionSettings = ExecutionSettings()) -> ArtifactRef:
    """Sample every prompt of ``settings.prompts`` by ``settings.method`` and publish the pictures as one artifact."""
    plan = tasks.plan(settings, store)
    with running("generate", plan, store, execution, method=settings.method) as run:
        if not plan.published:
            run.wait(tasks.sample_chunks.submit(part, settings, store, execution) for part in tasks.parts(settings, store, plan, execution))
            tasks.publish(settings, store, plan)
    tasks.show(plan.ref, store)
    show_table("generate", settings.name, counts_rows(plan.ref, counts_of(plan, store)), title=f"Counts of {plan.ref}")
    return plan.ref
