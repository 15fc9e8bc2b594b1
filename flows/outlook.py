"""What each stage has still to do: from its plan, or, where an input is not made yet, from the settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from selfcascade.config import AdaptationSettings, EvaluationSettings, GenerationSettings, PipelineSettings, PretrainingSettings, PromptSettings
from selfcascade.curation.curate import CurationPlan, plan_curation
from selfcascade.storage import Artifact, Plan, Store
from selfcascade_flows.variants import references, sampled_with, trainings, variant, variants
from selfcascade_tasks.adapt import ENCODING, encoding_work
from selfcascade_tasks.base import base_exists
from selfcascade_tasks.generate import work_of


@dataclass(frozen=True)
class Step:
    """One stage, for one method where it has one."""

    stage: str
    name: str
    units: int
    """Units of work in all."""
    done: int
    work: float
    """What the units that are left hold, counted as in :class:`selfcascade_tasks.record.UnitCost`."""
    method: str | None = None
    bytes: int | None = None
    """What is left to be stored; unset: unknown."""
    serial: bool = False
    """Whether the units follow one another instead of running side by side."""
    address: str | None = None
    """kind/name@version; unset while an input is not made yet."""
    published: bool = False


def steps_of(stage: str, run: PipelineSettings, store: Store) -> Iterator[Step]:
    """The steps of a command, in order.

    Raises:
        SettingsError: what the command would refuse.
    """
    match stage:
        case "curate":
            yield _Outlook(run, store).curation()
        case "pretrain":
            yield _pretraining(run.pretraining, run, store)
        case "adapt":
            yield _adaptation(run.adaptation, run, store)
        case "generate":
            yield _generation(variant(run, run.generation.method), store)
        case "evaluate":
            yield _evaluation(run.evaluation, {label: f"samples/{sampling.name}" for label, sampling in variants(run).items()}, store)
        case _:
            yield from _Outlook(run, store).steps()


class _Outlook:
    """All stages of a run, each seen from what the stages before it will have made."""

    def __init__(self, run: PipelineSettings, store: Store) -> None:
        self.run, self.store = run, store
        self.curated: CurationPlan = plan_curation(run.curation, store)
        self.dataset = f"datasets/{self.curated.ref.name}@{self.curated.ref.version}"

    def steps(self) -> Iterator[Step]:
        """In the order of the pipeline."""
        run = self.run
        yield self.curation()
        base = self.base()
        if base is not None:
            yield base
        ready = base is None and self.curated.published
        trained = {}
        for reference, training in trainings(run).items():
            trained[reference] = self.adaptation(training, ready)
            yield trained[reference]
        addresses = {reference: step.address for reference, step in trained.items() if step.address is not None}
        samples = {}
        for label, sampling in variants(run).items():
            waits = [trained[reference] for reference in references(sampling).values() if reference in trained]
            chosen = sampled_with(sampling, addresses).model_copy(update={"prompts": self.prompts()})
            samples[label] = self.generation(chosen, ready and all(step.published for step in waits))
            yield samples[label]
        yield self.evaluation(samples)

    def curation(self) -> Step:
        """Always known: the source is there."""
        return _step("curate", self.curated, work=self.curated.inputs_left)

    def base(self) -> Step | None:
        """None where the base is there."""
        if base_exists(self.run.adaptation.base, self.store):
            return None
        settings = self.run.pretraining.model_copy(update={"dataset": self.dataset})
        if self.curated.published:
            return _pretraining(settings, self.run, self.store)
        return Step("pretrain", settings.name, 2, 0, settings.autoencoder.steps + settings.denoiser.steps, serial=True)

    def adaptation(self, training: AdaptationSettings, ready: bool) -> Step:
        """A unit for each shard of the dataset, and the training."""
        settings = training.model_copy(update={"dataset": self.dataset})
        if ready:
            return _adaptation(settings, self.run, self.store)
        return Step("adapt", settings.name, self.curated.units + 1, 0, settings.steps + ENCODING * self.curated.inputs, serial=True)

    def generation(self, settings: GenerationSettings, ready: bool) -> Step:
        """A unit for each chunk of samples."""
        if ready:
            return _generation(settings, self.store)
        count = self.sampled(settings)
        return Step("generate", settings.name, -(-count // settings.chunk), 0, work_of(settings, count), settings.method, _sample_bytes(settings, count))

    def evaluation(self, samples: dict[str, Step]) -> Step:
        """A unit for each set of pictures, the real ones among them."""
        settings = self.run.evaluation.model_copy(update={"dataset": self.dataset})
        if all(step.published for step in samples.values()):
            return _evaluation(settings, {label: str(step.address) for label, step in samples.items()}, self.store)
        real = settings.real_count or self.pictures(settings.real_split)
        each = self.sampled(self.run.generation.model_copy(update={"prompts": self.prompts()}))
        return Step("evaluate", settings.name, len(samples) + 1, 0, real + each * len(samples))

    def prompts(self) -> PromptSettings:
        """Of the dataset of this run."""
        return self.run.generation.prompts.model_copy(update={"dataset": self.dataset})

    def sampled(self, settings: GenerationSettings) -> int:
        """Samples of one method; at most so many where the dataset is not made yet."""
        prompts = settings.prompts
        if prompts.file is not None:
            from selfcascade.generation.prompt_file import read_prompt_file

            found = len(read_prompt_file(prompts.file))
        else:
            found = self.pictures(prompts.split)
        return (found if prompts.count is None else prompts.count) * prompts.per_prompt

    def pictures(self, split: str) -> int:
        """Pictures of a split: counted where the dataset is published, else its share of all inputs."""
        if self.curated.published:
            return int(Artifact(self.store, self.curated.ref).manifest().counts.get(split, 0))
        curation = self.run.curation
        share = {"tune": curation.tune, "test": curation.test, "train": 1 - curation.tune - curation.test}[split]
        return round(share * self.curated.inputs)


def _step(stage: str, plan: Plan, *, work: float, method: str | None = None, serial: bool = False) -> Step:
    return Step(
        stage, plan.ref.name, plan.units, len(plan.done), work, method, 0 if plan.published else plan.bytes_planned, serial, str(plan.ref), plan.published
    )


def _pretraining(settings: PretrainingSettings, run: PipelineSettings, store: Store) -> Step:
    from selfcascade.adaptation.pretrain import plan_pretraining, steps_done, steps_planned

    plan = plan_pretraining(settings, store, device=run.execution.device)
    ahead = sum(steps_planned(settings).values()) - sum(steps_done(settings, store, plan).values())
    return _step("pretrain", plan, work=ahead, serial=True)


def _adaptation(settings: AdaptationSettings, run: PipelineSettings, store: Store) -> Step:
    from selfcascade.adaptation.adapt import plan_adaptation

    plan = plan_adaptation(settings, store, device=run.execution.device)
    return _step("adapt", plan, work=plan.steps - plan.step + encoding_work(plan, store, shards=len(plan.shards_todo)), serial=True)


def _generation(settings: GenerationSettings, store: Store) -> Step:
    from selfcascade.generation.generate import plan_generation

    plan = plan_generation(settings, store)
    return _step("generate", plan, work=work_of(settings, plan.samples_left), method=settings.method)


def _sample_bytes(settings: GenerationSettings, count: int) -> int:
    return count * settings.cascade.height * settings.cascade.width * 3


def _evaluation(settings: EvaluationSettings, samples: dict[str, str], store: Store) -> Step:
    from selfcascade.evaluation.evaluate import plan_evaluation

    plan = plan_evaluation(settings, store, settings.dataset, samples)
    if plan.published:
        sets = len(samples) + 1
        return Step("evaluate", settings.name, sets, sets, 0, address=str(plan.ref), published=True, bytes=0)
    return _step("evaluate", plan, work=sum(plan.sets[index].count for index in plan.todo))
