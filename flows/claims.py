"""`selfcascade claims`: the measurements behind ``docs/claims.md``. Each piece is a shipped run; small tables of its report are kept in a folder."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from selfcascade.config import PipelineSettings
    from selfcascade.evaluation.replicates import Replicates
    from selfcascade.evaluation.results import Results
    from selfcascade.storage import ArtifactRef, Store
    from selfcascade_tasks.record import StageCost

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
    """By label of the samples: seconds, cpu_seconds, pictures, peak_bytes, parameters."""
    stages: Mapping[str, float]
    """Wall seconds by stage."""
    training: Mapping[str, Mapping[str, float]]
    """By label of the samples: steps and cpu_seconds of what was trained for them; none where nothing was."""
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
    from selfcascade_tasks.record import earlier_costs
    from selfcascade_tasks.times import times_of

    results, artifact = read_results(store, ref), Artifact(store, ref)
    times, spent = times_of(store, ref, results), earlier_costs(store)
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    (place / TAKEN).unlink(missing_ok=True)
    for key in (METRICS_JSON, REPLICATES):
        (place / key).write_bytes(artifact.read(key))
    taken = {
        "settings": settings.digest(),
        "report": str(ref),
        "costs": {row.label: asdict(times.methods[row.label]) | _spent(spent, [row.artifact]) for row in results.rows if row.label in times.methods},
        "stages": dict(times.stages),
        "training": {row.label: training for row in results.rows if (training := _training(store, spent, row.artifact))},
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
    return Piece(name, results, replicates, taken["costs"], taken["stages"], taken["training"], taken["machine"])


def _training(store: Store, costs: Sequence[StageCost], samples: str) -> dict[str, float]:
    """Optimizer steps and processor seconds of what was trained for ``samples``; empty where nothing was."""
    from selfcascade.storage import resolve
    from selfcascade_tasks.times import TRAINED

    inputs = resolve(store, samples).manifest().inputs
    found = [resolve(store, f"{kind}/{inputs[role]}") for role, kind in TRAINED.items() if role in inputs]
    if not found:
        return {}
    return {"steps": sum(int(artifact.manifest().settings["steps"]) for artifact in found)} | _spent(costs, [str(artifact.ref) for artifact in found])


def _spent(costs: Sequence[StageCost], artifacts: Collection[str]) -> dict[str, float]:
    """Processor seconds that units of the artifacts took, which other work on the machine does not lengthen as it does the clock's."""
    return {"cpu_seconds": sum(cost.cpu_seconds for cost in costs if cost.artifact in artifacts)}


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
