"""`selfcascade ls|show|lineage|links|look|pull|verify|purge`: what is in the store, taken out, checked, and removed on request."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from selfcascade_flows.store_commands import Config, Debug, Set, readable, store_settings

Reference = Annotated[str, typer.Argument(metavar="ARTIFACT", help="kind/name, kind/name@version, or an s3:// URI.")]
Format = Literal["text", "csv", "json"]
Form = Literal["text", "mermaid", "dot"]


def ls(
    what: Annotated[str, typer.Argument(metavar="[KIND[/NAME]]", help="Only this kind, or this artifact.")] = "",
    config: Config = "demo",
    set_: Set = None,
    debug: Debug = False,
) -> None:
    """List published artifacts, oldest first; * marks what consumers get."""
    from selfcascade.storage import Store
    from selfcascade.storage.listing import listing

    with Store.open(store_settings(config, set_), read_only=True) as store:
        rows = listing(store, what.strip("/"))
        for row in rows:
            mark = "*" if row.is_latest else " "
            counts = ", ".join(f"{name} {value}" for name, value in row.counts.items())
            typer.echo(f"{mark} {row.ref!s:50} {row.published:%Y-%m-%d %H:%M}  {row.objects:5} objects  {readable(row.bytes):>10}  {counts}"[:200].rstrip())
        if not rows:
            typer.echo(f"nothing is published{f' under {what}' if what else ''} in {store.uri('')}")


def show(
    artifact: Reference,
    config: Config = "demo",
    set_: Set = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as it is stored.")] = False,
    debug: Debug = False,
) -> None:
    """Show what an artifact is made of and from."""
    from selfcascade.storage import Store, resolve

    with Store.open(store_settings(config, set_), read_only=True) as store:
        found = resolve(store, artifact)
        manifest = found.manifest()
        if as_json:
            typer.echo(manifest.to_bytes().decode(), nl=False)
            return
        typer.echo(f"{manifest.kind}/{manifest.name}@{manifest.version}\n{found.ref.uri}\n")
        for title, tree in (("counts", manifest.counts), ("inputs", manifest.inputs), ("settings", manifest.settings)):
            typer.echo(f"{title}\n{_indented(tree)}")
        typer.echo("objects")
        for entry in manifest.objects:
            typer.echo(f"  {entry.key:40} {readable(entry.size):>10}  {entry.sha256[:12]}{f'  from {entry.source}' if entry.source else ''}")


def pull(
    artifact: Reference,
    folder: Annotated[Path, typer.Argument(help="Where to; made when missing.")],
    config: Config = "demo",
    set_: Set = None,
    debug: Debug = False,
) -> None:
    """Download an artifact, checked; what is there already and right is kept, so that the same command goes on after a break."""
    from selfcascade.storage import Store, StoreError, resolve
    from selfcascade.storage.pulling import pull as pull_object

    with Store.open(store_settings(config, set_), read_only=True) as store:
        found = resolve(store, artifact)
        manifest = found.manifest()
        if folder.exists() and not folder.is_dir():
            raise StoreError(f"{folder} is not a folder; choose another one")
        total = sum(entry.size for entry in manifest.objects)
        with _progress(f"pull {found}", total) as advance, ThreadPoolExecutor(4) as pool:
            fetched = list(pool.map(lambda entry: pull_object(found, entry, folder, advance), manifest.objects))
        (folder / "manifest.json").write_bytes(manifest.to_bytes())
    typer.echo(f"{found} is in {folder}: {len(fetched)} objects, {readable(total)}; {sum(fetched)} fetched now")


def verify(artifact: Reference, config: Config = "demo", set_: Set = None, debug: Debug = False) -> None:
    """Read every object of an artifact and compare it with the manifest. Exit code 2 when one is missing or damaged."""
    from selfcascade.storage import IntegrityError, Store, resolve
    from selfcascade.storage.verification import verify as verify_objects

    with Store.open(store_settings(config, set_), read_only=True) as store:
        found = resolve(store, artifact)
        total = sum(entry.size for entry in found.manifest().objects)
        with _progress(f"verify {found}", total) as advance:
            findings = verify_objects(found, progress=advance)
    for finding in findings:
        if finding.state != "sound":
            typer.echo(f"{finding.state:8} {finding.key}  {finding.detail}")
    broken = [finding for finding in findings if not finding.is_sound]
    if broken:
        raise IntegrityError(f"{found}: {len(broken)} of {len(findings)} objects are not as committed, first {broken[0].key}; restore them from a copy")
    purged = sum(finding.state == "purged" for finding in findings)
    typer.echo(f"{found} is sound: {len(findings)} objects, {readable(total)}{f'; {purged} rewritten by a purge' if purged else ''}")


def links(
    artifact: Reference,
    expires: Annotated[str, typer.Option("--expires", help="How long they work: 90s, 30m, 1h, at most 7d.")] = "1h",
    form: Annotated[Format, typer.Option("--format", help="text: a URL a line; csv and json: with key, size, SHA-256 and expiry.")] = "text",
    config: Config = "demo",
    set_: Set = None,
    debug: Debug = False,
) -> None:
    """Print a link to every object of an artifact that works without keys until it expires. Whoever has it can read that object."""
    from selfcascade.storage import Store, embedded, resolve
    from selfcascade.storage.links import duration, written
    from selfcascade.storage.links import links as links_of

    lasting = duration(expires)
    with Store.open(store_settings(config, set_), read_only=True) as store:
        found = resolve(store, artifact)
        typer.echo(written(found, links_of(found, lasting), form), nl=False)
        if store.is_embedded and not embedded.status(store.settings.folder).daemon:
            typer.echo("the embedded store goes with its last user, and its links with it; `selfcascade store start` keeps it", err=True)


def lineage(
    artifact: Reference,
    form: Annotated[Form, typer.Option("--format", help="text: a tree; mermaid and dot: a graph for Markdown or Graphviz.")] = "text",
    config: Config = "demo",
    set_: Set = None,
    debug: Debug = False,
) -> None:
    """Show what an artifact was made from, back to its sources; what is missing meanwhile is named."""
    from selfcascade.storage import Store, resolve
    from selfcascade.storage.drawing import drawn
    from selfcascade.storage.lineage import walk

    with Store.open(store_settings(config, set_), read_only=True) as store:
        found = resolve(store, artifact)
        typer.echo(drawn(walk(store, {found.ref.kind: found.ref}), form), nl=False)


def look(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="datasets/name, datasets/name@version, or an s3:// URI.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file to write.")] = Path("dataset.html"),
    pictures: Annotated[int, typer.Option("--pictures", min=0, max=1000, help="Pictures on the page.")] = 48,
    config: Config = "demo",
    set_: Set = None,
    debug: Debug = False,
) -> None:
    """Write a page about a dataset: pictures, counts, what was left out and why, distributions of sizes, captions and scores."""
    from selfcascade.curation.page import render_page
    from selfcascade.curation.statistics import statistics_of
    from selfcascade.settings import SettingsError
    from selfcascade.storage import Store, resolve

    with Store.open(store_settings(config, set_), read_only=True) as store:
        found = resolve(store, dataset, "datasets")
        page = render_page(statistics_of(found, pictures=pictures))
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"cannot write {out} ({error.strerror}); choose another --out") from None
    typer.echo(f"the page of {found} is {out}")


def purge(
    key: Annotated[list[str], typer.Option("--key", "-k", help="Key of a sample; repeatable.")],
    what: Annotated[str, typer.Argument(metavar="[KIND/NAME]", help="Only this dataset or these samples, all versions of it; default: everything.")] = "",
    reason: Annotated[str, typer.Option("--reason", help="Kept in the record.")] = "removal request",
    config: Config = "demo",
    set_: Set = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be touched, change nothing.")] = False,
    debug: Debug = False,
) -> None:
    """Remove samples from all versions of datasets and samples, and from the caches; a record stays. Cannot be undone."""
    from selfcascade.storage import Store
    from selfcascade.storage.purge import plan_purge
    from selfcascade.storage.purge import purge as purge_samples

    with Store.open(store_settings(config, set_), read_only=dry_run) as store:
        planned = plan_purge(store, key, what.strip("/"))
        for object_key in planned.rewritten:
            typer.echo(f"rewrite  {object_key}")
        for object_key in planned.deleted:
            typer.echo(f"delete   {object_key}  (of an unfinished run, which makes it again)")
        typer.echo(f"delete   cache/  ({planned.caches} objects)")
        for name in planned.derived:
            typer.echo(f"note     {name} was made from an affected artifact and is not changed")
        if dry_run:
            return
        if not yes and not (sys.stdin.isatty() and typer.confirm("Remove them for good?")):
            typer.echo("nothing was removed; --yes removes without asking")
            return
        record = purge_samples(store, planned, reason=reason)
        typer.echo(f"removed; the record is {store.uri(record)}")


def add_artifact_commands(app: typer.Typer) -> None:
    """Register the commands of this module on ``app``."""
    for command in (ls, show, lineage, links, look, pull, verify, purge):
        app.command()(command)


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes when a terminal watches and there is something to wait for; else nothing."""
    if not sys.stderr.isatty() or total < 32 * 2**20:
        yield lambda size: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda size: bar.advance(task, size)


def _indented(tree: object) -> str:
    return "".join(f"  {line}\n" for line in json.dumps(tree, indent=1, ensure_ascii=False).splitlines()[1:-1])
