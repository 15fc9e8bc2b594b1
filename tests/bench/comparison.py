"""Methods side by side on emoji prompts of the tune split, from the same base latents, with the metrics and errors of a report, without a store."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from selfcascade.cascade.pipeline import SelfCascadePipeline
from selfcascade.config import EvaluationSettings, GenerationSettings, TwemojiSource
from selfcascade.curation.splits import split_of
from selfcascade.curation.twemoji import TwemojiRecord, twemoji_records
from selfcascade.evaluation.features import load_features
from selfcascade.evaluation.layout import analysis_size
from selfcascade.evaluation.metrics import measure
from selfcascade.evaluation.results import Difference, Row
from selfcascade.evaluation.sets import PictureSet
from selfcascade.evaluation.tables import CropPlan, Extraction, Picture
from selfcascade.generation.methods import BUILDS_ON_BASE, METHODS, base_latents
from selfcascade.generation.prompts import Prompt
from selfcascade.generation.seeds import SampleSpec, sample_specs
from selfcascade.storage import ArtifactRef

Pipelines = Callable[[str], SelfCascadePipeline]
Numbers = dict[str, dict[str, list[float | None]]]
"""Value and standard error of each metric by label."""


def held_out(backgrounds: Sequence[str]) -> list[TwemojiRecord]:
    """Pictures of the tune split in an order of chance that is always the same."""
    records = [record for record in twemoji_records(TwemojiSource(backgrounds=tuple(backgrounds))) if split_of(record.key, 0.1, 0.1) == "tune"]
    return sorted(records, key=lambda record: hashlib.sha256(record.key.encode()).digest())


@torch.inference_mode()
def sampled(
    pipelines: Pipelines, specs: tuple[SampleSpec, ...], settings: dict[str, GenerationSettings]
) -> tuple[dict[str, list[NDArray[np.uint8]]], dict[str, list[float]]]:
    """Pictures of every method, all from the base latents of the first one's settings, and the seconds of each batch, base stage included."""
    made: dict[str, list[NDArray[np.uint8]]] = {label: [] for label in settings}
    seconds: dict[str, list[float]] = {label: [] for label in settings}
    for start in range(0, len(specs), 16):
        batch = specs[start : start + 16]
        begun = time.perf_counter()
        bases = base_latents(pipelines(next(iter(settings))), batch, next(iter(settings.values())))
        first = time.perf_counter() - begun
        for label, each in settings.items():
            begun = time.perf_counter()
            made[label] += list(METHODS[each.method](pipelines(label), batch, each, bases))
            seconds[label].append(time.perf_counter() - begun + (first if each.method in BUILDS_ON_BASE else 0.0))
        print(f"sampled {start + len(batch)} of {len(specs)}", file=sys.stderr, flush=True)
    return made, seconds


@dataclass(frozen=True)
class Comparison:
    """What was measured."""

    pictures: dict[str, list[NDArray[np.uint8]]]
    seconds: dict[str, list[float]]
    """Of each batch of 16, in the order of the prompts, so that methods can be compared in pairs."""
    rows: Sequence[Row]
    pairs: Sequence[Difference]

    def numbers(self, metrics: Sequence[str]) -> Numbers:
        return {row.label: {name: [row.numbers[name].value, row.numbers[name].error] for name in metrics} for row in self.rows}

    def differences(self, first: str, metrics: Sequence[str]) -> list[dict[str, object]]:
        """Of every method from ``first``."""
        return [
            {"method": item.second, "less": item.first, "metric": item.metric, "value": item.value, "error": item.error}
            for item in self.pairs
            if item.first == first and item.metric in metrics
        ]


def compare(
    pipeline: SelfCascadePipeline | Pipelines,
    settings: dict[str, GenerationSettings],
    evaluation: EvaluationSettings,
    *,
    prompts: int,
    real: int,
    backgrounds: Sequence[str],
) -> Comparison:
    """Sample ``prompts`` held-out prompts by every method and measure them against up to ``real`` held-out pictures.

    Args:
        pipeline: of the base, or what gives each label its own.
        settings: by label; the one of method base gives ``_b`` its pictures.
        evaluation: network, crops and seed.
        prompts: of the tune split.
        real: pictures of the tune split, counted from the end of its order.
        backgrounds: of the emoji.
    """
    records = held_out(backgrounds)
    specs = sample_specs([Prompt(id=record.key, text=record.caption) for record in records[:prompts]], run_seed=0, per_prompt=1)
    made, seconds = sampled(pipeline if not isinstance(pipeline, SelfCascadePipeline) else lambda label: pipeline, specs, settings)
    size = next(iter(settings.values())).cascade.height
    made["real"] = [np.asarray(record.render(size)) for record in records[-real:]]
    network = load_features(evaluation.features)
    base = next(made[label][0].shape[:2] for label, each in settings.items() if each.method == "base")
    sets, tables = [], {}
    for label in ("real", *settings):
        pictures, ids = made[label], [spec.prompt_id for spec in specs] if label != "real" else [f"real-{rank:05d}" for rank in range(len(made["real"]))]
        height, width = pictures[0].shape[:2]
        method = "real" if label == "real" else settings[label].method
        crops = CropPlan(size=(height, width), side=evaluation.crop, count=evaluation.crops_per_image, seed=evaluation.seed) if method != "base" else None
        shown = (Picture(key=each, prompt_id=each, image=picture) for each, picture in zip(ids, pictures, strict=True))
        extraction = Extraction(network, small=analysis_size(base), crops=crops, batch=16)
        for picture in shown:
            extraction.add(picture)
        tables[label] = extraction.result()
        ref = ArtifactRef(kind="samples", name=f"row-{len(sets)}", version="0" * 64, uri="s3://none")
        eta = 0.0 if label == "real" else settings[label].cascade.eta
        sets.append(PictureSet(label=label, method=method, ref=ref, height=height, width=width, count=len(pictures), eta=eta))
    measurement = measure(evaluation, sets, tables)
    return Comparison(made, seconds, measurement.rows, measurement.differences)


def lines_of(title: str, first: str, table: dict[str, dict[str, object]]) -> Iterator[str]:
    """A Markdown table with ``first`` above its labels."""
    columns = list(next(iter(table.values())))
    yield from ("", title, "", f"| {first} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|")
    for name, row in table.items():
        yield f"| {name} | {' | '.join(_cell(row[column]) for column in columns)} |"


def _cell(value: object) -> str:
    if isinstance(value, list):
        return "-" if value[0] is None else f"{value[0]:.5f}" + ("" if value[1] is None else f" ± {value[1]:.5f}")
    return f"{value:.4f}" if isinstance(value, float) else str(value)
