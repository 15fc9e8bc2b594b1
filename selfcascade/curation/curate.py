"""Curation: plan, one unit, publish. A unit is a slice of the sorted listing and becomes one shard."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from selfcascade.config import CurationSettings, FilterSettings, TwemojiSource
from selfcascade.curation import filters, shards
from selfcascade.curation.duplicates import mark_duplicates
from selfcascade.curation.examples import Examples
from selfcascade.curation.increment import Before, Outcomes, Slice, cut, placed
from selfcascade.curation.listing import Listing
from selfcascade.curation.record import Entry, Picture, Rejected
from selfcascade.curation.sources import Source, fetching, open_source
from selfcascade.curation.splits import Split, split_of
from selfcascade.settings import SettingsError
from selfcascade.storage import Artifact, ArtifactRef, NotFound, Plan, Store, entry_of, withdrawn

_listed: dict[str, tuple[Listing, Before | None]] = {}
"""The listing that this process made last, by its version, and what the increment starts from: planning and staging in one process read each once."""


class CurationPlan(Plan):
    """The units of a dataset and the version of the listing that they are slices of."""

    listing: str = Field(description="version of the input: SHA-256 of its sorted listing")
    inputs: int = Field(description="inputs in all, those that will be rejected included")
    inputs_left: int = Field(description="inputs of the remaining units")
    before: str | None = Field(None, description="version that the increment starts from, as a URI")
    shared: tuple[int, ...] = Field((), description="units whose shards are that version's")


def plan_curation(settings: CurationSettings, store: Store) -> CurationPlan:
    """List the source, which gives the dataset its address, and see what of it the store holds. Writes nothing.

    Raises:
        SettingsError: the source is missing, unreadable or holds no picture.
    """
    before = Before.of(settings, store)
    entries = _list(open_source(settings, store), settings, store)
    listing = entries.version
    _listed.clear()
    _listed[listing] = entries, before
    sizes, shared = _units(settings, entries, before)
    nothing_new = before is not None and len(shared) == len(sizes)
    artifact = before.artifact if before is not None and nothing_new else _artifact(settings, store, listing, before)
    published = artifact.published()
    existing = set() if published else artifact.existing()
    done = {index for index in range(len(sizes)) if published or index in shared or shards.stats_name(index) in existing}
    todo = tuple(index for index in range(len(sizes)) if index not in done)
    left = sum(sizes[index] for index in todo)
    return CurationPlan(
        artifact_ref=artifact.ref,
        published=published,
        units=len(sizes),
        done=tuple(sorted(done)),
        todo=todo,
        bytes_planned=left * _expected_bytes(settings),
        listing=listing,
        inputs=len(entries),
        inputs_left=left,
        before=before.artifact.ref.uri if before else None,
        shared=tuple(sorted(shared)),
    )


def stage_listing(settings: CurationSettings, store: Store, plan: CurationPlan) -> None:
    """Put the slices of the listing that the remaining units need into the store's cache, so that no unit lists the source again.

    Captions are checked and duplicates marked here, where the whole listing is known. A unit that misses its slice calls this itself.

    Raises:
        SettingsError: the source is no longer what was planned.
    """
    entries, before = _listed.get(plan.listing, (None, None))
    if before is None or before.artifact.ref.uri != plan.before:
        before = Before.at(plan.before, store)
    if entries is None:
        source = open_source(settings, store)
        entries = _list(source, settings, store)
        if entries.version != plan.listing:
            raise SettingsError(f"source: {source.label} changed after it was listed; let nothing write there meanwhile and run again")
    todo = set(plan.todo)
    there = {info.key for info in store.list(_slices(plan))}
    for part in _cut(settings, entries, before):
        if part.index in todo and _slice_key(plan, part.index) not in there:
            lines = b"".join(entry.to_line() for entry in part.entries)
            store.put_cache(_slice_key(plan, part.index), hashlib.sha256(lines).hexdigest().encode() + b"\n" + lines)


def curate_unit(settings: CurationSettings, store: Store, plan: CurationPlan, index: int) -> dict[str, int]:
    """Make shard ``index`` of ``plan``: tar, then table, then counts. What is there already is adopted, a finished unit is left alone.

    Returns:
        The counts of the shard, as :func:`selfcascade.curation.shards.counts_of` gives them.

    Raises:
        SettingsError: the source changed after it was listed.
    """
    before = Before.at(plan.before, store)
    artifact = _artifact(settings, store, plan.listing, before)
    if artifact.has(shards.stats_name(index)):
        return _read_counts(artifact, index)
    entries = _read_slice(settings, store, plan, index)
    rejected: dict[str, dict[str, Any]] = {}
    examples = Examples(settings.examples)
    with tempfile.TemporaryDirectory(prefix="selfcascade-") as folder, ExitStack() as stack:
        path = Path(folder, shards.tar_name(index))
        source = open_source(settings, store)
        known = stack.enter_context(before.outcomes(index, entries)) if before else Outcomes({}, iter(()))
        with fetching(source, [entry for entry in entries if entry.key not in known]):
            shards.write_tar(path, _keep(source, entries, settings, known, rejected, examples))
        stored = artifact.put(shards.tar_name(index), path)
        if stored.sha256 != entry_of(stored.key, path).sha256:
            # Another writer was first, with a decoder that gives other bytes: its pictures are the dataset's, and the table must describe them.
            artifact.download(shards.tar_name(index), path)
            for entry in entries:
                rejected.setdefault(entry.key, _row(entry, settings, reason="not in the stored shard: the decoder of an earlier run rejected it"))
        for key, thumbnail in examples.thumbnails().items():
            rejected[key]["thumbnail"] = thumbnail
        table = shards.table_bytes(path, rejected, {entry.key: entry.listed for entry in entries})
    adopted = artifact.put(shards.table_name(index), table)
    if adopted.sha256 != hashlib.sha256(table).hexdigest():
        table = artifact.read(shards.table_name(index))
    counts = shards.counts_of(shards.read_table_bytes(table))
    artifact.put(shards.stats_name(index), (json.dumps(counts, indent=1) + "\n").encode())
    return _read_counts(artifact, index)


def publish_curation(settings: CurationSettings, store: Store, plan: CurationPlan) -> ArtifactRef:
    """Commit the dataset; its manifest counts inputs, kept pictures by split, and rejections by reason.

    Raises:
        NotFound: a unit is not done.
        SettingsError: no picture survived; says why not.
    """
    before = Before.at(plan.before, store)
    artifact = _artifact(settings, store, plan.listing, before)
    shared = set(plan.shared)
    totals: Counter[str] = Counter()
    for index in range(plan.units):
        try:
            totals.update(_read_counts(before.artifact if before and index in shared else artifact, index))
        except NotFound:
            raise NotFound(f"shard {index} of {artifact} is not done; run `selfcascade curate` again") from None
    if not totals["kept"]:
        reasons = Counter({name.removeprefix("rejected: "): number for name, number in totals.items() if name.startswith("rejected: ")})
        shown = ", ".join(f"{number} x {reason}" for reason, number in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))[:5])
        label = open_source(settings, store).label
        raise SettingsError(f"no picture of {label} survives: {shown} (of {totals['inputs']}); change curation.size, curation.filters or the source")
    names = {index: [name(index) for name in (shards.tar_name, shards.table_name, shards.stats_name)] for index in range(plan.units)}
    ref = artifact.publish(
        counts=dict(sorted(totals.items())),
        objects=[name for index in names if index not in shared for name in names[index]],
        shared=[before.artifact.share(name) for index in sorted(shared) for name in names[index]] if before else (),
    )
    store.delete([info.key for info in store.list(_slices(plan))])
    return ref


def curate(settings: CurationSettings, store: Store, *, workers: int = 1) -> ArtifactRef:
    """The whole stage in this process and ``workers`` others. Run again, it does what is left; published, it does nothing.

    Raises:
        SettingsError: as the steps do.
    """
    plan = plan_curation(settings, store)
    if plan.published:
        return plan.ref
    with _artifact(settings, store, plan.listing, Before.at(plan.before, store)).writing():
        stage_listing(settings, store, plan)
        if workers == 1 or len(plan.todo) < 2:
            for index in plan.todo:
                curate_unit(settings, store, plan, index)
        else:
            with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
                for future in [pool.submit(curate_unit, settings, store, plan, index) for index in plan.todo]:
                    future.result()
        return publish_curation(settings, store, plan)


def _list(source: Source, settings: CurationSettings, store: Store) -> Listing:
    """The listing; what was removed on request, and every equal picture, is rejected and loses its caption, so that the dataset has another version."""
    entries = Listing(source.listing())
    gone = withdrawn(store, f"datasets/{settings.name}")
    if not gone.keys and not gone.contents:
        return entries
    digests = {f"sha256:{content}" for content in gone.contents} | {entry.digest for entry in entries if entry.key in gone.keys and entry.digest}
    return Listing(
        replace(entry, caption=None, extra=None, reason="removed on request") if entry.key in gone.keys or entry.digest in digests else entry
        for entry in entries
    )


def _units(settings: CurationSettings, entries: Listing, before: Before | None) -> tuple[list[int], set[int]]:
    """Inputs of each unit, and the units that need not be made."""
    if before is None:
        return [min(settings.shard_inputs, len(entries) - first) for first in range(0, len(entries), settings.shard_inputs)], set()
    parts = [(len(part.entries), part.shared) for part in _cut(settings, entries, before)]
    return [size for size, _ in parts], {index for index, (_, shared) in enumerate(parts) if shared}


def _cut(settings: CurationSettings, entries: Listing, before: Before | None) -> Iterator[Slice]:
    """The inputs of each unit, their captions checked and duplicates marked: what the version before has kept stays."""
    late = (index is None for _, index in placed(entries, before)) if before else None
    return cut(mark_duplicates(_check_captions(entries, settings.filters), settings.filters, late), settings, before)


def _keep(
    source: Source, entries: Iterable[Entry], settings: CurationSettings, known: Outcomes, rejected: dict[str, dict[str, Any]], examples: Examples
) -> Iterator[tuple[Entry, Picture, str]]:
    """Samples of the entries that survive; the rows of the others go to ``rejected``, and some of what they look like to ``examples``."""
    for entry in entries:
        try:
            if entry.reason is not None:
                raise Rejected(entry.reason)
            picture = known.picture(entry.key) if entry.key in known else source.picture(entry, settings)
        except Rejected as rejection:
            rejected[entry.key] = _row(entry, settings, reason=rejection.reason) | rejection.found
            examples.offer(entry.key, rejection)
        else:
            yield entry, picture, _split(entry, settings)


def _row(entry: Entry, settings: CurationSettings, *, reason: str) -> dict[str, Any]:
    kind, _, digest = entry.digest.partition(":")
    return {
        "key": entry.key,
        "source": entry.source,
        "sha256": digest if kind == "sha256" else None,
        "caption": entry.caption,
        "split": _split(entry, settings),
        "kept": False,
        "reason": reason,
        "extra": entry.extra,
    }


def _split(entry: Entry, settings: CurationSettings) -> Split:
    return entry.split or split_of(entry.key, settings.tune, settings.test)


def _check_captions(entries: Iterable[Entry], settings: FilterSettings) -> Iterator[Entry]:
    for entry in entries:
        try:
            if entry.reason is None:
                filters.check_caption(entry.caption, settings)
            yield entry
        except Rejected as rejection:
            yield entry.rejected(rejection.reason)


def _artifact(settings: CurationSettings, store: Store, listing: str, before: Before | None) -> Artifact:
    return Artifact.plan(store, "datasets", settings.name, settings, {"source": listing} | ({"before": before.artifact.ref.version} if before else {}))


def _slices(plan: CurationPlan) -> str:
    return f"cache/listings/{plan.ref.version}/"


def _slice_key(plan: CurationPlan, index: int) -> str:
    return f"{_slices(plan)}{index:05d}.jsonl"


def _read_slice(settings: CurationSettings, store: Store, plan: CurationPlan, index: int) -> list[Entry]:
    for _ in range(2):
        try:
            digest, _, lines = store.read(_slice_key(plan, index)).partition(b"\n")
        except NotFound:
            digest, lines = b"", b""
        if digest == hashlib.sha256(lines).hexdigest().encode():
            return [Entry.from_line(line) for line in lines.splitlines()]
        store.delete([_slice_key(plan, index)])
        stage_listing(settings, store, plan)
    raise NotFound(f"object {store.uri(_slice_key(plan, index))} cannot be kept; is a purge under way? Run again")


def _read_counts(artifact: Artifact, index: int) -> dict[str, int]:
    counts: dict[str, int] = json.loads(artifact.read(shards.stats_name(index)))
    return counts


def _expected_bytes(settings: CurationSettings) -> int:
    """A guess for one stored picture: photographs take about 1.3 bytes a pixel as PNG, drawings a tenth."""
    return int(settings.size**2 * (0.12 if isinstance(settings.source, TwemojiSource) else 1.3))
