"""Evaluation as Prefect tasks: find what is compared, pass one set of pictures through the network, commit the report, show it.

Each imports what measures when it runs, and torch with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect import task

from selfcascade.config import EvaluationSettings, ExecutionSettings, StoreSettings
from selfcascade.storage import Artifact, ArtifactRef
from selfcascade_tasks.artifacts import show_link, show_sheet, show_table
from selfcascade_tasks.network import NETWORK
from selfcascade_tasks.record import UnitCost, run_id
from selfcascade_tasks.store import opened
from selfcascade_tasks.workers import workers

if TYPE_CHECKING:
    from selfcascade.evaluation.evaluate import EvaluationPlan
    from selfcascade.evaluation.results import Results


@task(name="plan-report", task_run_name="plan {settings.name}", tags=["evaluate"], **NETWORK)
def plan(settings: EvaluationSettings, samples: dict[str, str], store: StoreSettings, execution: ExecutionSettings) -> EvaluationPlan:
    """The address of the report and the sets of pictures whose features are not cached."""
    from selfcascade.evaluation.evaluate import plan_evaluation
    from selfcascade.generation.models import resolve_device

    return plan_evaluation(settings, opened(store), settings.dataset, samples, device=str(resolve_device(execution.device)))


@task(name="features", task_run_name="features of set {index}", tags=["evaluate"], **NETWORK)
def features(index: int, settings: EvaluationSettings, store: StoreSettings, plan: EvaluationPlan, execution: ExecutionSettings) -> UnitCost:
    """One pass of the feature network over one set of pictures, in a worker process."""
    from selfcascade.evaluation.evaluate import evaluate_unit

    measured = workers(execution).run(evaluate_unit, settings, opened(store), plan, index, tries=execution.retries + 1, unit=index)
    return UnitCost.of(index, measured, measured.value, pictures=measured.value)


@task(name="publish-report", task_run_name="publish {settings.name}", tags=["evaluate"], **NETWORK)
def publish(settings: EvaluationSettings, store: StoreSettings, plan: EvaluationPlan, execution: ExecutionSettings) -> ArtifactRef:
    """Compute every number and commit the report, in a worker process."""
    from selfcascade.evaluation.evaluate import publish_evaluation

    return workers(execution).run(publish_evaluation, settings, opened(store), plan, tries=execution.retries + 1).value


@task(name="find-report-before", task_run_name="find what {settings.name} is held against", tags=["evaluate"], **NETWORK)
def before(settings: EvaluationSettings, store: StoreSettings, plan: EvaluationPlan) -> ArtifactRef | None:
    """The report that the gate compares with, if there is one."""
    from selfcascade.evaluation.evaluate import gate_of

    return gate_of(settings, opened(store), plan.ref)


@task(name="gate", task_run_name="hold {ref.name} against {before.name}", tags=["evaluate"])
def gate(settings: EvaluationSettings, store: StoreSettings, before: ArtifactRef, ref: ArtifactRef) -> None:
    """Fail where the report is worse than the one before."""
    from selfcascade.evaluation.gate import check_gate
    from selfcascade.evaluation.published import read_results

    held = opened(store)
    check_gate(settings.gate, read_results(held, before), read_results(held, ref))


@task(name="show-report", task_run_name="show {ref.name}", tags=["evaluate"], **NETWORK)
def show(ref: ArtifactRef, store: StoreSettings) -> None:
    """Table and contact sheet in the UI, and the page with the times of this run under ``runs/``, with a link to it."""
    from selfcascade.evaluation.evaluate import SHEET, timed_report
    from selfcascade.evaluation.published import read_results
    from selfcascade_tasks.times import times_of

    held = opened(store)
    results = read_results(held, ref)
    show_table("evaluate", ref.name, table_rows(results), title=f"Results of {ref}")
    prompts = [row.prompt for row in results.sheet]
    show_sheet("evaluate", ref.name, Artifact(held, ref).read(SHEET), title=f"The same prompts by every method, {ref}", captions=prompts)
    page = page_key(run_id())
    held.put_cache(page, timed_report(held, ref, times_of(held, ref, results)).encode())
    show_link("evaluate", ref.name, held, page, text=f"Report {ref.name}")


def page_key(run: str) -> str:
    """Where the page of a run lies: it tells times, so it is no part of the artifact."""
    return f"runs/{run}.html"


def table_rows(results: Results) -> list[dict[str, str]]:
    """The main table on its side, so that it fits the page: a row for each metric, a column for each method, with standard errors."""
    from selfcascade.evaluation.report import heading, shown_number

    rows = [{"metric": heading(metric)} for metric in results.metrics]
    for method in results.shown():
        for row, metric in zip(rows, results.metrics, strict=True):
            number = method.numbers[metric.name]
            error = "" if number.error is None else f" ± {shown_number(number.error, metric)}"
            row[method.label] = "–" if number.value is None else shown_number(number.value, metric) + error
    return rows
