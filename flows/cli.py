"""The command line: stages, artifacts, store. Commands import what they need when they run, so that `--help` is quick."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from selfcascade_flows.artifact_commands import add_artifact_commands
from selfcascade_flows.check import check
from selfcascade_flows.claims import claims
from selfcascade_flows.params import params
from selfcascade_flows.stages import Stage
from selfcascade_flows.status import status
from selfcascade_flows.store_commands import store_app
from selfcascade_flows.upsampler_commands import upsampler_app

Config = Annotated[str, typer.Option("--config", "-c", metavar="NAME-OR-PATH", help="A shipped run, or a settings file of your own.")]
Set = Annotated[list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change a setting, such as adaptation.steps=400; repeatable.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show settings, planned and finished work, bytes and time; write nothing.")]
MaxHours = Annotated[float | None, typer.Option("--max-hours", min=0, help="Do not start work that is estimated to take longer.")]
MaxBytes = Annotated[int | None, typer.Option("--max-bytes", min=0, help="Do not start work that is estimated to store more.")]
Sets = Annotated[list[str] | None, typer.Argument(metavar="SET", help="Sets of pictures to compare; the first is the reference.")]
Json = Annotated[bool, typer.Option("--json", help="With SETs: print one JSON object.")]
Statistics = Annotated[Path | None, typer.Option("--statistics", metavar="FILE.npz", help="With SETs: write the statistics of the first there.")]
Clips = Annotated[bool, typer.Option("--clips", help="The SETs are folders of clips: FVD and KVD by I3D.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the log of every step.")]

INTERRUPTED = 130
QUIET = {
    # One bar a stage is enough: those of every model that a worker loads would write over it.
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    # Workers leave at once when they are told to; what they held is tidied up after them, and is no leak.
    "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning",
}
"""Variables that libraries and child processes look at; what the user has set stays."""

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]}
)


@app.callback()
def _root(debug: Debug = False) -> None:
    """Self-Cascade: adapt a diffusion model to higher resolution, sample with it, and measure the result."""


def _add_stage(name: Stage, summary: str) -> None:
    def command(
        config: Config = "demo",
        set_: Set = None,
        dry_run: DryRun = False,
        max_hours: MaxHours = None,
        max_bytes: MaxBytes = None,
        debug: Debug = False,
    ) -> int:
        from selfcascade_flows.configuration import load
        from selfcascade_flows.launch import launch

        return launch(name, load(config, set_), dry_run=dry_run, max_hours=max_hours, max_bytes=max_bytes, debug=debug)

    app.command(name, help=summary)(command)


_add_stage("curate", "Turn a pile of captioned pictures into a clean dataset.")
_add_stage("pretrain", "Train a small base model on a dataset.")
_add_stage("adapt", "Train a feature upsampler on a dataset and a frozen base.")
_add_stage("generate", "Sample prompts by one method.")


@app.command()
def evaluate(
    sets: Sets = None,
    config: Config = "demo",
    set_: Set = None,
    as_json: Json = False,
    statistics: Statistics = None,
    clips: Clips = False,
    dry_run: DryRun = False,
    max_hours: MaxHours = None,
    max_bytes: MaxBytes = None,
    debug: Debug = False,
) -> int:
    """Measure samples against real pictures and write the report; or print how far SETs of pictures are from the first of them.

    A SET is a folder of pictures, an .npz file with the statistics of a FID tool, or an artifact such as samples/demo-direct or datasets/demo. With --clips
    it is a folder whose entries are clips (folders of frames, .npy of (T, H, W, 3) uint8, animated pictures), or one .npy of (N, T, H, W, 3).
    """
    from selfcascade_flows.configuration import load

    if sets is None:
        from selfcascade_flows.launch import launch

        given = {"--json": as_json, "--statistics": statistics is not None, "--clips": clips}
        _refuse(given, "goes with SETs; give at least one, or leave it out")
        return launch("evaluate", load(config, set_), dry_run=dry_run, max_hours=max_hours, max_bytes=max_bytes, debug=debug)
    from selfcascade_flows.sets import compare_sets

    budgets = {"--dry-run": dry_run, "--max-hours": max_hours is not None, "--max-bytes": max_bytes is not None}
    _refuse(budgets, "goes with a report; SETs are compared at once and nothing is stored; leave it out")
    if clips:
        from selfcascade_flows.clips import compare_clip_sets

        _refuse({"--statistics": statistics is not None}, "is of pictures, not of clips; leave it out")
        return compare_clip_sets(load(config, set_), sets, as_json=as_json)
    return compare_sets(load(config, set_), sets, as_json=as_json, statistics=statistics)


def _refuse(given: dict[str, bool], why: str) -> None:
    """An option that would do nothing is a mistake of the user's."""
    from selfcascade.settings import SettingsError

    for option, is_given in given.items():
        if is_given:
            raise SettingsError(f"{option} {why}")


_add_stage("run", "All stages: curate, adapt, generate by every method, evaluate.")


add_artifact_commands(app)
app.add_typer(store_app, name="store")
app.add_typer(upsampler_app, name="upsamplers")


@app.command()
def serve(
    config: Config = "demo", set_: Set = None, port: Annotated[int, typer.Option(help="Port of the Prefect server.")] = 4200, debug: Debug = False
) -> None:
    """Serve the flows: a Prefect server with its UI, and a process that runs what is started there."""
    from selfcascade_flows.configuration import load
    from selfcascade_flows.serve import serve as serve_flows

    serve_flows(load(config, set_), port=port)


@app.command()
def deploy(
    file: Annotated[Path | None, typer.Option("--file", "-f", help="What the server is to hold; default: the shipped infra/prefect.yaml.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change, change nothing.")] = False,
    debug: Debug = False,
) -> int:
    """Bring a Prefect server to a file: work pools, deployments with schedules, automations. Again, it changes nothing."""
    from selfcascade_flows.deploy import deploy as deploy_file

    return deploy_file(file, dry_run=dry_run)


app.command()(status)
app.command()(params)
app.command()(check)
app.command()(claims)


@app.command()
def configs() -> None:
    """List the shipped runs."""
    from selfcascade_flows.configuration import FOLDER, shipped

    names = shipped()
    for name in names:
        summary = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        typer.echo(f"{name:{max(map(len, names))}}  {summary}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 0, 2 with one line for what the user can change, 130 after Ctrl-C, 1 for the rest."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        code = int(app(arguments, prog_name="selfcascade", standalone_mode=False) or 0)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        return 1
    except Exception as error:
        if hasattr(error, "show"):  # an error of the parser, which typer takes from click or brings itself
            error.show()
            return 2
        if debug:
            raise
        return _report(error)
    if code == INTERRUPTED:  # typer, by its version, makes a code or an exception of Ctrl-C
        print("selfcascade: interrupted; the same command goes on from here", file=sys.stderr)
    return code


def _report(error: Exception) -> int:
    from selfcascade.settings import SettingsError

    expected = isinstance(error, SettingsError)
    text = " ".join(str(error).split())
    print(f"selfcascade: {text}" if expected else f"selfcascade: {type(error).__name__}: {text} (--debug shows where)", file=sys.stderr)
    return 2 if expected else 1


if __name__ == "__main__":
    sys.exit(main())
