"""The whole way: curate, adapt, generate by every method, evaluate; pretrain first where the base does not exist."""

from __future__ import annotations

from prefect import flow

from selfcascade.config import PipelineSettings
from selfcascade.generation.inputs import check_method
from selfcascade.storage import ArtifactRef
from selfcascade_flows.adapt import adapt
from selfcascade_flows.curate import curate
from selfcascade_flows.evaluate import evaluate
from selfcascade_flows.generate import generate
from selfcascade_flows.pretrain import pretrain
from selfcascade_flows.variants import sampled_with, trainings, variants
from selfcascade_tasks.base import base_exists
from selfcascade_tasks.store import opened
from selfcascade_tasks.summary import summarised


@flow(name="pipeline", flow_run_name="{settings.name}", validate_parameters=True)
def pipeline(settings: PipelineSettings) -> ArtifactRef:
    """Everything that ``settings`` ask for, each stage on the very artifacts that the stages before it made; returns the report."""
    store, execution = settings.store, settings.execution
    with summarised(execution):  # of this flow, too: the artifacts of a run are looked for on its page
        dataset = address(curate(settings.curation, store, execution))
        base = settings.adaptation.base
        if not base_exists(base, opened(store)):
            base = address(pretrain(settings.pretraining.model_copy(update={"dataset": dataset}), store, execution))
        for sampling in variants(settings).values():
            check_method(sampling.model_copy(update={"base": base}), opened(store))
        trained = {}
        for reference, training in trainings(settings).items():
            trained[reference] = address(adapt(training.model_copy(update={"dataset": dataset, "base": base}), store, execution))
        samples = {}
        for label, sampling in variants(settings).items():
            prompts = sampling.prompts.model_copy(update={"dataset": dataset})
            chosen = sampled_with(sampling, trained).model_copy(update={"base": base, "prompts": prompts})
            samples[label] = address(generate(chosen, store, execution))
        return evaluate(settings.evaluation.model_copy(update={"dataset": dataset}), samples, store, execution)


def address(ref: ArtifactRef) -> str:
    """The artifact at its whole version, whatever its pointer says by then."""
    return f"{ref.kind}/{ref.name}@{ref.version}"
