"""The model card of an upsampler: what it belongs to, what it was made from, how its training went. No clock, no host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from selfcascade.config import AdaptationSettings

ROWS = 10
"""Rows of the loss table."""
PICTURES = {
    "twemoji": "Twemoji graphics, copyright Twitter and contributors, CC-BY 4.0 (https://creativecommons.org/licenses/by/4.0/).",
}
"""Licence of the pictures by kind of source, where it is known."""
VARIANTS = {
    "A": "one bilinear enlargement and two residual blocks with time embedding a level, as the paper describes the layers",
    "C": "the same structure with every weight shared by the channels of a group",
}


@dataclass(frozen=True)
class Facts:
    """What the card tells besides the settings."""

    title: str
    base: str
    """``name@version`` of the base."""
    dataset: str
    """``datasets/name@version``."""
    source: str
    """Kind of source that the pictures came from."""
    train_samples: int
    parameters: int
    channels: Sequence[int]
    """Of the four feature maps."""
    prompts: Sequence[str]
    """Of the previews."""


def model_card(facts: Facts, settings: AdaptationSettings, log: Sequence[Mapping[str, float]]) -> str:
    """Markdown with a front matter that model hubs read.

    Args:
        facts: of the run.
        settings: of the run.
        log: of each step ``step``, ``loss``, ``lr`` and ``grad_norm``.
    """
    name = facts.base.partition("@")[0]
    variant = settings.upsampler.variant
    epochs = settings.steps * settings.batch / facts.train_samples
    front = {"library_name": "diffusers", "tags": ["text-to-image", "self-cascade", "feature-upsampler"], "base_model": name}
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {facts.title}",
        f"Time-aware feature upsampler of Self-Cascade diffusion (arXiv 2402.10491), for the base `{facts.base}`, trained at {settings.size} x {settings.size} "
        f"pixels. Variant {variant}: {VARIANTS[variant]}. It holds {facts.parameters:,} numbers on features of "
        f"{', '.join(str(width) for width in facts.channels)} channels, and no weight of the base, which it needs and does not change.",
        "```python\nfrom selfcascade import SelfCascadePipeline\n"
        f'pipe = SelfCascadePipeline.from_pretrained("{name}", upsampler="this folder")\n'
        f'image = pipe("{_quoted(facts.prompts)}", height={settings.size}, width={settings.size}, start={settings.start:g}).images[0]\n```',
        "## Training",
        f"Algorithm 1 of the paper: {settings.steps:,} steps of {settings.batch} samples out of the {facts.train_samples:,} pictures in the train split of "
        f"`{facts.dataset}` ({epochs:.1f} epochs); noise MSE at timesteps below K = {settings.start:g} T. The published weights are the moving average.",
        markdown_table("setting", flattened(settings.what())),
        "Loss, mean over the steps of a row:",
        _curve(log),
    ]
    if facts.prompts:
        sections += [
            "## Previews",
            "Captions of the tune split, which was not trained on, one fixed seed each: the base, the cascade without this upsampler, the cascade with it.",
            "![previews](previews/sheet.png)",
        ]
    sections += [
        "## Licence",
        f"Pictures: {PICTURES.get(facts.source, f'those of `{facts.dataset}` (source: {facts.source}); their own licence applies.')}",
        f"Base: the licence of `{name}` governs what is made with it and this upsampler together.",
    ]
    return "\n\n".join(sections) + "\n"


def _curve(log: Sequence[Mapping[str, float]]) -> str:
    lines = ["| steps | loss | learning rate |", "|---|---|---|"]
    for row in range(min(ROWS, len(log))):
        part = log[row * len(log) // min(ROWS, len(log)) : (row + 1) * len(log) // min(ROWS, len(log))]
        loss = sum(step["loss"] for step in part) / len(part)
        lines.append(f"| {part[0]['step']:.0f} to {part[-1]['step']:.0f} | {loss:.4f} | {part[-1]['lr']:.2e} |")
    return "\n".join(lines)


def markdown_table(heading: str, rows: Mapping[str, Any]) -> str:
    """Two columns: ``heading`` and value."""
    return "\n".join([f"| {heading} | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one level of dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _quoted(prompts: Sequence[str]) -> str:
    return prompts[0].replace("\\", " ").replace('"', "'") if prompts else "a red apple"
