"""The folder of what was trained: weights that diffusers loads, model card, loss log, previews."""

from __future__ import annotations

import io
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from selfcascade.adaptation.card import Facts, model_card
from selfcascade.adaptation.latent_error import latent_errors
from selfcascade.adaptation.objective import Trained
from selfcascade.adaptation.preview import Picture, Previewer, preview_sheet
from selfcascade.adaptation.trainer import COLUMNS
from selfcascade.adaptation.training_run import TrainingRun
from selfcascade.baselines.finetune import FILES, RECORD, Record
from selfcascade.baselines.lora import Lora
from selfcascade.bases import ResolvedBase
from selfcascade.cascade.latent_upscaler import LatentUpscaler
from selfcascade.cascade.upsampler import FeatureUpsampler
from selfcascade.config import AdaptationSettings
from selfcascade.storage import Artifact

WEIGHTS = "diffusion_pytorch_model.safetensors"
"""What diffusers calls the weights of a model folder."""


def put_folder(artifact: Artifact, run: TrainingRun, previewer: Previewer, *, dataset: Artifact, base: ResolvedBase) -> list[str]:
    """Put every object of the artifact and name them. What describes the weights is made from the weights that the store adopted."""
    trainer, settings = run.trainer, run.settings
    trained = run.early_stop.published().to("cpu", torch.float32)
    with TemporaryDirectory(prefix="selfcascade-") as folder:
        names = _save(trained, Path(folder), settings, base)
        for name in names:
            artifact.put(name, Path(folder, name))
            artifact.download(name, Path(folder, name))
        adopted: Trained = type(trained).from_pretrained(folder, use_safetensors=True).to(trainer.device).eval()
    buffer = io.BytesIO()
    rows = {step: dict(zip(("step", *COLUMNS), (step, *row), strict=True)) for step, row in enumerate(trainer.log(), start=1)}
    for validated in run.validation.table():
        rows[int(validated["step"])] |= validated
    pq.write_table(pa.Table.from_pylist(list(rows.values()), schema=_loss_schema(run)), buffer, compression="zstd")
    artifact.put("loss.parquet", buffer.getvalue())
    log = pq.read_table(io.BytesIO(artifact.read("loss.parquet"))).to_pylist()
    names = [*names, "loss.parquet"]
    if previewer.specs:
        pictures = previewer.columns(adopted)
        for spec, picture in zip(previewer.specs, list(pictures.values())[-1], strict=True):
            names.append(f"previews/{spec.key}.png")
            artifact.put(names[-1], _png(picture))
        names.append("previews/sheet.png")
        artifact.put(names[-1], preview_sheet(pictures, previewer.specs, size=settings.size))
    artifact.put("README.md", model_card(_facts(adopted, run, previewer, dataset, base), settings, log).encode())
    return [*names, "README.md"]


def _save(trained: Trained, folder: Path, settings: AdaptationSettings, base: ResolvedBase) -> list[str]:
    """Write the weights, and what they belong to, as diffusers reads them, in one file whatever their size; returns the names of the files."""
    if isinstance(trained, Lora):
        trained.save_pretrained(folder)
        return [*FILES["lora"], RECORD]
    if isinstance(trained, UNet2DConditionModel):
        trained.register_to_config(_name_or_path=str(base))  # diffusers would keep the path of the folder that it was loaded from
        Record(way="full", base=str(base), size=(settings.size, settings.size)).save(folder)
    trained.save_pretrained(folder, max_shard_size="1TB")
    return ["config.json", WEIGHTS, *([RECORD] if isinstance(trained, UNet2DConditionModel) else [])]


def _loss_schema(run: TrainingRun) -> pa.Schema:
    """A row for each step; the columns of validations hold nothing but where one was made."""
    validation = run.validation
    validated = ["validation", *(f"validation_{bin_.name}" for bin_ in validation.bins)] if validation.keys else []
    return pa.schema([("step", pa.int64()), *((column, pa.float64()) for column in (*COLUMNS, *validated))])


def _facts(trained: Trained, run: TrainingRun, previewer: Previewer, dataset: Artifact, base: ResolvedBase) -> Facts:
    trainer = run.trainer
    source = dataset.manifest().settings.get("source", {})
    return Facts(
        title=trainer.settings.name,
        base=str(base),
        dataset=str(dataset.ref),
        source=str(source.get("kind", "unknown")),
        train_samples=len(trainer.order.keys),
        steps=trainer.step,
        published_step=run.early_stop.step,
        validation_samples=len(run.validation.keys),
        bins=tuple(run.validation.bins),
        parameters=sum(parameter.numel() for _, parameter in trainer.trainable),
        fitted=sum(buffer.numel() for buffer in trained.buffers()),
        channels=tuple(trained.config.channels) if isinstance(trained, FeatureUpsampler) else (),
        errors=latent_errors(trained, trainer.latents) if isinstance(trained, LatentUpscaler) else {},
        prompts=tuple(spec.prompt for spec in previewer.specs),
    )


def _png(picture: Picture) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()
