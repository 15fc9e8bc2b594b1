"""`selfcascade params`: the ladder of parameter counts of every family of bases, beside what the paper states. Nothing is downloaded."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from diffusers import ModelMixin

Base = Annotated[
    str | None, typer.Option("--base", "-b", metavar="NAME-OR-FOLDER", help="A published base by its short name or hub id, a shipped one, or a folder.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, counts by base.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def params(base: Base = None, as_json: Json = False, debug: Debug = False) -> None:
    """Count what each way of adapting a base trains: full, LoRA, the feature upsamplers."""
    from selfcascade.cascade.ladder import CLAIM, ladder
    from selfcascade.cascade.published import PUBLISHED

    names = [*PUBLISHED, *_shipped()] if base is None else [base]
    ladders = {name: ladder(_unet(name)) for name in names}
    if as_json:
        counts = {name: [asdict(rung) for rung in rungs] for name, rungs in ladders.items()}
        typer.echo(json.dumps({"claim": CLAIM, "bases": counts}, indent=2))
        return
    for name, rungs in ladders.items():
        title = f"{name}  ({PUBLISHED[name].title})" if name in PUBLISHED else name
        typer.echo(f"{title}\n{'':40}{'trained':>15}{'fitted':>10}{'x 0.002M':>12}")
        for rung in rungs:
            typer.echo(f"  {rung.name:38}{rung.trained:>15,}{f'{rung.fitted:,}' if rung.fitted else '':>10}{_times(rung.against_the_claim):>12}")
        typer.echo()
    typer.echo(_conclusion())


def _unet(name: str) -> ModelMixin:
    """The UNet of a base on the meta device, from its configuration."""
    import torch
    from diffusers import UNet2DConditionModel, UNet3DConditionModel

    from selfcascade.bases import SHIPPED
    from selfcascade.cascade.published import PUBLISHED, published_unet
    from selfcascade.settings import SettingsError

    known_as = {base.hub: short for short, base in PUBLISHED.items()}
    folder = Path(name) if Path(name).is_dir() else SHIPPED / name
    with torch.device("meta"):
        if known_as.get(name, name) in PUBLISHED:
            return published_unet(known_as.get(name, name))
        if not folder.is_dir():
            raise SettingsError(f"base {name!r} is neither a folder nor one of {', '.join([*PUBLISHED, *_shipped()])}; give one of these")
        config = folder / "unet" / "config.json"
        if not config.is_file():
            raise SettingsError(f"base {name!r} has no unet/config.json; give the folder of a diffusers pipeline")
        settings = json.loads(config.read_text(encoding="utf-8"))
        network = UNet3DConditionModel if settings.get("_class_name") == "UNet3DConditionModel" else UNet2DConditionModel
        return network.from_config(settings)


def _shipped() -> list[str]:
    from selfcascade.bases import SHIPPED

    return sorted(index.parent.name for index in SHIPPED.glob("*/model_index.json"))


def _times(factor: float) -> str:
    return f"{factor:,.0f}" if factor >= 10 else f"{factor:.2f}"


def _conclusion() -> str:
    """What the counts say of the paper's claim, at the widths of the bases that the paper uses."""
    from selfcascade.cascade.ladder import ladder

    rungs = {rung.name: rung for rung in ladder(_unet("sd-2.1-base"))}
    layers, scale = rungs["A, the paper's layers"], rungs["one scale a channel, nothing else"]
    return (
        "The paper states 0.002M for four upsamplers of two residual blocks. On features of SD 1.5, SD 2.1, SDXL and text-to-video those layers hold "
        f"{layers.trained:,}, {_times(layers.against_the_claim)} times that, and one scale a channel alone {scale.trained:,}: no ordinary residual block fits. "
        "C and D do, and are designs of our own."
    )
