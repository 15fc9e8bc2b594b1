"""Pretraining of the small base: autoencoder, then denoiser, then a diffusers folder with its card, published as an artifact of kind ``bases``."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from numpy.typing import NDArray
from pydantic import Field
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import CLIPTextModel

from selfcascade.adaptation.autoencoder_training import AutoencoderTraining, encode_all, encode_crops, fold_statistics, psnr
from selfcascade.adaptation.base_card import base_card
from selfcascade.adaptation.checkpoint import CheckpointFolder, clear_checkpoints, newest_step
from selfcascade.adaptation.denoiser_training import DenoiserTraining, build_scheduler, build_tokenizer, tokenize, wrap_tokenizer
from selfcascade.adaptation.trainer import Diverged
from selfcascade.bases import ResolvedBase, resolve_base
from selfcascade.config import PretrainingSettings
from selfcascade.curation.reading import read_samples
from selfcascade.generation.models import resolve_device
from selfcascade.generation.precision import warn_of_slow_precision
from selfcascade.settings import SettingsError
from selfcascade.storage import Artifact, ArtifactRef, Plan, Store, resolve

log = logging.getLogger(__name__)

AUTOENCODER = ("vae/config.json", "vae/diffusion_pytorch_model.safetensors")
TRAINING_AUTOENCODER, TRAINING = "training/autoencoder.json", "training/base.json"
"""Put first of a phase's results and last of all: the loss logs."""
LOG_EVERY = 250
"""Steps that one number of the published loss log is the mean of."""
CROPS = 2
"""Crops of each picture that the denoiser may see at low noise."""
TELL_EVERY = 50
"""Steps between words to whoever watches."""

Phase = Literal["autoencoder", "denoiser"]


@dataclass(frozen=True)
class PretrainingStep:
    """What a watcher is told: phase, optimizer steps done and planned, mean loss since the last word."""

    phase: Phase
    step: int
    steps: int
    loss: float


@dataclass(frozen=True)
class _Pictures:
    """The splits of a dataset in memory: pictures uint8 (N, S, S, 3) and captions, in key order."""

    train: NDArray[np.uint8]
    captions: tuple[str, ...]
    tune: NDArray[np.uint8]


class PretrainingPlan(Plan):
    """The two phases of a base and the dataset that both learn from."""

    dataset: ArtifactRef = Field(description="dataset that the base learns from, pinned")
    init: str | None = Field(None, description="base that training goes on from, as name@version")
    device: str = Field(description="torch device that trains")


def plan_pretraining(settings: PretrainingSettings, store: Store, *, device: str = "auto") -> PretrainingPlan:
    """The address of the base and how far its training is. One unit a phase; writes nothing.

    Args:
        settings: of the run.
        store: where everything is.
        device: torch device: auto, cpu, cuda, cuda:1, mps.

    Raises:
        SettingsError: dataset or base is unknown, or there is no such device.
    """
    dataset = resolve(store, settings.dataset, kind="datasets").ref
    init = resolve_base(settings.init, store) if settings.init is not None else None
    artifact = _artifact(settings, store, dataset, init.version if init else None)
    published = artifact.published()
    there = artifact.existing()
    done = (0, 1) if published or TRAINING in there else (0,) if AUTOENCODER[1] in there else ()
    todo = tuple(unit for unit in (0, 1) if unit not in done)
    return PretrainingPlan(
        artifact_ref=artifact.ref,
        published=published,
        units=2,
        done=done,
        todo=todo,
        bytes_planned=25_000_000 if todo else 0,
        dataset=dataset,
        init=str(init) if init else None,
        device=str(resolve_device(device)),
    )


def train_base(settings: PretrainingSettings, store: Store, plan: PretrainingPlan, progress: Callable[[PretrainingStep], None] | None = None) -> None:
    """Train what is not trained yet and put the base's files into the store. Interrupted and run again, it goes on at the last checkpoint.

    Every draw of a step follows from the seed and the step's number, so an interrupted run ends with the weights of an undisturbed one: bit for bit on one
    CPU, to rounding on a GPU, whose sums have no fixed order. The denoiser learns on latents of the autoencoder *as published*, in half precision.

    Raises:
        SettingsError: the dataset's pictures do not have twice the base's side, a split is empty, or the base to go on from has another shape, or is
            another one than was planned with.
        Diverged: a loss is not finite; names the step.
    """
    if plan.published:
        return
    torch.set_num_threads(settings.compute.threads)
    device = torch.device(plan.device)
    warn_of_slow_precision("pretraining.compute.dtype", settings.compute.dtype, device)
    artifact = _artifact(settings, store, plan.dataset, _version(plan.init))
    pictures = _pictures(settings, resolve(store, plan.dataset.uri))
    init = _planned_init(settings, store, plan)
    if 0 in plan.todo:
        if init:
            _keep_autoencoder(init, artifact)
        else:
            _train_autoencoder(settings, artifact, pictures, device, progress)
    if 1 in plan.todo:
        _train_denoiser(settings, artifact, plan.dataset, pictures, init, device, progress)


def publish_pretraining(settings: PretrainingSettings, store: Store, plan: PretrainingPlan) -> ArtifactRef:
    """Commit the base: manifest, then pointer; then its checkpoints go."""
    if plan.published:
        return plan.ref
    artifact = _artifact(settings, store, plan.dataset, _version(plan.init))
    training = json.loads(artifact.read(TRAINING))
    ref = artifact.publish(counts=training["counts"])
    clear_checkpoints(store, plan.ref.version)
    return ref


def steps_planned(settings: PretrainingSettings) -> dict[Phase, int]:
    """Optimizer steps of each phase; a base that training goes on from brings its autoencoder."""
    return {"autoencoder": settings.autoencoder.total_steps if settings.init is None else 0, "denoiser": settings.denoiser.steps}


def steps_done(settings: PretrainingSettings, store: Store, plan: PretrainingPlan) -> dict[Phase, int]:
    """Optimizer steps that lie behind each phase; only lists keys."""
    planned, newest = steps_planned(settings), newest_step(store, plan.ref.version)
    if planned["autoencoder"] and 0 not in plan.done:
        return {"autoencoder": newest, "denoiser": 0}
    return planned | ({} if 1 in plan.done else {"denoiser": newest})


def _artifact(settings: PretrainingSettings, store: Store, dataset: ArtifactRef, init: str | None) -> Artifact:
    return Artifact.plan(store, "bases", settings.name, settings, {"dataset": dataset.version} | ({"init": init} if init else {}))


def _version(base: str | None) -> str | None:
    return base.rpartition("@")[2] if base else None


def _planned_init(settings: PretrainingSettings, store: Store, plan: PretrainingPlan) -> ResolvedBase | None:
    if settings.init is None:
        return None
    found = resolve_base(settings.init, store)
    if str(found) != plan.init:
        raise SettingsError(f"base {settings.init} is now {found}, but training was planned from {plan.init}; run again")
    return found


def _keep_autoencoder(base: ResolvedBase, artifact: Artifact) -> None:
    for name in (*AUTOENCODER, "tokenizer/tokenizer.json"):
        if not Path(base.location, name).is_file():
            raise SettingsError(f"base {base} has no file {name}; pretraining.init needs a base that pretraining made")
    artifact.put(TRAINING_AUTOENCODER, json.dumps({"losses": []}).encode())
    for name in AUTOENCODER:
        artifact.put(name, Path(base.location, name))


def _vocabulary(base: ResolvedBase) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(Path(base.location, "tokenizer", "tokenizer.json")))
    tokenizer.no_truncation()  # use leaves both in the file, and the tokenizer would be saved with more settings than it was made with
    tokenizer.no_padding()
    return tokenizer


def _take_over(training: DenoiserTraining, base: ResolvedBase) -> None:
    """Weights of the base's UNet and text encoder into a training at step 0.

    Raises:
        SettingsError: they have another shape than the settings ask for; names the settings.
    """
    kind = {"subfolder": "unet", "torch_dtype": torch.float32, "use_safetensors": True}
    unet = UNet2DConditionModel.from_pretrained(base.location, **kind)
    text_encoder = CLIPTextModel.from_pretrained(base.location, **kind | {"subfolder": "text_encoder"})
    try:
        training.unet.load_state_dict(unet.state_dict())
        training.text_encoder.load_state_dict(text_encoder.state_dict())
    except RuntimeError:
        raise SettingsError(
            f"base {base} has other channels than pretraining.denoiser asks for: its UNet has {list(unet.config.block_out_channels)}, "
            f"its text encoder is {text_encoder.config.hidden_size} wide with {text_encoder.config.num_hidden_layers} layers"
        ) from None
    with torch.no_grad():
        for average, parameter in zip(training.average, training.parameters, strict=True):
            average.copy_(parameter)


def _train_autoencoder(
    settings: PretrainingSettings, artifact: Artifact, pictures: _Pictures, device: torch.device, progress: Callable[[PretrainingStep], None] | None
) -> None:
    dtype: torch.dtype = getattr(torch, settings.compute.dtype)
    training = AutoencoderTraining(settings.autoencoder, pictures.train, seed=settings.seed, dtype=dtype, device=device)
    checkpoints = CheckpointFolder(artifact.store, version=artifact.ref.version, latents="autoencoder")
    losses = _run("autoencoder", training, {"model": training.model}, {}, settings.autoencoder.total_steps, settings.checkpoint_steps, checkpoints, progress)
    model = training.model.eval()
    fold_statistics(model, encode_all(model, pictures.train[:4096]))
    with TemporaryDirectory(prefix="selfcascade-") as folder:
        model.cpu().half().save_pretrained(Path(folder, "vae"))
        artifact.put(TRAINING_AUTOENCODER, json.dumps({"losses": losses}).encode())
        for name in AUTOENCODER:
            artifact.put(name, Path(folder, name))


def _train_denoiser(
    settings: PretrainingSettings,
    artifact: Artifact,
    dataset: ArtifactRef,
    pictures: _Pictures,
    init: ResolvedBase | None,
    device: torch.device,
    progress: Callable[[PretrainingStep], None] | None,
) -> None:
    dtype: torch.dtype = getattr(torch, settings.compute.dtype)
    with TemporaryDirectory(prefix="selfcascade-") as folder:
        for name in AUTOENCODER:
            Path(folder, name).parent.mkdir(exist_ok=True)
            artifact.download(name, Path(folder, name))
        autoencoder = AutoencoderKL.from_pretrained(Path(folder, "vae"), torch_dtype=torch.float32).to(device).eval()
    latents = encode_all(autoencoder, pictures.train).clone()
    max_tokens = settings.denoiser.max_tokens
    tokenizer = wrap_tokenizer(_vocabulary(init), max_tokens=max_tokens) if init else build_tokenizer(pictures.captions, max_tokens=max_tokens)
    training = DenoiserTraining(
        settings.denoiser,
        latents,
        tokenize(tokenizer, pictures.captions),
        tokenize(tokenizer, [""]),
        vocabulary=len(tokenizer),
        seed=settings.seed,
        dtype=dtype,
        crops=encode_crops(autoencoder, pictures.train, count=CROPS, seed=settings.seed).clone() if settings.denoiser.crops else None,
    )
    if init:
        _take_over(training, init)
    checkpoints = CheckpointFolder(artifact.store, version=artifact.ref.version, latents="denoiser")
    average = {f"average/{number}": value for number, value in enumerate(training.average)}
    modules = {"unet": training.unet, "text_encoder": training.text_encoder}
    losses = _run("denoiser", training, modules, average, settings.denoiser.steps, settings.checkpoint_steps, checkpoints, progress)
    unet, text_encoder = training.averaged()
    held_out = round(psnr(autoencoder, pictures.tune[:512]), 2)
    pipeline = StableDiffusionPipeline(
        vae=autoencoder.cpu(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    counts: dict[str, Any] = {
        "pictures": len(pictures.train),
        "words": len(tokenizer),
        "parameters_unet": parameters_of(unet),
        "parameters_text_encoder": parameters_of(text_encoder),
        "parameters_autoencoder": parameters_of(autoencoder),
        "psnr_held_out_db": held_out,
    }
    curves = {"autoencoder": json.loads(artifact.read(TRAINING_AUTOENCODER))["losses"], "denoiser": losses}
    record = {"counts": counts, "device": device.type, "torch": torch.__version__, "log_every": LOG_EVERY, "losses": curves}
    with TemporaryDirectory(prefix="selfcascade-") as folder:
        pipeline.to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)
        Path(folder, "README.md").write_text(base_card(settings, artifact.ref, dataset, record, init=str(init) if init else None), encoding="utf-8")
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            if name not in AUTOENCODER:
                artifact.put(name, path)
        artifact.put(TRAINING, json.dumps(record, sort_keys=True).encode())


def _run(
    phase: Phase,
    training: AutoencoderTraining | DenoiserTraining,
    modules: dict[str, nn.Module],
    extra: dict[str, Tensor],
    steps: int,
    every: int,
    checkpoints: CheckpointFolder,
    progress: Callable[[PretrainingStep], None] | None,
) -> list[float]:
    """Advance ``training`` to ``steps`` from the newest checkpoint on; returns the mean loss of each :data:`LOG_EVERY` steps."""
    tensors = {f"{name}/{key}": value for name, module in modules.items() for key, value in module.state_dict().items()} | extra
    losses: list[float] = []
    if found := checkpoints.newest():
        with torch.no_grad():
            for name, value in tensors.items():
                value.copy_(found.tensors[name])
        _restore_optimizers(training.optimizers, found.tensors)
        training.step = found.step
        losses = found.record["losses"]
        log.info("%s goes on at step %d of %d", phase, found.step, steps)
    fresh: list[Tensor] = []
    while training.step < steps:
        fresh.append(training.advance())
        saves = training.step % every == 0 or training.step == steps
        if training.step % TELL_EVERY and not saves:
            continue  # the loss is not looked at in every step: a GPU would wait for its host each time
        first, losses = len(losses), losses + torch.stack(fresh).tolist()
        fresh.clear()
        for step, loss in enumerate(losses[first:], start=first + 1):
            if not np.isfinite(loss):
                raise Diverged(f"pretraining: the loss of the {phase} is {loss} at step {step}; lower pretraining.{phase}.lr or use dtype float32")
        if training.step % TELL_EVERY == 0 and progress is not None:
            progress(PretrainingStep(phase, training.step, steps, float(np.mean(losses[-TELL_EVERY:]))))
        if saves:
            checkpoints.save(training.step, tensors | _optimizer_tensors(training.optimizers), {"losses": losses})
    return [round(float(np.mean(losses[start : start + LOG_EVERY])), 5) for start in range(0, len(losses), LOG_EVERY)]


def _optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    return {
        f"optimizer/{which}/{number}/{slot}": value
        for which, optimizer in enumerate(optimizers)
        for number, slots in optimizer.state_dict()["state"].items()
        for slot, value in slots.items()
    }


def _restore_optimizers(optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor]) -> None:
    for which, optimizer in enumerate(optimizers):
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith(f"optimizer/{which}/"):
                _, _, number, slot = name.split("/")
                slots.setdefault(int(number), {})[slot] = value
        optimizer.load_state_dict(optimizer.state_dict() | {"state": slots})


def _pictures(settings: PretrainingSettings, dataset: Artifact) -> _Pictures:
    train: list[NDArray[np.uint8]] = []
    captions: list[str] = []
    tune: list[NDArray[np.uint8]] = []
    for sample in read_samples(dataset):
        if sample.image.shape[0] != 2 * settings.size:
            raise SettingsError(
                f"dataset {dataset.ref} holds pictures of {sample.image.shape[0]} px, but a base of pretraining.size={settings.size} learns from "
                f"pictures of {2 * settings.size} px; curate with size {2 * settings.size}"
            )
        if sample.split == "train":
            train.append(sample.image)
            captions.append(sample.caption)
        elif sample.split == "tune" and len(tune) < 512:
            tune.append(sample.image)
    if not train or not tune:
        raise SettingsError(f"dataset {dataset.ref} has {len(train)} pictures to train on and {len(tune)} held out; pretraining needs both")
    return _Pictures(np.stack(train), tuple(captions), np.stack(tune))


def parameters_of(module: nn.Module) -> int:
    """Numbers in a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
