"""Adaptation: plan, latents of one shard, training, publish. Run again, it goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from pydantic import Field

from selfcascade.adaptation.basis import fit_basis
from selfcascade.adaptation.cache import Encoder, LatentCache, Recipe, encode_shard, missing_shards, shards_of
from selfcascade.adaptation.checkpoint import CheckpointFolder, clear_checkpoints, newest_step
from selfcascade.adaptation.early_stop import check_early_stop
from selfcascade.adaptation.folder import put_folder
from selfcascade.adaptation.kinds import KINDS
from selfcascade.adaptation.latent_error import latent_errors
from selfcascade.adaptation.objective import NoiseObjective
from selfcascade.adaptation.preview import Previewer, preview_specs
from selfcascade.adaptation.rank_group import RankGroup, RankLine, log_line
from selfcascade.adaptation.ranks import ALONE, Ranks
from selfcascade.adaptation.requirements import buckets_of, check_dataset, check_packages, check_precision, check_processes, enough_memory, stage_of
from selfcascade.adaptation.start import trainer_of
from selfcascade.adaptation.tensorboard_log import TensorBoardLog, check_tensorboard
from selfcascade.adaptation.training_run import TrainingRun, TrainingStep
from selfcascade.adaptation.unfinished import check_unfinished, give_up_unfinished, leave_record
from selfcascade.bases import ResolvedBase, load_pipeline, names_artifact, resolve_base
from selfcascade.cascade.latent_upscaler import LatentUpscaler
from selfcascade.cascade.pipeline import SelfCascadePipeline
from selfcascade.config import AdaptationSettings
from selfcascade.generation.models import resolve_device
from selfcascade.generation.precision import warn_of_slow_precision
from selfcascade.generation.threads import torch_threads
from selfcascade.settings import SettingsError
from selfcascade.storage import Artifact, ArtifactRef, Plan, Store, resolve

LEANER: Mapping[str, str] = MappingProxyType(
    {
        "upsampler": "gradient_checkpointing=true, upsampler.inject=skip or compute.dtype=bfloat16",
        "latent-upscaler": "a smaller upscaler.width or compute.dtype=bfloat16",
        "lora": "gradient_checkpointing=true or compute.dtype=bfloat16",
        "full": "gradient_checkpointing=true, sharded=true on several processes, trainable=lora or compute.dtype=bfloat16",
    }
)
"""What takes less memory in training."""


class AdaptationPlan(Plan):
    """What is left of one training. Its units are the dataset's shards, whose latents can be made side by side, and last the training."""

    dataset: str = Field(description="datasets/name@version")
    base: str = Field(description="name@version of the base")
    shards: tuple[str, ...] = Field(description="shards of the dataset in order: unit i encodes the i-th")
    device: str = Field(description="torch device that encodes and trains")
    step: int = Field(ge=0, description="optimizer steps that a checkpoint has behind it")
    steps: int = Field(ge=1, description="optimizer steps in all")

    @property
    def shards_todo(self) -> tuple[int, ...]:
        """Units whose latents are missing."""
        return tuple(unit for unit in self.todo if unit < len(self.shards))

    @property
    def training_todo(self) -> bool:
        """Whether steps are left to train."""
        return len(self.shards) in self.todo


def plan_adaptation(settings: AdaptationSettings, store: Store, *, device: str = "auto") -> AdaptationPlan:
    """Find dataset and base, which give what is trained its address, and see what of it the store holds. Writes nothing.

    Args:
        settings: of the run.
        store: where everything is.
        device: torch device: auto, cpu, cuda, cuda:1, mps.

    Raises:
        SettingsError: dataset or base is unknown, too few or too small pictures, a size that the base does not take, a precision that the device lacks,
            a package that is not installed, or an unfinished run of this name has other settings.
    """
    dataset = resolve(store, settings.dataset, "datasets")
    base = resolve_base(settings.base, store)
    artifact = _artifact(settings, store, dataset, base)
    chosen = resolve_device(device)
    check_packages(settings)
    check_tensorboard(settings)
    check_precision(settings, chosen)
    check_processes(settings, chosen)
    check_dataset(settings, dataset)
    check_early_stop(settings, dataset)
    stage_of(settings, base)
    shards = tuple(shards_of(dataset))
    published = artifact.published()
    if not published:
        check_unfinished(settings, artifact)
    missing = () if published else tuple(missing_shards(store, dataset, _recipe(settings, base, str(chosen))))
    step = settings.steps if published else min(newest_step(store, artifact.ref.version), settings.steps)
    todo = [unit for unit, name in enumerate(shards) if name in missing]
    if step < settings.steps:
        todo.append(len(shards))
    return AdaptationPlan(
        artifact_ref=artifact.ref,
        published=published,
        units=len(shards) + 1,
        done=tuple(unit for unit in range(len(shards) + 1) if unit not in todo),
        todo=tuple(todo),
        dataset=f"datasets/{dataset.ref.name}@{dataset.ref.version}",
        base=str(base),
        shards=shards,
        device=str(chosen),
        step=step,
        steps=settings.steps,
    )


def encode_unit(settings: AdaptationSettings, store: Store, plan: AdaptationPlan, unit: int) -> None:
    """Make the latents of shard ``unit`` of ``plan``; those that are there already are left alone.

    Raises:
        SettingsError: a picture is smaller than the target; names it.
        IntegrityError: the shard is damaged.
    """
    dataset, base = _dataset(store, plan), _base(settings, store, plan)
    recipe = _recipe(settings, base, plan.device)
    if plan.shards[unit] in missing_shards(store, dataset, recipe):
        with enough_memory(settings, remedy="lower the size or execution.workers, or use a device with more memory"):
            encode_shard(store, dataset, plan.shards[unit], Encoder(_pipeline(base, torch.float32, plan.device), recipe))


def train_upsampler(
    settings: AdaptationSettings,
    store: Store,
    plan: AdaptationPlan,
    progress: Callable[[TrainingStep], None] | None = None,
    heard: Callable[[RankLine], None] = log_line,
) -> int:
    """Train to the last step, from the newest checkpoint if there is one, and leave the final state as a checkpoint.

    Args:
        settings: of the run; with several ``processes`` they are started, and ended, here.
        store: holds latents (missing ones are made first) and checkpoints.
        plan: of these settings.
        progress: called every ``settings.log_steps`` steps, at every preview and at the last step.
        heard: called with what several processes write to standard output and error.

    Returns:
        The steps that were done in this call.

    Raises:
        Diverged: the loss is not finite; earlier checkpoints are kept.
        Preempted: SIGTERM came, and whoever handled it before goes on; the last step is stored.
        SettingsError: the base changed since the plan was made, the memory does not suffice, or one of several processes was ended from outside.
        RankFailed: one of several processes met an error that nobody foresaw; names it.
    """
    if plan.published:
        return 0
    warn_of_slow_precision("adaptation.compute.dtype", settings.compute.dtype, torch.device(plan.device))
    base = _base(settings, store, plan)
    artifact = _artifact(settings, store, _dataset(store, plan), base)
    if settings.restart:
        give_up_unfinished(artifact)
    leave_record(artifact)
    telling = progress or (lambda reached: None)
    if settings.processes == 1:
        return _train(settings, store, plan, ranks=ALONE, progress=telling)
    device = torch.device(plan.device)
    check_processes(settings, device)
    group = RankGroup(settings.processes, device, threads=settings.compute.threads, heard=heard)
    steps: int = group.run(_train, settings, store, plan, progress=telling)
    return steps


def train_and_tell(settings: AdaptationSettings, store: Store, plan: AdaptationPlan, progress: Callable[[TrainingStep | RankLine], None]) -> int:
    """As :func:`train_upsampler`, with one ear for both that it calls."""
    return train_upsampler(settings, store, plan, progress, heard=progress)


def _train(settings: AdaptationSettings, store: Store, plan: AdaptationPlan, *, ranks: Ranks, progress: Callable[[TrainingStep], None]) -> int:
    """What each rank does. The first one starts, from a checkpoint or from nothing, and the others take over its state."""
    base = _base(settings, store, plan)
    with torch_threads(settings.compute.threads), enough_memory(settings, remedy=f"lower the batch, raise accumulation, or use {LEANER[settings.trainable]}"):
        with ranks.after_first():
            latents = _latents(settings, store, plan, base)
        checkpoints = CheckpointFolder(store, version=plan.ref.version, latents=latents.digest)
        waiting = "cpu" if settings.sharded else plan.device  # where weights are in shards, memory is short: the base is there for previews alone
        pipeline = _pipeline(base, getattr(torch, settings.compute.dtype), waiting)
        trainer = trainer_of(settings, pipeline, latents, base, torch.device(plan.device), ranks)
        run = TrainingRun(trainer)
        newest = checkpoints.newest() if ranks.first else None
        if newest is None and ranks.first and isinstance(trainer.objective, NoiseObjective) and trainer.objective.trained.needs_basis:
            fit_basis(trainer.objective, latents)
        run.begin(newest)
        del newest  # as large as all that trains
        previewer = Previewer(pipeline, preview_specs(latents, settings), settings)
        watched = settings if ranks.first else settings.model_copy(update={"tensorboard": None})
        with TensorBoardLog(watched, version=plan.ref.version, step=trainer.step) as board:

            def preview() -> str | None:
                if not (ranks.first or trainer.sharded):
                    return None
                trained = trainer.averaged()
                if not ranks.first:
                    return None
                pipeline.to(plan.device)
                key, sheet = _preview_key(plan, f"step-{trainer.step:06d}.png"), previewer.sheet(trained, step=trainer.step)
                pipeline.to(waiting)
                store.put_cache(key, sheet)
                board.picture(trainer.step, "previews", sheet)
                return key

            return run.train(checkpoints, board, preview=preview if previewer.specs else None, progress=progress)


def publish_adaptation(settings: AdaptationSettings, store: Store, plan: AdaptationPlan) -> ArtifactRef:
    """Write the folder of what was trained, model card, loss log and previews, commit it, and drop its checkpoints.

    Raises:
        SettingsError: the training is not done.
    """
    dataset, base = _dataset(store, plan), _base(settings, store, plan)
    artifact = _artifact(settings, store, dataset, base)
    if not artifact.published():
        _publish(artifact, settings, store, plan, dataset=dataset, base=base)
    clear_checkpoints(store, plan.ref.version)
    store.delete([info.key for info in store.list(_preview_key(plan, ""))])
    return plan.ref


def adapt(settings: AdaptationSettings, store: Store, *, device: str = "auto", progress: Callable[[TrainingStep], None] | None = None) -> ArtifactRef:
    """The whole stage in this process. Run again, it does what is left; published, it does nothing.

    Raises:
        SettingsError: as the steps do.
    """
    plan = plan_adaptation(settings, store, device=device)
    if plan.published:
        return plan.ref
    with Artifact(store, plan.ref).writing():
        train_upsampler(settings, store, plan, progress)
        return publish_adaptation(settings, store, plan)


def _preview_key(plan: AdaptationPlan, name: str) -> str:
    return f"cache/previews/{plan.ref.version}/{name}"


def _publish(artifact: Artifact, settings: AdaptationSettings, store: Store, plan: AdaptationPlan, *, dataset: Artifact, base: ResolvedBase) -> None:
    with torch_threads(settings.compute.threads):
        latents = _latents(settings, store, plan, base)
        pipeline = _pipeline(base, getattr(torch, settings.compute.dtype), plan.device)
        # What was trained in shards need not fit one GPU; nothing is computed with it but previews.
        device = torch.device("cpu" if settings.sharded else plan.device)
        run = TrainingRun(trainer_of(settings, pipeline, latents, base, device))
        run.begin(CheckpointFolder(store, version=plan.ref.version, latents=latents.digest).newest())
        trainer = run.trainer
        if not run.over:
            if artifact.published():  # meanwhile, by a second run of the same work, which then dropped the checkpoints
                return
            raise SettingsError(f"{plan.ref} is trained to step {trainer.step} of {settings.steps}; run `selfcascade adapt` again, it goes on from there")
        previewer = Previewer(pipeline, preview_specs(latents, settings), settings)
        objects = put_folder(artifact, run, previewer, dataset=dataset, base=base)
    final = [row[0] for row in trainer.log()[-max(1, trainer.step // 10) :]]
    counts: dict[str, int | float | str] = {
        "parameters": sum(parameter.numel() for _, parameter in trainer.trainable),
        "fitted": sum(buffer.numel() for buffer in trainer.trained.buffers()),
        "steps": trainer.step,
        "samples": trainer.position,
        "train_samples": len(trainer.order.keys),
        "loss": round(sum(final) / len(final), 6),
    }
    counts |= run.counts()
    trained = run.early_stop.published()
    if isinstance(trained, LatentUpscaler):
        counts |= {f"tune_rmse_{name}": error for name, error in latent_errors(trained, latents).items()}
    artifact.publish(counts=counts, objects=objects)


def _artifact(settings: AdaptationSettings, store: Store, dataset: Artifact, base: ResolvedBase) -> Artifact:
    return Artifact.plan(store, KINDS[settings.trainable], settings.name, settings, {"dataset": dataset.ref.version, "base": base.version})


def _latents(settings: AdaptationSettings, store: Store, plan: AdaptationPlan, base: ResolvedBase) -> LatentCache:
    recipe = _recipe(settings, base, plan.device)
    # A pipeline of its own: the encoder changes the layout of the autoencoder, which the previews must not see or not see by chance.
    return LatentCache.open(store, _dataset(store, plan), recipe, lambda: Encoder(_pipeline(base, torch.float32, plan.device), recipe))


def _pipeline(base: ResolvedBase, dtype: torch.dtype, device: str) -> SelfCascadePipeline:
    return SelfCascadePipeline.from_pipe(load_pipeline(base, dtype, device))


def _recipe(settings: AdaptationSettings, base: ResolvedBase, device: str) -> Recipe:
    return Recipe.here(base=base.version, size=settings.size, device=device, buckets=buckets_of(settings, base), posterior=settings.posterior)


def _dataset(store: Store, plan: AdaptationPlan) -> Artifact:
    return resolve(store, plan.dataset)


def _base(settings: AdaptationSettings, store: Store, plan: AdaptationPlan) -> ResolvedBase:
    """The base of the plan, found again: workers may run elsewhere."""
    reference = f"bases/{plan.base}" if names_artifact(settings.base, "bases") else settings.base
    base = resolve_base(reference, store)
    if str(base) != plan.base:
        raise SettingsError(f"base {settings.base!r} is {base} now but was {plan.base} when the run was planned; run the command again")
    return base
