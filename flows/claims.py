"""`selfcascade claims`: the measurements behind ``docs/claims.md``. Each piece is a shipped run; small tables of its report are kept in a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from selfcascade.config import PipelineSettings
    from selfcascade.evaluation.replicates import Replicates
    from selfcascade.evaluation.results import Results
    from selfcascade.storage import ArtifactRef, Store

Names = Annotated[list[str] | None, typer.Argument(metavar="PIECE", help="Pieces to measure, such as claims-4x; all that ship, if none is given.")]
Folder = Annotated[Path, typer.Option("--folder", help="Where the small tables are kept.")]
Again = Annotated[bool, typer.Option("--again", help="Keep the tables anew of a piece that is on record.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the log of every step.")]

FOLDER = Path("docs/results/claims")
TAKEN = "taken.json"
"""Of a piece: what it took, beside the report's own files."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A measured piece, as it was kept."""

    name: str
    results: Results
    replicates: Replicates
    costs: Mapping[str, Mapping[str, Any]]
    """By label of the samples: seconds, pictures, peak_bytes, parameters."""
    stages: Mapping[str, float]
    """Wall seconds by stage."""
    steps: Mapping[str, int]
    """Optimizer steps by label; none where nothing is trained."""
    machine: str


def pieces() -> list[str]:
    """Names of the shipped runs that are pieces."""
    from selfcascade_flows.configuration import shipped

    return [name for name in shipped() if name.startswith("claims-")]


def is_on_record(folder: Path, name: str, settings: PipelineSettings) -> bool:
    """Whether ``folder`` has the piece, measured with these settings."""
    path = folder / name / TAKEN
    return path.is_file() and bool(json.loads(path.read_bytes())["settings"] == settings.digest())


def record(folder: Path, name: str, settings: PipelineSettings, store: Store, ref: ArtifactRef) -> None:
    """Keep the small tables of the report ``ref`` of the piece ``name``; what it took comes last and makes it whole."""
    from selfcascade.evaluation.published import METRICS_JSON, REPLICATES, read_results
    from selfcascade.storage import Artifact
    from selfcascade_tasks.times import times_of

    results, artifact = read_results(store, ref), Artifact(store, ref)
    times = times_of(store, ref, results)
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    (place / TAKEN).unlink(missing_ok=True)
    for key in (METRICS_JSON, REPLICATES):
        (place / key).write_bytes(artifact.read(key))
    taken = {
        "settings": settings.digest(),
        "report": str(ref),
        "costs": {label: asdict(cost) for label, cost in times.methods.items()},
        "stages": dict(times.stages),
        "steps": {row.label: steps for row in results.rows if (steps := _steps(store, row.artifact)) is not None},
        "machine": times.machine,
    }
    (place / TAKEN).write_text(json.dumps(taken, indent=1, sort_keys=True) + "\n")


def read_piece(folder: Path, name: str) -> Piece | None:
    """The piece as :func:`record` kept it; None where it was never measured."""
    from selfcascade.evaluation.published import METRICS_JSON, REPLICATES
    from selfcascade.evaluation.replicates import Replicates
    from selfcascade.evaluation.results import Results

    place = folder / name
    if not (place / TAKEN).is_file():
        return None
    taken = json.loads((place / TAKEN).read_bytes())
    results = Results.model_validate_json((place / METRICS_JSON).read_bytes())
    replicates = Replicates.of_parquet((place / REPLICATES).read_bytes())
    return Piece(name, results, replicates, taken["costs"], taken["stages"], taken["steps"], taken["machine"])


def _steps(store: Store, samples: str) -> int | None:
    """Optimizer steps of what was trained for ``samples``."""
    from selfcascade.storage import resolve
    from selfcascade_tasks.times import TRAINED

    inputs = resolve(store, samples).manifest().inputs
    found = [resolve(store, f"{kind}/{inputs[role]}").manifest().settings for role, kind in TRAINED.items() if role in inputs]
    return sum(int(settings["steps"]) for settings in found) if found else None


def claims(names: Names = None, folder: Folder = FOLDER, again: Again = False, debug: Debug = False) -> int:
    """Measure the paper's claims piece by piece, and keep the small tables of each.

    A piece is a shipped run whose name begins with claims-. One that is on record with the settings that it has now is left alone; one that was interrupted
    goes on where the store has it.
    """
    from selfcascade.settings import SettingsError
    from selfcascade.storage import resolve
    from selfcascade_flows.configuration import load
    from selfcascade_flows.launch import launch
    from selfcascade_tasks.store import opened

    if unknown := set(names or ()) - set(pieces()):
        raise SettingsError(f"{min(unknown)!r} is no piece; there are {', '.join(pieces())}")
    for name in names or pieces():
        settings = load(name)
        if is_on_record(folder, name, settings) and not again:
            typer.echo(f"{name} is on record: {folder / name}", err=True)
            continue
        code = launch("run", settings, dry_run=False, max_hours=None, max_bytes=None, debug=debug)
        if code:
            return code
        store = opened(settings.store)
        record(folder, name, settings, store, resolve(store, f"reports/{settings.evaluation.name}").ref)
        typer.echo(f"Tables:  {folder / name}")
    return 0
