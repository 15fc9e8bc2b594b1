"""The model card of a pretrained base: data, licence of the pictures, steps, losses, and the command that trains it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from selfcascade.adaptation.card import PICTURES, flattened, markdown_table
from selfcascade.config import PretrainingSettings
from selfcascade.storage import ArtifactRef

ROWS = 12
"""Rows of the loss table."""


def base_card(settings: PretrainingSettings, ref: ArtifactRef, dataset: ArtifactRef, record: Mapping[str, Any], *, init: str | None = None) -> str:
    """Markdown with a front matter that model hubs read. No clock, no host: two equal runs write equal cards.

    Args:
        settings: of the run.
        ref: of the base.
        dataset: that it learnt from.
        record: ``counts``, kind of ``device``, version of ``torch``, ``log_every`` and ``losses`` of each phase (mean loss of every ``log_every`` steps).
        init: base that training went on from, as name@version.
    """
    counts = record["counts"]
    start = f"Trained on from `{init}`, its autoencoder kept and the denoiser's optimizers started anew," if init else "Trained from nothing"
    sections = [
        "---\nlibrary_name: diffusers\ntags: [text-to-image, latent-diffusion]\nlicense: cc-by-4.0\n---",
        f"# {ref.name}",
        f"A small text-to-image latent diffusion model, native at {settings.size} x {settings.size} pixels, in the folder format of diffusers; "
        "`StableDiffusionPipeline.from_pretrained(folder)` loads it unchanged. "
        "It shows, on a laptop, what the cascade does to a base; it is no general picture model.",
        f"{start} on the train split of `{dataset}` ({counts['pictures']:,} pictures, {counts['words']:,} words).",
        markdown_table("count", counts),
        "## Training",
        "Autoencoder: L1, squared error, finite differences and KL, with a share of steps on halved latents; its latent channels are normalised to "
        "zero mean and unit variance. Denoiser: noise prediction with min-SNR weights on latents of the published autoencoder; the text encoder learns "
        f"along.{_crops(settings)} The published weights are the moving average, in half precision.",
        markdown_table("setting", {name: value for name, value in flattened(settings.what()).items() if not init or not name.startswith("autoencoder.")}),
        f"Trained by torch {record['torch']} on a device of kind {record['device']}: other ones draw and sum otherwise and end with other weights.",
        f"Loss of what was trained (of the denoiser its noise MSE), mean over {record['log_every']} steps at the step given:",
        *(_curve(phase, values, record["log_every"]) for phase, values in record["losses"].items() if values),
        f"To train it again:\n\n```\nselfcascade pretrain --config {settings.name}\n```",
        "## Licence",
        f"Pictures: {PICTURES['twemoji']} The weights are passed on under the same terms.",
    ]
    return "\n\n".join(sections) + "\n"


def _crops(settings: PretrainingSettings) -> str:
    denoiser = settings.denoiser
    if not denoiser.crops:
        return ""
    return (
        f" Below t / T = {denoiser.crops_below:g}, {denoiser.crops:.0%} of its samples are native-size crops of pictures of twice the side, in which "
        "everything is twice as large: at low noise it knows edges and textures at either scale, as bases do that learnt from "
        "photographs. It has seen no larger latent."
    )


def _curve(phase: str, values: Sequence[float], every: int) -> str:
    rows = sorted({round(number * (len(values) - 1) / max(1, ROWS - 1)) for number in range(ROWS)}) if values else []
    return "\n".join([f"| {phase}: step | loss |", "|---|---|", *(f"| {(row + 1) * every:,} | {values[row]:.4f} |" for row in rows)])
