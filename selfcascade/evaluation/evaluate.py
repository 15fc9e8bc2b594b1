"""Evaluation: plan, one unit, publish. A unit is one pass of the feature network over one set of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import Field

from selfcascade.config import EvaluationSettings
from selfcascade.curation.reading import read_table
from selfcascade.evaluation.embeddings import Embeddings
from selfcascade.evaluation.features import network_kind, weights_path, weights_sha256
from selfcascade.evaluation.layout import analysis_size
from selfcascade.evaluation.lineage import curves_of, lineage_of
from selfcascade.evaluation.measured_set import bytes_of, is_cached, measured_set
from selfcascade.evaluation.metrics import floor_of, layout_chance, measure
from selfcascade.evaluation.pictures import extremes_of, read_shown, sheet_png, sheet_rows
from selfcascade.evaluation.protocol import FurtherProtocol, Protocol
from selfcascade.evaluation.published import METRICS_JSON, REPLICATES, history_of, read_results
from selfcascade.evaluation.replicates import Replicates
from selfcascade.evaluation.report import Times, render_report
from selfcascade.evaluation.reproduction import command_of
from selfcascade.evaluation.results import Extreme, Results, Spectrum
from selfcascade.evaluation.sets import PictureSet, real_set, sample_sets
from selfcascade.evaluation.tables import FeatureTable
from selfcascade.evaluation.text_tables import latex_table, markdown_table
from selfcascade.generation import samples as generated
from selfcascade.generation.models import resolve_device
from selfcascade.generation.threads import torch_threads
from selfcascade.settings import SettingsError
from selfcascade.storage import Artifact, ArtifactRef, NotFound, Plan, Store, resolve

METRICS_PARQUET, TABLE_MARKDOWN, TABLE_LATEX, SHEET, REPORT = "metrics.parquet", "table.md", "table.tex", "sheet.png", "report.html"
_OBJECTS = [METRICS_JSON, METRICS_PARQUET, REPLICATES, TABLE_MARKDOWN, TABLE_LATEX, SHEET, REPORT]


class EvaluationPlan(Plan):
    """The sets of pictures of a report, and how they are measured."""

    dataset: ArtifactRef
    samples: dict[str, ArtifactRef] = Field(description="samples artifacts by label")
    weights: str = Field(description="SHA-256 of the feature network's weights")
    further_weights: dict[str, str] = Field({}, description="SHA-256 of the further networks' weights, by network")
    sets: tuple[PictureSet, ...] = Field(description="a unit each, the real pictures first; empty when the report is published")
    target: tuple[int, int] = Field(description="height and width of the methods' pictures")
    small: tuple[int, int] = Field(description="height and width at which layout and objects are read")
    protocol: Protocol | None = Field(description="unset when the report is published")
    device: str = Field(description="torch device of the feature network")


def plan_evaluation(
    settings: EvaluationSettings, store: Store, dataset: ArtifactRef | str, samples: Mapping[str, ArtifactRef | str], *, device: str = "auto"
) -> EvaluationPlan:
    """The address of the report and the sets whose features are not cached. Writes nothing and reads no picture.

    Args:
        settings: what is measured.
        store: where the artifacts are.
        dataset: the dataset artifact with the real pictures.
        samples: samples artifacts by the label that the report gives them, such as ``{"base": ..., "direct eta 0": ..., "tuned": ...}``.
        device: torch device of the feature network: auto, cpu, cuda, cuda:1, mps. Its kind enters the addresses of cached features.

    Raises:
        SettingsError: no samples, prompts or sizes that cannot be compared, too few pictures, or the network's weights are missing.
        NotFound: an artifact is not published.
    """
    if not samples:
        raise SettingsError("there are no samples to evaluate; run `selfcascade generate` first")
    reference = _resolved(store, dataset, "datasets")
    refs = {label: _resolved(store, value, "samples") for label, value in sorted(samples.items())}
    weights = weights_path(settings.features)
    sha256 = weights_sha256(settings.features, weights)
    further_paths: dict[str, Path] = {each.network: weights_path(each) for each in settings.further}
    further: dict[str, str] = {each.network: weights_sha256(each, further_paths[each.network]) for each in settings.further}
    artifact = _artifact(settings, store, reference, refs, sha256, further)
    if artifact.published():
        return EvaluationPlan(
            artifact_ref=artifact.ref,
            published=True,
            units=0,
            done=(),
            todo=(),
            dataset=reference,
            samples=refs,
            weights=sha256,
            further_weights=further,
            sets=(),
            target=(0, 0),
            small=(0, 0),
            protocol=None,
            device=device,
        )
    chosen = resolve_device(device)
    methods = sample_sets(store, refs)
    sets = (real_set(store, reference, settings), *methods)
    base = next((item for item in methods if item.method == "base"), None)
    target = _target(methods)
    if settings.crop > min(target):
        raise SettingsError(f"evaluation.crop is {settings.crop} px but the pictures have {target[0]} x {target[1]} px; lower it")
    small = analysis_size((base.height, base.width) if base else target)
    kind = network_kind(settings.features, weights)
    beside = tuple(FurtherProtocol.of(each, network_kind(each, further_paths[each.network]), further[each.network]) for each in settings.further)
    protocol = Protocol.of(settings, kind, sha256, pictures=methods[0].count, real=sets[0].count, device=chosen.type, further=beside)
    plan = EvaluationPlan(
        artifact_ref=artifact.ref,
        published=False,
        units=len(sets),
        done=(),
        todo=(),
        dataset=reference,
        samples=refs,
        weights=sha256,
        further_weights=further,
        sets=sets,
        target=target,
        small=small,
        protocol=protocol,
        device=str(chosen),
    )
    done = tuple(index for index in range(len(sets)) if is_cached(settings, store, plan, index))
    todo = tuple(sorted(set(range(len(sets))) - set(done)))
    planned = sum(bytes_of(settings, plan, sets[index]) for index in todo)
    return plan.model_copy(update={"done": done, "todo": todo, "bytes_planned": planned})


def evaluate_unit(settings: EvaluationSettings, store: Store, plan: EvaluationPlan, index: int) -> int:
    """Pass the pictures of set ``index`` through the network and cache what comes out. A set that is cached is left alone.

    Returns:
        How many pictures the set has.

    Raises:
        IntegrityError: stored bytes of a picture are not the committed ones; names the object.
        SettingsError: sizes are mixed.
    """
    return len(measured_set(settings, store, plan, index).table)


def publish_evaluation(settings: EvaluationSettings, store: Store, plan: EvaluationPlan) -> ArtifactRef:
    """Compute every number and commit the report. Features that are missing from the cache are made again.

    Everything is derived from the stored ``metrics.json``: if another run was first, its numbers are the report's.
    """
    artifact = _artifact(settings, store, plan.dataset, plan.samples, plan.weights, plan.further_weights)
    if plan.published or artifact.published():
        return artifact.ref
    if not artifact.has(METRICS_JSON):
        results, replicates = _measured(settings, store, plan)
        artifact.put(REPLICATES, replicates.to_parquet())  # first: numbers that are there have theirs beside them
        artifact.put(METRICS_JSON, results.to_bytes())
    results = Results.model_validate_json(artifact.read(METRICS_JSON))
    artifact.put(METRICS_PARQUET, results.to_parquet())
    artifact.put(TABLE_MARKDOWN, markdown_table(results).encode())
    artifact.put(TABLE_LATEX, latex_table(results).encode())
    pictures = read_shown(store, [item for item in plan.sets if item.method != "real"], results)
    artifact.put(SHEET, sheet_png(results, pictures))
    artifact.put(REPORT, render_report(results, pictures).encode())
    return artifact.publish(counts=_counts(results), objects=_OBJECTS)


def gate_of(settings: EvaluationSettings, store: Store, ref: ArtifactRef) -> ArtifactRef | None:
    """The report that ``ref`` is held against; None without a gate, and where there is no other yet. Call it before ``ref`` is published.

    Raises:
        NotFound: a version is given that there is not.
    """
    if settings.gate.against is None:
        return None
    try:
        found = resolve(store, settings.gate.against, "reports").ref
    except NotFound:
        if "@" in settings.gate.against:
            raise
        return None
    return None if found == ref else found


def timed_report(store: Store, ref: ArtifactRef, times: Times) -> str:
    """The page of a published report with what the run took and the versions before it.

    Two equal runs do not share these, so they are no part of the artifact: the page belongs under ``runs/``.
    """
    results = read_results(store, ref)
    sets = sample_sets(store, {row.label: resolve(store, row.artifact).ref for row in results.rows})
    return render_report(results, read_shown(store, sets, results), times, history_of(store, ref))


def evaluate(
    settings: EvaluationSettings, store: Store, dataset: ArtifactRef | str, samples: Mapping[str, ArtifactRef | str], *, device: str = "cpu"
) -> ArtifactRef:
    """The whole stage in this process. Run again, it does what is left; published, it does nothing.

    Raises:
        SettingsError: as the steps do.
    """
    plan = plan_evaluation(settings, store, dataset, samples, device=device)
    if plan.published:
        return plan.ref
    with Artifact(store, plan.ref).writing():
        for index in plan.todo:
            evaluate_unit(settings, store, plan, index)
        return publish_evaluation(settings, store, plan)


def _measured(settings: EvaluationSettings, store: Store, plan: EvaluationPlan) -> tuple[Results, Replicates]:
    assert plan.protocol is not None
    found = {item.label: measured_set(settings, store, plan, index) for index, item in enumerate(plan.sets)}
    tables = {label: each.table for label, each in found.items()}
    further: dict[str, dict[str, Embeddings]] = {each.network: {label: one.further[each.network] for label, one in found.items()} for each in settings.further}
    real, *methods = plan.sets
    base = next((item for item in methods if item.method == "base"), None)
    with torch_threads(settings.features.threads):
        measurement = measure(settings, plan.sets, tables, further)
        floor = floor_of(settings, real, tables[real.label], methods[0].count, {name: found[real.label] for name, found in further.items()})
    lineage = lineage_of(store, {"real pictures": plan.dataset} | {item.label: item.ref for item in methods})
    first, shown = tables[methods[0].label], {row.label for row in measurement.rows if row.shown}
    splits = _prompt_splits(store, plan.dataset, first.prompt_ids)
    prompts = str(plan.dataset) if all(splits) else None
    commands = {item.label: command_of(Artifact(store, item.ref).manifest(), lineage, prompts) for item in methods}
    results = Results(
        name=settings.name,
        protocol=plan.protocol,
        real=real.artifact,
        real_split=settings.real_split,
        pictures=len(first),
        prompts=len(set(first.prompt_ids)),
        real_pictures=len(tables[real.label]),
        rows=tuple(row.model_copy(update={"command": commands[row.label]}) for row in measurement.rows),
        floor=floor,
        differences=measurement.differences,
        layout_chance=None if base is None else layout_chance(tables[base.label]),
        chosen_on=settings.chosen_on,
        prompts_from=_prompts_from(splits, plan.dataset),
        sheet=sheet_rows(store, methods[0].ref, settings.sheet_prompts),
        extremes=_extremes(settings, store, plan.sets, tables, shown),
        lineage=lineage,
        curves=curves_of(store, lineage),
        spectra=_spectra(plan.sets, tables, shown),
        settings=settings.what(),
    )
    return results, measurement.replicates


def _extremes(
    settings: EvaluationSettings, store: Store, sets: Sequence[PictureSet], tables: Mapping[str, FeatureTable], shown: set[str]
) -> tuple[Extreme, ...]:
    """Of the real set, which comes first, and of the shown methods."""
    real, *methods = sets
    prompts = {row["key"]: row["prompt"] for row in generated.read_table(Artifact(store, methods[0].ref)).select(["key", "prompt"]).to_pylist()}
    chosen = [item.label for item in methods if item.label in shown]
    return tuple(each for label in chosen for each in extremes_of(tables[real.label].features, tables[label], label, prompts, settings.extreme_pictures))


def _spectra(sets: Sequence[PictureSet], tables: Mapping[str, FeatureTable], shown: set[str]) -> tuple[Spectrum, ...]:
    """Means of the real pictures and of the shown methods that have their size; six digits, as a chart needs."""
    chosen = [item for item in sets if item.method == "real" or item.label in shown]
    found = [("real pictures" if item.method == "real" else item.label, tables[item.label].spectra) for item in chosen]
    means = {label: spectra.mean(axis=0, dtype=np.float64) for label, spectra in found if spectra is not None}
    return tuple(Spectrum(label=label, power=tuple(float(f"{value:.6g}") for value in mean)) for label, mean in means.items())


def _prompt_splits(store: Store, dataset: ArtifactRef, prompt_ids: Sequence[str]) -> list[str]:
    """Splits that the prompts are captions of, by looking: such a prompt has the key of its picture as id. Empty for one that is none."""
    splits = {row["key"]: row["split"] for row in read_table(Artifact(store, dataset)).select(["key", "split"]).to_pylist()}
    return sorted({str(splits.get(prompt_id, "")) for prompt_id in set(prompt_ids)})


def _prompts_from(splits: Sequence[str], dataset: ArtifactRef) -> str:
    if splits == [""]:
        return "not of this dataset"
    return " and ".join(f"split {split!r}" if split else "elsewhere" for split in splits) + f" of {dataset}"


def _artifact(
    settings: EvaluationSettings, store: Store, dataset: ArtifactRef, samples: Mapping[str, ArtifactRef], weights: str, further: Mapping[str, str]
) -> Artifact:
    inputs = {"dataset": _named(dataset), "features.weights": weights} | {f"samples/{label}": _named(ref) for label, ref in samples.items()}
    inputs |= {f"further/{network}.weights": sha256 for network, sha256 in further.items()}
    return Artifact.plan(store, "reports", settings.name, settings, inputs)


def _named(ref: ArtifactRef) -> str:
    return f"{ref.kind}/{ref.name}@{ref.version}"


def _resolved(store: Store, value: ArtifactRef | str, kind: str) -> ArtifactRef:
    ref = resolve(store, value, kind).ref if isinstance(value, str) else value
    if ref.kind != kind:
        raise SettingsError(f"{ref} is no artifact of kind {kind}")
    return ref


def _target(methods: list[PictureSet]) -> tuple[int, int]:
    """Height and width that all methods but the base share."""
    large = [item for item in methods if item.method != "base"] or methods
    sizes = sorted({(item.height, item.width) for item in large})
    if len(sizes) > 1:
        listed = ", ".join(f"{item.label} {item.height} x {item.width}" for item in large)
        raise SettingsError(f"samples of different sizes cannot be compared ({listed}); generate all methods but base at one cascade.height and cascade.width")
    return sizes[0]


def _counts(results: Results) -> dict[str, int | float | str]:
    counts: dict[str, int | float | str] = {
        "prompts": results.prompts,
        "pictures a method": results.pictures,
        "real pictures": results.real_pictures,
        "network": results.protocol.network,
    }
    for row in results.shown():
        value = row.numbers["kid_r"].value
        if value is not None:
            counts[f"KID_r x 1000, {row.label}"] = round(1000 * value, 3)
    return counts
