"""`selfcascade check`: the method's own checks on a user's base and device."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Literal

import typer

Base = Annotated[str, typer.Option("--base", "-b", metavar="BASE", help="Shipped base, folder, hub id, or bases/name.")]
Device = Annotated[str, typer.Option("--device", help="Torch device: auto, cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option("--dtype", help="Precision of UNet, text encoders and upsampler.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object a line instead of the table.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def check(base: Base = "tiny-emoji", device: Device = "auto", dtype: Dtype = "float32", as_json: Json = False, debug: Debug = False) -> int:
    """Check the method on a base and a device: pass or fail, seconds, peak memory."""
    from selfcascade.generation.checks import run_checks
    from selfcascade.generation.models import load_pipeline

    pipeline = load_pipeline(base, dtype=dtype, device=device)
    if not as_json:
        typer.echo(f"{base} on {pipeline.device}, {dtype}")
    passed = True
    for outcome in run_checks(pipeline):
        passed &= outcome.passed
        if as_json:
            typer.echo(json.dumps(asdict(outcome)))
            continue
        peak = "" if outcome.peak_mb is None else f"{outcome.peak_mb:,.0f} MiB"
        typer.echo(f"{'pass' if outcome.passed else 'FAIL'}  {outcome.claim:50}{outcome.seconds:8.1f} s  {peak:>12}  {outcome.found}")
    return 0 if passed else 1
