"""The model card of what was trained: what it belongs to, what it was made from, how its training went. No clock, no host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import yaml

from selfcascade.config import AdaptationSettings

if TYPE_CHECKING:
    from selfcascade.adaptation.validation import TimestepBin

ROWS = 10
"""Rows of the loss table."""
PICTURES = {
    "twemoji": "Twemoji graphics, copyright Twitter and contributors, CC-BY 4.0 (https://creativecommons.org/licenses/by/4.0/).",
}
"""Licence of the pictures by kind of source, where it is known."""
VARIANTS = {
    "A": "one bilinear enlargement and two residual blocks with time embedding a level, as the paper describes the layers",
    "B": "the layers of the authors' released code, whose nearest-neighbour enlargement is inside the first residual block",
    "C": "the paper's structure with every weight shared by the channels of a group",
    "D": "the paper's structure inside a subspace of four directions a level, fitted to features of the base",
}

BESIDE = ", and no weight of the base, which it needs and does not change"
TUNED = ("The base's own loss at the target size", "noise MSE, or that of the velocity where the base predicts it, at timesteps over all of T.")


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
    steps: int
    """Optimizer steps that were taken."""
    published_step: int
    """Step whose moving average is published."""
    validation_samples: int
    """Pictures of a validation; 0: there was none."""
    bins: Sequence[TimestepBin]
    """Of the validations; none for a latent upscaler."""
    parameters: int
    fitted: int
    """Numbers that were fitted to features of the base and then kept fixed."""
    channels: Sequence[int]
    """Of a feature upsampler's four feature maps."""
    errors: Mapping[str, float]
    """Of a latent upscaler: root mean square error of the latents of the tune split, learned and bilinear."""
    prompts: Sequence[str]
    """Of the previews."""


def model_card(facts: Facts, settings: AdaptationSettings, log: Sequence[Mapping[str, float]]) -> str:
    """Markdown with a front matter that model hubs read.

    Args:
        facts: of the run.
        settings: of the run.
        log: of each step ``step``, ``loss``, ``lr`` and ``grad_norm``, and of some ``validation`` and ``validation_t0_99`` for each bin.
    """
    name = _name(facts)
    words = WORDS[settings.trainable](facts, settings)
    epochs = facts.steps * settings.batch / facts.train_samples
    front = {"library_name": "diffusers", "tags": ["text-to-image", "self-cascade", words.tag], "base_model": name}
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {facts.title}",
        f"{words.what} It holds {_numbers(facts)}{words.on}.",
        f"```python\n{words.snippet}\n```",
        "## Training",
        f"{words.training[0]}: {facts.steps:,} steps of {settings.batch} samples out of the {facts.train_samples:,} pictures in the train split of "
        f"`{facts.dataset}` ({epochs:.1f} epochs); {words.training[1]} {_published(facts, settings)}",
        markdown_table("setting", flattened(settings.what())),
        "Loss, mean over the steps of a row:",
        _curve(log),
    ]
    validated = [row for row in log if row.get("validation") is not None]
    if validated:
        sections += [_validations_told(facts), _validations(facts, validated)]
    if facts.prompts:
        sections += [
            "## Previews",
            f"Captions of the tune split, which was not trained on, one fixed seed each: {words.previews}.",
            "![previews](previews/sheet.png)",
        ]
    sections += [
        "## Licence",
        f"Pictures: {PICTURES.get(facts.source, f'those of `{facts.dataset}` (source: {facts.source}); their own licence applies.')}",
        f"Base: the licence of `{name}` governs what is made with {'it' if settings.trainable == 'full' else 'it and these weights together'}.",
    ]
    return "\n\n".join(sections) + "\n"


@dataclass(frozen=True)
class _Words:
    """What differs between cards."""

    tag: str
    what: str
    on: str
    snippet: str
    training: tuple[str, str]
    previews: str


def _feature_upsampler(facts: Facts, settings: AdaptationSettings) -> _Words:
    variant = settings.upsampler.variant
    return _Words(
        tag="feature-upsampler",
        what=f"Time-aware feature upsampler of Self-Cascade diffusion (arXiv 2402.10491), for the base `{facts.base}`, trained at {settings.size} x "
        f"{settings.size} pixels. Variant {variant}: {VARIANTS[variant]}.",
        on=f" on features of {', '.join(str(width) for width in facts.channels)} channels{BESIDE}",
        snippet=_in_the_cascade(facts, settings, component="upsampler", call=f"start={settings.start:g}"),
        training=("Algorithm 1 of the paper", f"noise MSE at timesteps below K = {settings.start:g} T."),
        previews="the base, the cascade without this upsampler, the cascade with it",
    )


def _latent_upscaler(facts: Facts, settings: AdaptationSettings) -> _Words:
    distance = {"l2": "mean squared", "l1": "mean absolute"}[settings.upscaler.loss]
    found = facts.errors
    errors = f" On the tune split its root mean square error is {found['learned']:.4f}, that of bilinear enlargement {found['bilinear']:.4f}." if found else ""
    return _Words(
        tag="latent-upscaler",
        what=f"Latent upscaler for Self-Cascade diffusion (arXiv 2402.10491), for the base `{facts.base}`, trained from {settings.size // 2} to "
        f"{settings.size} pixels a side: it makes the latent of a picture at up to twice the size from its latent, between the stages of a cascade or alone.",
        on=BESIDE,
        snippet=_in_the_cascade(facts, settings, component="latent_upscaler", call='upscale="learned"'),
        training=("Regression of the latent of a picture from the latent of the picture at half its size", f"{distance} error of latents.{errors}"),
        previews="the base, its latent enlarged bilinearly and decoded, its latent enlarged by this upscaler and decoded",
    )


def _lora(facts: Facts, settings: AdaptationSettings) -> _Words:
    return _Words(
        tag="lora",
        what=f"LoRA of rank {settings.rank} on every linear layer of the UNet of the base `{facts.base}`, trained at {settings.size} x {settings.size} pixels "
        "as a baseline for Self-Cascade diffusion (arXiv 2402.10491).",
        on=BESIDE,
        snippet=_alone(facts, settings, module="lora", argument="adapter")
        + '\n\n# or in diffusers, where the base is a stock pipeline\npipeline.load_lora_weights("this folder")',
        training=TUNED,
        previews="the base, the base asked for the target size at once, the same with this LoRA",
    )


def _full(facts: Facts, settings: AdaptationSettings) -> _Words:
    return _Words(
        tag="full-fine-tuning",
        what=f"The UNet of the base `{facts.base}`, all of its weights trained on at {settings.size} x {settings.size} pixels as a baseline for Self-Cascade "
        "diffusion (arXiv 2402.10491).",
        on=", and nothing else of the base, whose autoencoder and text encoder it needs",
        snippet=_alone(facts, settings, module="full", argument="unet") + '\n\n# or in diffusers\nunet = UNet2DConditionModel.from_pretrained("this folder")',
        training=TUNED,
        previews="the base, the base asked for the target size at once, the same with this UNet",
    )


def _in_the_cascade(facts: Facts, settings: AdaptationSettings, *, component: str, call: str) -> str:
    return "\n".join(
        (
            "from selfcascade import SelfCascadePipeline",
            f'pipe = SelfCascadePipeline.from_pretrained("{_name(facts)}", {component}="this folder")',
            f'image = pipe("{_quoted(facts.prompts)}", height={settings.size}, width={settings.size}, {call}).images[0]',
        )
    )


def _alone(facts: Facts, settings: AdaptationSettings, *, module: str, argument: str) -> str:
    return "\n".join(
        (
            "from selfcascade import SelfCascadePipeline",
            f"from selfcascade.baselines import {module}",
            f'pipe = SelfCascadePipeline.from_pretrained("{_name(facts)}")',
            f'image = {module}.sample(pipe, "{_quoted(facts.prompts)}", height={settings.size}, width={settings.size}, {argument}="this folder").images[0]',
        )
    )


WORDS: Mapping[str, Callable[[Facts, AdaptationSettings], _Words]] = MappingProxyType(
    {"upsampler": _feature_upsampler, "latent-upscaler": _latent_upscaler, "lora": _lora, "full": _full}
)


def _name(facts: Facts) -> str:
    return facts.base.partition("@")[0]


def _numbers(facts: Facts) -> str:
    return f"{facts.parameters:,} trained and {facts.fitted:,} fitted numbers" if facts.fitted else f"{facts.parameters:,} numbers"


def _curve(log: Sequence[Mapping[str, float]]) -> str:
    lines = ["| steps | loss | learning rate |", "|---|---|---|"]
    for row in range(min(ROWS, len(log))):
        part = log[row * len(log) // min(ROWS, len(log)) : (row + 1) * len(log) // min(ROWS, len(log))]
        loss = sum(step["loss"] for step in part) / len(part)
        lines.append(f"| {part[0]['step']:.0f} to {part[-1]['step']:.0f} | {loss:.4f} | {part[-1]['lr']:.2e} |")
    return "\n".join(lines)


def _published(facts: Facts, settings: AdaptationSettings) -> str:
    if settings.early_stop is None:
        return "The published weights are the moving average."
    ended = f"Training ended early, {settings.early_stop} validations after the best one. " if facts.steps < settings.steps else ""
    return f"{ended}The published weights are the moving average at step {facts.published_step:,}, the best validation."


def _validations_told(facts: Facts) -> str:
    pictures = f"{facts.validation_samples} pictures of the tune split, which was not trained on"
    if not facts.bins:
        return f"Validation: the same loss of the moving average on {pictures}:"
    return f"Validation: mean squared error of the moving average on {pictures}, at fixed noise and timesteps t:"


def _validations(facts: Facts, log: Sequence[Mapping[str, float]]) -> str:
    columns = {"loss": "validation"} | {f"t = {bin_.first} to {bin_.last}": f"validation_{bin_.name}" for bin_ in facts.bins}
    lines = [f"| step | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    count = min(ROWS, len(log))
    for row in (log[(place + 1) * len(log) // count - 1] for place in range(count)):
        lines.append(f"| {row['step']:.0f} | " + " | ".join(f"{row[name]:.4f}" for name in columns.values()) + " |")
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
