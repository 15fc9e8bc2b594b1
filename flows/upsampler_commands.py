"""`selfcascade upsamplers compare`: published upsamplers side by side."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selfcascade_flows.store_commands import Config, Debug, Set, store_settings

if TYPE_CHECKING:
    from rich.table import Table

    from selfcascade.adaptation.comparison import Comparison

TOLD = ("upsampler.variant", "steps")
"""Settings that the table has rows for already."""

upsampler_app = typer.Typer(no_args_is_help=True, help="Published upsamplers: compare.", rich_markup_mode=None)


@upsampler_app.callback()
def _group() -> None:
    """Keeps the name of the one command."""


@upsampler_app.command()
def compare(
    upsamplers: Annotated[list[str], typer.Argument(metavar="UPSAMPLER", help="NAME, NAME@version, or an s3:// URI; two or more.")],
    config: Config = "demo",
    set_: Set = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Compare published upsamplers: what they are, which settings differ, and their losses where base and data are the same."""
    from selfcascade.adaptation.comparison import compare as compared
    from selfcascade.storage import Store

    with Store.open(store_settings(config, set_), read_only=True) as store:
        found = compared(store, upsamplers)
    if as_json:
        typer.echo(json.dumps(as_object(found), indent=2))
        return
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    console.print(table(found))
    for line in obstacles(found):
        console.print(line, markup=False)


def table(found: Comparison) -> Table:
    """A column for each upsampler; losses only where they can be compared."""
    from rich.table import Table

    sides, made = found.sides, Table(box=None, padding=(0, 2, 0, 0))
    made.add_column("", no_wrap=True)
    for side in sides:
        made.add_column(f"{side.ref.name}@{side.ref.short}", justify="right", overflow="fold")

    def add(name: str, values: list[Any]) -> None:
        made.add_row(name, *("-" if value is None else f"{value:,}" if type(value) is int else str(value) for value in values))

    add("variant", [side.variant for side in sides])
    add("parameters", [side.parameters for side in sides])
    if any(side.fitted for side in sides):
        add("fitted numbers", [side.fitted for side in sides])
    add("base", [_short(side.base) for side in sides])
    add("data", [side.dataset[:12] for side in sides])
    add("steps", [side.steps for side in sides])
    if any(side.best_step is not None for side in sides):
        add("published step", [side.best_step or side.steps for side in sides])
    for name, values in found.differing.items():
        if name in TOLD:
            continue
        add(name, [None if value is None else str(value) for value in values])
    if not found.obstacles_of_loss:
        add("loss", [f"{side.loss:.5f}" for side in sides])
    if not found.obstacles_of_validation:
        for name in sides[0].validation:
            _, _, bin_ = name.partition("_t")
            add(f"validation, t {bin_.replace('_', ' to ')}" if bin_ else "validation", [f"{side.validation[name]:.5f}" for side in sides])
    return made


def obstacles(found: Comparison) -> list[str]:
    """A line for what cannot be compared, with the reasons."""
    if found.obstacles:
        return [f"losses cannot be compared: {'; '.join(found.obstacles)}"]
    lines = {"losses in training": found.obstacles_of_loss, "validation losses": found.obstacles_of_validation}
    return [f"{what} cannot be compared: {'; '.join(reasons)}" for what, reasons in lines.items() if reasons]


def as_object(found: Comparison) -> dict[str, Any]:
    """All of it as JSON values; losses are there also where they cannot be compared, which ``obstacles`` says."""
    return {
        "upsamplers": [
            {
                "artifact": str(side.ref),
                "version": side.ref.version,
                "variant": side.variant,
                "parameters": side.parameters,
                "fitted": side.fitted,
                "base": side.base,
                "dataset": side.dataset,
                "steps": side.steps,
                "best_step": side.best_step,
                "loss": side.loss,
                "validation": dict(side.validation),
            }
            for side in found.sides
        ],
        "differing_settings": found.differing,
        "obstacles": {"loss": found.obstacles_of_loss, "validation": found.obstacles_of_validation},
    }


def _short(base: str) -> str:
    name, _, version = base.partition("@")
    return f"{name}@{version[:12]}" if version else name
