"""`selfcascade store …`: the embedded server, and the collection of garbage in any store."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from selfcascade.config import StoreSettings
    from selfcascade.storage.collect import Collection
    from selfcascade.storage.embedded import Status
    from selfcascade.storage.retention import Rules

Config = Annotated[str, typer.Option("--config", "-c", metavar="NAME-OR-PATH", help="A shipped run, or a settings file of your own: its store is meant.")]
Set = Annotated[list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change a setting, such as store.folder=/data/store; repeatable.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]

store_app = typer.Typer(no_args_is_help=True, help="The embedded object store: start, stop, status, gc.", rich_markup_mode=None)


@store_app.command()
def start(config: Config = "demo", set_: Set = None, debug: Debug = False) -> None:
    """Start the embedded server as a daemon, or make a running one stay."""
    from selfcascade.storage import embedded

    _show(embedded.start(_embedded(config, set_).folder))


@store_app.command()
def stop(
    config: Config = "demo", set_: Set = None, now: Annotated[bool, typer.Option("--now", help="Do not wait for its users.")] = False, debug: Debug = False
) -> None:
    """Let the embedded server go with its last user. Its data stay."""
    from selfcascade.storage import embedded

    _show(embedded.stop(_embedded(config, set_).folder, now=now))


@store_app.command()
def status(config: Config = "demo", set_: Set = None, debug: Debug = False) -> None:
    """Show where the store is, whether its server runs, and who uses it. Starts nothing."""
    from selfcascade.storage import embedded
    from selfcascade.storage.client import endpoint_of

    settings = store_settings(config, set_)
    endpoint = endpoint_of(settings)
    if endpoint is None:
        _show(embedded.status(settings.folder))
        return
    typer.echo(f"store    s3://{settings.bucket}/{settings.prefix} at {endpoint}")
    from selfcascade.storage import Store

    with Store.open(settings, read_only=True):
        typer.echo("state    answers")


@store_app.command()
def gc(
    config: Config = "demo",
    set_: Set = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go, delete nothing.")] = False,
    grace_hours: Annotated[float | None, typer.Option("--grace-hours", min=0, help="Leave younger objects alone; default: store.grace_hours.")] = None,
    cache: Annotated[bool, typer.Option("--cache", help="Delete caches too; they are made again when needed.")] = False,
    keep_last: Annotated[int | None, typer.Option("--keep-last", min=1, help="Let published artifacts go, but the newest so many of each name.")] = None,
    keep_days: Annotated[float | None, typer.Option("--keep-days", min=0, help="Let published artifacts go, but those younger than so many days.")] = None,
    kinds: Annotated[str | None, typer.Option("--kinds", metavar="KIND,…", help="Only of these kinds, such as samples,reports; default: all.")] = None,
    debug: Debug = False,
) -> None:
    """Delete what no published artifact refers to, nobody works on and is older than the grace period. Shows the plan first.

    Published artifacts go only with --keep-last or --keep-days: those that neither keeps, that latest does not point to, and that no artifact which stays
    was made from or shares objects with.
    """
    from selfcascade.storage import Store
    from selfcascade.storage.collect import collect, plan_collection

    grace = None if grace_hours is None else timedelta(hours=grace_hours)
    rules = _rules(keep_last, keep_days, kinds)
    with Store.open(store_settings(config, set_), read_only=dry_run) as store:
        planned = plan_collection(store, grace=grace, cache=cache, rules=rules)
        _show_plan(planned)
        if dry_run or not (planned.garbage or planned.uploads or planned.leases):
            return
        if not yes and not (sys.stdin.isatty() and typer.confirm("Delete these?")):
            typer.echo("nothing was deleted; --yes deletes without asking")
            return
        gone = collect(store, planned, grace=grace, cache=cache, rules=rules)
    artifacts = f", {len(gone.retired)} published artifacts among them" if gone.retired else ""
    typer.echo(
        f"deleted {len(gone.garbage)} objects, {readable(gone.bytes)}{artifacts}; {len(gone.uploads)} uploads, {len(gone.leases)} leases of dead processes"
    )


def _rules(keep_last: int | None, keep_days: float | None, kinds: str | None) -> Rules | None:
    from selfcascade.settings import SettingsError
    from selfcascade.storage.manifest import KINDS
    from selfcascade.storage.retention import Rules

    if keep_last is None and keep_days is None:
        if kinds is not None:
            raise SettingsError("--kinds says where rules apply, and there is none; add --keep-last or --keep-days")
        return None
    chosen = frozenset(KINDS if kinds is None else (kind.strip() for kind in kinds.split(",")))
    if not chosen <= set(KINDS):
        raise SettingsError(f"--kinds: {', '.join(sorted(chosen - set(KINDS)))!r} is no kind of artifact; there are {', '.join(KINDS)}")
    return Rules(keep_last, None if keep_days is None else timedelta(days=keep_days), chosen)


def store_settings(config: str, overrides: list[str] | None) -> StoreSettings:
    """The store of a run's settings."""
    from selfcascade_flows.configuration import load

    return load(config, overrides).store


def readable(size: int) -> str:
    """Bytes for people."""
    number = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def _embedded(config: str, overrides: list[str] | None) -> StoreSettings:
    from selfcascade.storage import StoreError
    from selfcascade.storage.client import endpoint_of

    settings = store_settings(config, overrides)
    endpoint = endpoint_of(settings)
    if endpoint is not None:
        raise StoreError(
            f"the store is the server at {endpoint}, which is not ours to start or stop; unset store.endpoint and AWS_ENDPOINT_URL for the embedded one"
        )
    return settings


def _show(found: Status) -> None:
    life = "stays until `selfcascade store stop`" if found.daemon else "goes with its last user"
    typer.echo(f"folder   {found.folder} ({readable(found.bytes)})")
    typer.echo(f"state    {f'runs at {found.url}, pid {found.pid}; {life}' if found.running else 'not running'}")
    if found.running:
        typer.echo(f"users    {', '.join(map(str, found.users)) or 'none'}")
        typer.echo(f"keys     {found.folder / 'credentials.json'}")
        typer.echo(f"log      {found.folder / 'weed.log'}")


def _show_plan(planned: Collection) -> None:
    groups: dict[tuple[str, str], list[int]] = {}
    for item in planned.garbage:
        groups.setdefault(("/".join(item.key.split("/")[:3]), item.reason), []).append(item.size)
    for (place, reason), sizes in sorted(groups.items()):
        typer.echo(f"{place}  {len(sizes)} objects, {readable(sum(sizes))}, {reason}")
    for upload in planned.uploads:
        typer.echo(f"{upload.key}  an upload that was never completed")
    for prefix in planned.needed:
        typer.echo(f"{prefix}  kept: an artifact that stays refers to it")
    if planned.at_work:
        typer.echo(f"no published artifact goes while somebody works on {', '.join(planned.at_work)}, who may read any; try again later")
    for prefix in planned.kept_leased:
        typer.echo(f"{prefix}  kept: somebody works on it")
    typer.echo(
        f"to delete: {len(planned.garbage)} objects, {readable(planned.bytes)}; {len(planned.uploads)} uploads; {len(planned.leases)} dead leases; "
        f"kept: {planned.kept_young} younger than the grace period"
    )
