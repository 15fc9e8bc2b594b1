"""Fill the verdicts and tables of ``docs/claims.md`` from the committed tables of the measured pieces: ``python docs/claims.py``. No figure is typed by hand.

What the paper says is quoted beside ours, from ``claims.yaml``; it is no measurement of ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from tables import between

from selfcascade.evaluation.intervals import Interval, standard_error
from selfcascade.evaluation.replicates import Replicates
from selfcascade.evaluation.report import heading, shown_difference, shown_number
from selfcascade.evaluation.results import NAMED, Difference, Row
from selfcascade_flows.claims import Piece, pieces, read_piece

PAGE = Path(__file__).parent / "claims.md"
FOLDER = Path(__file__).parent / "results/claims"
COLUMNS = ("kid_r", "fid_r", "pkid_r", "pfid_r", "kid_b", "fid_b", "layout_b", "objects_b")
"""Of the tables: the paper's, then what its figures show."""
GAINS = ("pfid_r", "fid_b", "kid_b", "layout_b", "objects_b")
"""Where an upsampler is said to help."""
DERIVED = ("lanczos", "latent-sr", "tuning-free", "tuned")
"""Methods that start from the base's own pictures, which are sampled once for all of them."""


@dataclass(frozen=True, slots=True)
class Claim:
    """That ``second`` is better than ``first``, at a scale."""

    claim: str
    at: str
    first: str
    second: str
    paper: Mapping[str, tuple[float, float]]
    """By metric, the paper's numbers of ``first`` and ``second``."""


CLAIMS = [Claim(**each) for each in yaml.safe_load((Path(__file__).parent / "claims.yaml").read_text(encoding="utf-8"))]


@dataclass(frozen=True, slots=True)
class Scale:
    """All pieces of one scale, which share base, prompts and real pictures."""

    name: str
    found: tuple[Piece, ...]

    @classmethod
    def of(cls, name: str) -> Scale | None:
        """The pieces on record whose names begin with ``claims-NAME``; None without any.

        Raises:
            ValueError: two of them may not be compared.
        """
        found = tuple(piece for each in pieces() if each.startswith(f"claims-{name}") and (piece := read_piece(FOLDER, each)))
        for piece in found[1:]:
            if (why := found[0].results.incomparable(piece.results)) or _base(piece) != _base(found[0]):
                raise ValueError(f"{piece.name} and {found[0].name} are no parts of one table: {why or 'the base was sampled otherwise'}")
        return cls(name, found) if found else None

    @property
    def replicates(self) -> Replicates:
        """Of all pieces."""
        return reduce(Replicates.joined, (piece.replicates for piece in self.found))

    def rows(self) -> Iterator[tuple[Piece, Row]]:
        """Every shown row once, in the order of the pieces and of the methods."""
        told: set[str] = set()
        for piece in self.found:
            for row in piece.results.shown():
                if row.label not in told:
                    told.add(row.label)
                    yield piece, row

    def label(self, name: str) -> str | None:
        """What the rows call ``name``, direct sampling by its eta; None where no row is of it."""
        return next((row.label for _, row in self.rows() if name in (row.label, row.method if row.method == "direct" else "")), None)


def filled(text: str) -> str:
    """The page with what lies between its marks made anew."""
    for block, make in BLOCKS.items():
        text = between(text, block, make())
    return text


def verdicts() -> str:
    """Markdown: each claim, the paper's figures, the differences here with intervals, and what follows."""
    lines = ["| claim | at | the paper | here, with 95 % intervals | |", "|---|---|---|---|---|"]
    scales = {name: Scale.of(name) for name in ("4x", "16x")}
    for claim in CLAIMS:
        found = list(_differences(claim, scales[claim.at]))
        here = "; ".join(_told(item) for item in found) or "not measured yet"
        paper = ", ".join(f"{NAMED[metric].heading} {first:g} → {second:g}" for metric, (first, second) in claim.paper.items())
        lines.append(f"| {claim.claim} | {claim.at} | {paper} | {here} | {verdict(found)} |")
    return "\n".join([*lines, "", "Differences are the second method's number minus the first's; KID is shown times 1,000. Lower is better everywhere."])


def verdict(differences: Iterable[Difference]) -> str:
    """What differences that should all lie below 0 say together."""
    spans = [item.interval for item in differences]
    clear = [span for span in spans if span is not None and span.excludes_zero]
    if not spans:
        return "–"
    if not clear:
        return "**not decided**: no interval excludes 0"
    if any(span.value > 0 for span in clear):
        return "**does not hold here**" if all(span.value > 0 for span in clear) else "**holds in part**"
    return "**holds**" if len(clear) == len(spans) else "**holds in part**"


def kept() -> str:
    """Markdown: the share of upsampler A's gain over tuning-free that the small ones keep, at 4x, with intervals."""
    scale = Scale.of("4x")
    names = [] if scale is None else [label for _, row in scale.rows() if (label := row.label) in ("tuned C", "tuned D")]
    if scale is None or not names:
        return "`selfcascade claims claims-4x-trained` measures it."
    lines = ["| of A's gain over tuning-free | numbers | " + " | ".join(heading(NAMED[metric]) for metric in GAINS) + " |", "|---|---:|" + "---:|" * len(GAINS)]
    for name in names:
        numbers = next(piece.costs[name]["parameters"] for piece, row in scale.rows() if row.label == name)
        lines.append(f"| {name} | {numbers:,} | " + " | ".join(_share(scale.replicates, name, metric) for metric in GAINS) + " |")
    return "\n".join(
        [
            *lines,
            "",
            "With 95 % intervals; blank where A's own gain is not clear, so that there is nothing to keep a share of. The paper's aim is 0.002M numbers.",
        ]
    )


def share_kept(replicates: Replicates, whole: str, part: str, metric: str, reference: str = "tuning-free") -> Interval | None:
    """How much of what ``whole`` gains over ``reference`` the method ``part`` gains, None where the gain is not clear.

    The error is that of a ratio of means, linear in both: the half-samples of ``part``'s gain less the share of those of ``whole``'s.
    """
    gain, own = (replicates.difference(reference, label, metric) for label in (whole, part))
    span = None if gain is None else gain.interval
    if gain is None or own is None or span is None or span.high >= 0:
        return None
    share = own.value / gain.value
    drawn = {label: replicates.drawn[label][metric] - replicates.drawn[reference][metric] for label in (whole, part)}
    return Interval(share, standard_error(drawn[part] - share * drawn[whole], replicates.prompts) / abs(gain.value))


def _share(replicates: Replicates, name: str, metric: str) -> str:
    span = share_kept(replicates, "tuned", name, metric)
    return "" if span is None else f"{100 * span.value:.0f} % ({100 * span.low:.0f} to {100 * span.high:.0f})"


def table(name: str) -> str:
    """Markdown: a row for each method at a scale with every column of the paper, and cost."""
    scale = Scale.of(name)
    if scale is None:
        return f"`selfcascade claims` measures them: {', '.join(each for each in pieces() if each.startswith(f'claims-{name}'))}."
    metrics = [NAMED[metric] for metric in COLUMNS]
    lines = [
        f"| method | trained numbers | steps | training | time | peak MiB | {' | '.join(heading(metric) for metric in metrics)} |",
        f"|---|---:|---:|---:|---:|---:|{'---:|' * len(metrics)}",
    ]
    direct = scale.label("direct")
    for piece, row in scale.rows():
        trained = piece.costs.get(row.label, {}).get("parameters")
        cells = [row.label, f"{trained:,}" if trained else "0", *_training(piece, row.label)]
        cells += [_time(scale, piece, row, direct), _peak(piece, row.label)]
        for metric in metrics:
            number = row.numbers[metric.name]
            error = "" if number.error is None else f" ± {shown_number(number.error, metric)}"
            cells.append("–" if number.value is None else shown_number(number.value, metric) + error)
        lines.append("| " + " | ".join(cells) + " |")
    results = scale.found[0].results
    counts = f"{results.pictures} pictures of {results.prompts} held-out prompts a method against {results.real_pictures} real ones ({results.real})"
    units = "Training is in processor minutes, time a picture's over direct sampling's, the base's own passes included."
    about = f"{results.protocol.caption(counts)} ± is a standard error. {units}"
    hours = ", ".join(f"{piece.name} {sum(piece.stages.values()) / 3600:.1f} h on {piece.machine}" for piece in scale.found)
    return "\n".join([*lines, "", about, "", f"The pieces took {hours}."])


def _base(piece: Piece) -> str:
    return next(row.artifact for row in piece.results.rows if row.method == "base")


def _differences(claim: Claim, scale: Scale | None) -> Iterator[Difference]:
    if scale is None:
        return
    first, second = scale.label(claim.first), scale.label(claim.second)
    for metric in claim.paper:
        if first is not None and second is not None and (found := scale.replicates.difference(first, second, metric)) is not None:
            yield found


def _told(item: Difference) -> str:
    return f"{NAMED[item.metric].heading} {shown_difference(item, NAMED[item.metric])}"


def _seconds(cost: Mapping[str, Any] | None) -> float | None:
    return cost["cpu_seconds"] / cost["pictures"] if cost else None


def _time(scale: Scale, piece: Piece, row: Row, direct: str | None) -> str:
    whole = next((found for each in scale.found if direct and (found := _seconds(each.costs.get(direct)))), None)
    own, base = _seconds(piece.costs.get(row.label)), _seconds(piece.costs.get("base"))
    if whole is None or own is None or base is None:
        return "–"
    return f"{(own + (base if row.method in DERIVED else 0)) / whole:.2f}×"


def _training(piece: Piece, label: str) -> tuple[str, str]:
    """Steps, and processor minutes."""
    found = piece.training.get(label)
    return ("–", "–") if found is None else (f"{found['steps']:,}", f"{found['cpu_seconds'] / 60:.0f} min")


def _peak(piece: Piece, label: str) -> str:
    peak = piece.costs.get(label, {}).get("peak_bytes")
    return f"{peak / 2**20:,.0f}" if peak else "–"


def ablations() -> str:
    """Markdown: what each changed setting does to tuning-free or tuned, at 4x."""
    piece = read_piece(FOLDER, "claims-ablations")
    if piece is None:
        return "`selfcascade claims claims-ablations` measures them."
    lines = ["| changed | against | " + " | ".join(heading(NAMED[metric]) for metric in COLUMNS) + " |", "|---|---|" + "---:|" * len(COLUMNS)]
    for row in piece.results.shown():
        against = row.method if row.label != row.method else None
        if against is None:
            continue
        found = [piece.replicates.difference(against, row.label, metric) for metric in COLUMNS]
        lines.append(f"| {row.label} | {against} | " + " | ".join("–" if item is None else _bounds(item) for item in found) + " |")
    lines += ["", f"Differences with 95 % intervals over {piece.results.prompts} prompts; below 0 the change is better. **Bold**: the interval excludes 0."]
    return "\n".join(lines)


def _bounds(item: Difference) -> str:
    told = shown_difference(item, NAMED[item.metric])
    return f"**{told}**" if item.interval is not None and item.interval.excludes_zero else told


def training_steps() -> str:
    """Markdown: quality by steps and processor time of training, means over the seeds with their deviation."""
    found = [piece for name in pieces() if name.startswith("claims-steps-") and (piece := read_piece(FOLDER, name))]
    if not found:
        return "`selfcascade claims claims-steps-0 claims-steps-1 claims-steps-2` measures them."
    metrics = [NAMED[metric] for metric in COLUMNS]
    lines = ["| trained | processor minutes | " + " | ".join(heading(metric) for metric in metrics) + " |", "|---|---:|" + "---:|" * len(metrics)]
    for row in found[0].results.shown():
        if row.method == "base":
            continue
        minutes = [piece.training[row.label]["cpu_seconds"] / 60 for piece in found if row.label in piece.training]
        cells = [row.label, f"{mean(minutes):.1f}" if minutes else "–"]
        for metric in metrics:
            values = [value for piece in found if (value := piece.replicates.values[row.label].get(metric.name)) is not None]
            spread = f" ± {shown_number(stdev(values), metric)}" if len(values) > 1 and row.label in found[0].training else ""
            cells.append(shown_number(mean(values), metric) + spread if values else "–")
        lines.append("| " + " | ".join(cells) + " |")
    about = (
        f"Means over {len(found)} seed{'s' if len(found) > 1 else ''} of the training, {found[0].results.prompts} prompts each; ± is the deviation of a seed."
    )
    return "\n".join([*lines, "", about])


def recipes() -> str:
    """Markdown: what the full-size runs are counted to cost."""
    record = json.loads((FOLDER.parent / "recipes.json").read_bytes())
    lines = [
        "| run | base | trained | PFLOP | GPU hours | TFLOP a picture: direct | tuning-free | tuned | GPU hours a thousand, tuned |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, run in record["runs"].items():
        picture = run["picture_operations"]
        cells = [f"`{name}`", run["base"], f"{run['variant']}, {run['steps']:,} steps of {run['batch']} at {run['train_at']} px"]
        cells += [f"{run['training_operations'] / 1e15:,.0f}", f"{run['training_hours']:.1f}", f"{picture['direct'] / 1e12:,.0f}"]
        cells += [f"{picture[method] / 1e12:,.0f} ({picture[method] / picture['direct']:.2f})" for method in ("tuning-free", "tuned")]
        lines.append("| " + " | ".join([*cells, f"{run['hours_a_thousand']['tuned']:.1f}"]) + " |")
    seen = f"which a training step of upsampler C on SD 2.1 at 1024 px was seen to sustain on {record['card']}"
    about = f"Hours are operations over {record['rate'] / 1e12:.0f} TFLOP/s, {seen}."
    return "\n".join([*lines, "", f"{about} In brackets: over direct sampling."])


BLOCKS = {
    "claims": verdicts,
    "claims-kept": kept,
    "claims-4x": lambda: table("4x"),
    "claims-16x": lambda: table("16x"),
    "claims-steps": training_steps,
    "claims-ablations": ablations,
    "recipes": recipes,
}
"""What fills each block of the page."""


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
