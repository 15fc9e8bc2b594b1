"""The record of an evaluation: what `metrics.json` holds and the report shows."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from selfcascade.config import Method
from selfcascade.evaluation.intervals import Interval
from selfcascade.evaluation.protocol import FurtherProtocol, Protocol
from selfcascade.settings import canonical_json


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Metric(_Record):
    """One column of the table of results."""

    name: str
    heading: str = Field(description="as the field writes it")
    meaning: str = Field(description="one sentence for a reader who meets it for the first time")
    scale: int = Field(1, description="factor at which it is shown")
    digits: int = Field(1, description="digits after the point at which it is shown")
    better: Literal["lower", "higher"] | None = Field("lower", description="which way is better; unset: it only describes")
    network: str | None = Field(None, description="further network that it needs; unset: the one of evaluation.features")

    @property
    def judged(self) -> bool:
        """Whether one value can be better than another."""
        return self.better is not None

    def best(self, values: Iterable[float]) -> float:
        """The best of ``values``."""
        return max(values) if self.better == "higher" else min(values)


METRICS: tuple[Metric, ...] = (
    Metric(
        name="kid_r",
        heading="KID_r",
        scale=1000,
        meaning="kernel distance to held-out real pictures, whole picture; unbiased, so it may be compared at any count",
    ),
    Metric(
        name="pkid_r",
        heading="pKID_r",
        scale=1000,
        meaning="kernel distance to real pictures of native-scale crops: detail that a shrunken picture does not show",
    ),
    Metric(
        name="kid_b",
        heading="KID_b",
        scale=1000,
        meaning=(
            "kernel distance to the base's own pictures of the same prompts: how well what the base can do is kept. "
            "Pictures of one prompt are compared with each other too, so it may fall a little below 0"
        ),
    ),
    Metric(
        name="layout_b",
        heading="layout_b",
        digits=3,
        meaning=(
            "distance of the shrunken picture from the base's own picture of that prompt: whether its composition is kept. "
            "Direct sampling starts from noise of its own and cannot keep it"
        ),
    ),
    Metric(
        name="objects_b",
        heading="objects_b",
        digits=2,
        meaning="difference, up or down, of the number of separate things from the base's own picture of that prompt, mean over prompts",
    ),
    Metric(name="fid_r", heading="FID_r", digits=0, meaning="Fréchet distance to held-out real pictures, whole picture; biased upwards at small counts"),
    Metric(name="pfid_r", heading="pFID_r", digits=0, meaning="Fréchet distance to real pictures of native-scale crops; biased like FID_r"),
    Metric(name="fid_b", heading="FID_b", digits=0, meaning="Fréchet distance to the base's own pictures of the same prompts; biased like FID_r"),
    Metric(
        name="precision_r",
        heading="precision",
        digits=2,
        better="higher",
        meaning="share of pictures that lie among real ones: how many look real. It and the three after it depend on the counts",
    ),
    Metric(name="recall_r", heading="recall", digits=2, better="higher", meaning="share of real pictures that lie among these: what they reach"),
    Metric(name="density_r", heading="density", digits=2, better="higher", meaning="precision that one odd real picture cannot raise; may exceed 1"),
    Metric(name="coverage_r", heading="coverage", digits=2, better="higher", meaning="share of real pictures that have one of these as neighbour"),
    Metric(
        name="detail_r",
        heading="detail",
        digits=2,
        better=None,
        meaning="power of fine detail over that of the real pictures: below 1 is softer, above 1 harder or noisier than real",
    ),
    Metric(name="objects", heading="objects", digits=2, better=None, meaning="separate things on a picture, mean"),
    Metric(
        name="cmmd_r",
        heading="CMMD_r",
        digits=3,
        network="clip",
        meaning="kernel distance of CLIP embeddings to held-out real pictures; biased upwards by about the same at equal counts",
    ),
    Metric(name="cmmd_b", heading="CMMD_b", digits=3, network="clip", meaning="kernel distance of CLIP embeddings to the base's own pictures"),
    Metric(
        name="clip_score",
        heading="CLIP score",
        network="clip",
        better="higher",
        meaning="100 times the cosine of picture and prompt in CLIP's space, negative ones as 0: whether the picture shows what was asked for",
    ),
    Metric(
        name="fd_dinov2_r",
        heading="FD-DINOv2_r",
        digits=0,
        network="dinov2",
        meaning="Fréchet distance of DINOv2 features to held-out real pictures; biased like FID_r",
    ),
    Metric(name="fd_dinov2_b", heading="FD-DINOv2_b", digits=0, network="dinov2", meaning="Fréchet distance of DINOv2 features to the base's own pictures"),
    Metric(
        name="inception_score",
        heading="IS",
        digits=2,
        network="inception-v3",
        better="higher",
        meaning="Inception score: how sure a classifier is of each picture and how many classes they cover; without any real picture, more for more pictures",
    ),
)
"""Every metric, in the order of the table: KID leads, since FID is biased at the counts that a small run has."""


NAMED = {metric.name: metric for metric in METRICS}


def metrics_with(further: Iterable[str]) -> tuple[Metric, ...]:
    """Those of every report, and those of the networks in ``further``."""
    networks = {None, *further}
    return tuple(metric for metric in METRICS if metric.network in networks)


class Number(_Record):
    """A value with its standard error, or the reason why there is none."""

    value: float | None = None
    error: float | None = Field(None, description="standard error; unset where it is not known")
    spread: float | None = Field(None, description="KID: standard deviation over the subsets that torchmetrics drew; Inception score: over its splits")
    limit: float | None = Field(None, description="FID: extrapolated to ever more pictures of the method, by a line in 1 / n")
    why: str = Field("", description="why there is no value")


class Row(_Record):
    """One set of pictures and its numbers."""

    label: str
    method: Method | Literal["real"]
    artifact: str = Field(description="kind/name@version")
    eta: float | None = None
    height: int
    width: int
    pictures: int
    reference: int = Field(description="real pictures that it is compared with")
    shown: bool = Field(True, description="whether it is the one of its method that is shown first")
    note: str = ""
    command: str = Field("", description="what makes its pictures again")
    numbers: dict[str, Number]


class Difference(_Record):
    """The second method's number minus the first's, over the same prompts."""

    first: str
    second: str
    metric: str
    value: float
    error: float | None

    @property
    def interval(self) -> Interval | None:
        """The 95 % interval, where the error is known."""
        return None if self.error is None else Interval(self.value, self.error)


class Lineage(_Record):
    """An artifact that the report rests on."""

    role: str
    artifact: str
    version: str
    inputs: dict[str, str] = {}


class Curve(_Record):
    """A loss curve of training."""

    name: str
    steps: tuple[int, ...]
    losses: tuple[float, ...]


class Spectrum(_Record):
    """Mean power of a set's pictures in rings of spatial frequency, from 0 to half a cycle a pixel."""

    label: str
    power: tuple[float, ...]


class SheetRow(_Record):
    """A prompt on the contact sheet."""

    key: str
    prompt: str


class Extreme(_Record):
    """A picture that looks less, or more, real than a method's others."""

    label: str
    key: str
    prompt: str
    realism: float = Field(description="realism score; from 1 on the picture lies among real ones")
    side: Literal["least", "most"]


class Results(_Record):
    """Everything that a report says, but for the pictures, and for the times, which two equal runs do not share."""

    format: Literal[1] = 1
    name: str
    protocol: Protocol
    real: str = Field(description="dataset of the real pictures")
    real_split: str
    pictures: int = Field(description="pictures of each method")
    prompts: int
    real_pictures: int
    rows: tuple[Row, ...]
    floor: Row | None = Field(description="real pictures against other real pictures: what a perfect method would get at about this count")
    differences: tuple[Difference, ...]
    layout_chance: float | None = Field(description="layout distance of the base's pictures from the base's pictures of other prompts")
    chosen_on: str = Field(description="split that K, learning rate and taps were chosen on")
    prompts_from: str = Field(description="dataset split that the prompts are captions of")
    sheet: tuple[SheetRow, ...]
    extremes: tuple[Extreme, ...] = Field((), description="of each shown method, the least real first and the most real last")
    lineage: tuple[Lineage, ...]
    curves: tuple[Curve, ...]
    spectra: tuple[Spectrum, ...] = Field((), description="of the real pictures, then of each method of their size")
    settings: dict[str, object]

    def to_bytes(self) -> bytes:
        """Canonical JSON: the stored form."""
        return canonical_json(self.model_dump(mode="json")) + b"\n"

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The columns of its tables."""
        return metrics_with(further.setting for further in self.protocol.further)

    def shown(self) -> tuple[Row, ...]:
        """The rows of the main table."""
        return tuple(row for row in self.rows if row.shown)

    def is_best(self, row: Row, metric: Metric) -> bool:
        """Whether no other shown method of the target size has a better value; never where there is nothing to compare."""
        rivals = [other for other in self.shown() if other.method != "base"]
        value = row.numbers[metric.name].value
        if not metric.judged or value is None or row not in rivals or len(rivals) < 2:
            return False
        return value == metric.best(found for found in (rival.numbers[metric.name].value for rival in rivals) if found is not None)

    def incomparable(self, other: Results) -> str:
        """Why numbers of this report may not be held against those of ``other``: another protocol, other counts, no method in common; empty where they may."""
        pairs: list[tuple[Protocol | FurtherProtocol, Protocol | FurtherProtocol]] = [(self.protocol, other.protocol)]
        others = {further.setting: further for further in other.protocol.further}
        pairs += [(further, others[further.setting]) for further in self.protocol.further if further.setting in others]
        for one, two in pairs:
            for name, value in one.model_dump(exclude=_MAY_DIFFER).items():
                if value != getattr(two, name):
                    return f"{self.name} was measured with another {name} ({value!r}); compare with a report of one protocol"
        for name in ("pictures", "prompts", "real_pictures"):
            if getattr(self, name) != getattr(other, name):
                counts = f"{self.name} has {getattr(self, name)} {name.replace('_', ' ')}, {other.name} {getattr(other, name)}"
                return f"{counts}; distances depend on counts, so compare with a report of the same"
        if not {row.label for row in self.rows} & {row.label for row in other.rows}:
            return f"{self.name} has no method of {other.name}"
        return ""

    def caption(self) -> str:
        """What stands under every table: the protocol in a sentence, with the counts."""
        real = f"{self.real_pictures} real ones (split {self.real_split} of {self.real})"
        caption = self.protocol.caption(f"{self.pictures} pictures of {self.prompts} prompts a method against {real}")
        for further in self.protocol.further:
            headings = ", ".join(metric.heading for metric in METRICS if metric.network == further.setting)
            caption += f" {headings}: {further.caption()}."
        return caption

    def to_parquet(self) -> bytes:
        """A row for each number of each set of pictures."""
        rows = [
            {
                "label": row.label,
                "method": row.method,
                "artifact": row.artifact,
                "pictures": row.pictures,
                "reference": row.reference,
                "metric": name,
                "value": number.value,
                "error": number.error,
                "spread": number.spread,
                "limit": number.limit,
                "why": number.why,
                "shown": row.shown,
            }
            for row in (*self.rows, *((self.floor,) if self.floor else ()))
            for name, number in row.numbers.items()
        ]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), buffer, compression="zstd")
        return buffer.getvalue()


_MAY_DIFFER = {"device", "libraries", "threads", "batch", "further"}
"""Of two protocols: what moves a number by rounding alone, and networks that only one of them has."""

_SCHEMA = pa.schema(
    [
        ("label", pa.string()),
        ("method", pa.string()),
        ("artifact", pa.string()),
        ("pictures", pa.int64()),
        ("reference", pa.int64()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("error", pa.float64()),
        ("spread", pa.float64()),
        ("limit", pa.float64()),
        ("why", pa.string()),
        ("shown", pa.bool_()),
    ]
)
