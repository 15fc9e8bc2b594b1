"""Evaluation: from real pictures and samples to a report."""

from __future__ import annotations

from prefect import flow

from selfcascade.config import EvaluationSettings, ExecutionSettings, StoreSettings
from selfcascade.storage import ArtifactRef
from selfcascade_tasks import evaluate as tasks
from selfcascade_tasks.stage import running


@flow(name="evaluate", flow_run_name="{settings.name}", validate_parameters=True)
def evaluate(
    settings: EvaluationSettings,
    samples: dict[str, str],
    store: StoreSettings = StoreSettings(),
    execution: ExecutionSettings = ExecutionSettings(),
) -> ArtifactRef:
    """Measure ``samples``, artifacts by label, against the real pictures of ``settings.dataset`` and publish the report; then hold it against another."""
    plan = tasks.plan(settings, samples, store, execution)
    before = tasks.before(settings, store, plan)
    with running("evaluate", plan, store, execution) as run:
        if not plan.published:
            run.wait(tasks.features.submit(index, settings, store, plan, execution) for index in plan.todo)
            tasks.publish(settings, store, plan, execution)
    tasks.show(plan.ref, store)
    if before is not None:
        tasks.gate(settings, store, before, plan.ref)
    return plan.ref
