"""Fill the tables of README and performance page from the committed results and the list of methods: ``python docs/tables.py``. No figure is typed by hand."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

from selfcascade.baselines.registry import BASELINES
from selfcascade.config import Method
from selfcascade.evaluation.report import heading, shown_difference, shown_number
from selfcascade.evaluation.results import METRICS, Metric, Number, Results

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "docs/results/demo.json"
"""The ``metrics.json`` of the demo's report: ``selfcascade pull reports/demo FOLDER``."""
PAGES = (ROOT / "docs/performance.md", ROOT / "docs/curation.md", ROOT / "docs/evaluation.md", ROOT / "docs/operations.md")
BENCHES = ROOT / "docs/results"
"""A file for each of :data:`BLOCKS`, as the script in ``tests/bench`` of its name writes it."""
CASCADE = {
    "base": "the base's own picture, at its own size",
    "lanczos": "the base's own picture, enlarged by Pillow's Lanczos filter",
    "tuning-free": "the cascade: each stage starts from the noised latent of the one below",
    "tuned": "the cascade, with the pivot's features added by an upsampler",
}
"""What the methods do that are no baselines of the registry."""
NEEDS = {
    "latent-sr": "`adapt` with `adaptation.trainable=latent-upscaler`",
    "x4-upscaler": "a folder or hub id of the upscaler, `generation.baselines.x4.model`",
    "hidiffusion": "the extra `peers`; SD 1.5, SD 2.1, SDXL",
    "lora": "the extra `lora`; `run` trains each entry of `finetunes`, `adapt` one with `adaptation.trainable=lora`",
    "full": "`run` trains it by `finetunes`, `adapt` with `adaptation.trainable=full`",
    "tuned": "`run` trains it, `adapt` with `adaptation.trainable=upsampler`",
}
"""What a method needs beside the base."""


def filled(text: str) -> str:
    """The README with the tables between their marks made anew."""
    results = table(Results.model_validate_json(RESULTS.read_bytes())) if RESULTS.exists() else "`make demo` prints them."
    return between(between(text, "results", results), "methods", methods())


def filled_page(text: str) -> str:
    """A page with the tables between the marks that it has made anew."""
    for block, make in BLOCKS.items():
        if f"<!-- {block}:begin -->" not in text:
            continue
        path = BENCHES / f"{block}.json"
        body = make(json.loads(path.read_bytes())) if path.exists() else f"`tests/bench/{block}.py` measures them."
        text = between(text, block, body)
    return text


def sampling(records: list[dict[str, Any]]) -> str:
    """Markdown: seconds a picture by subject, size and method; then the ratios that were aimed at."""
    seconds: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    ratios = []
    for record in records:
        _, subject, *rest = record["id"].split("/")
        if len(rest) == 3:
            seconds.setdefault((subject, rest[0]), {})[rest[2]] = record
        else:
            ratios.append((subject, " ".join(rest).replace("_", " "), record))
    names = list(dict.fromkeys(name for row in seconds.values() for name in row))
    lines = [_row(["seconds a picture", *(f"{subject} {factor}" for subject, factor in seconds)]), _row(["---", *["---:"] * len(seconds)])]
    for name in names:
        lines.append(_row([name, *(f"{row[name]['value']:,.{0 if row[name]['value'] >= 100 else 2}f}" if name in row else "–" for row in seconds.values())]))
    return "\n".join([*lines, "", *_aimed(ratios), "", _noted(records)])


def training(records: list[dict[str, Any]]) -> str:
    """Markdown: seconds and memory of a training step by method and subject; then ratios and shares by subject, and what was aimed at."""
    steps: dict[str, dict[str, str]] = {}
    ratios: dict[str, dict[str, str]] = {}
    aims: dict[str, str] = {}
    for record in records:
        _, subject, figure, *method = record["id"].split("/")
        if method:
            value = f"{record['value']:,.0f}" if figure == "MiB" else f"{record['value']:.3g}"
            steps.setdefault(method[0], {})[f"{subject}, {record['against']}: {figure}"] = value
        else:
            digits = 2 if record["value"] < 10 else 1
            span = "" if record["n"] == 1 else f" ({record['low']:.{digits}f} to {record['high']:.{digits}f})"
            ratios.setdefault(figure, {})[subject] = f"{record['value']:.{digits}f}{span}"
            aims[figure] = record["aim"] or aims.get(figure, "–")
    lines = []
    for title, rows, extra in (("a step", steps, {}), ("ratio", ratios, {"aim": aims})):
        columns = sorted({column for row in rows.values() for column in row}, key=lambda column: (column.partition(",")[0], column.endswith("iB"), column))
        lines += [_row([title, *columns, *extra]), _row(["---", *["---:"] * (len(columns) + len(extra))])]
        lines += [_row([name, *(row.get(column, "–") for column in columns), *(column[name] for column in extra.values())]) for name, row in rows.items()] + [
            ""
        ]
    rounds = {record["id"].split("/")[1]: record["n"] for record in records if record["unit"] == "s"}
    told = " and ".join(f"{count} on {subject}" for subject, count in rounds.items())
    notes = "".join(sorted({f" {record['note']}." for record in records if record["note"]}))
    return "\n".join([*lines, f"Median of paired rounds (lowest to highest), {told}; what has no span is counted. {_made(*records)}{notes}"])


def gpu(records: list[dict[str, Any]]) -> str:
    """Markdown: training at full width on a GPU, then pictures, where they were measured too."""
    pictures = [record for record in records if "/sdxl/" in record["id"] and "/GiB/" not in record["id"]]
    steps = training([record for record in records if "/sdxl/" not in record["id"]])
    return "\n\n".join([steps, sampling(pictures)] if pictures else [steps])


def _aimed(ratios: list[tuple[str, str, dict[str, Any]]]) -> list[str]:
    """Rows of ratios, each with its subject, name and record."""
    lines = [_row(["ratio", "on", "median", "lowest", "highest", "rounds", "aim"]), _row(["---", "---", "---:", "---:", "---:", "---:", "---:"])]
    for subject, name, record in ratios:
        lines.append(_row([name, subject, *(f"{record[key]:.3f}" for key in ("value", "low", "high")), str(record["n"]), record["aim"] or "–"]))
    return lines


def _noted(records: list[dict[str, Any]]) -> str:
    """Where they were made, and the notes of each subject."""
    notes = "; ".join(sorted({f"{' '.join(record['id'].split('/')[1:3])}: {record['note']}" for record in records if record["note"]}))
    return _made(*records) + (f" Where a picture takes minutes: {notes}." if notes else "")


def speed(record: dict[str, Any]) -> str:
    """Markdown: of each setting time, change of the picture and distances."""
    lines = [
        _row(["setting", "time / direct", "time / its reference", "change, RMS of 255", "KID_b × 1,000", "KID_r × 1,000", "layout_b"]),
        _row(["---", *["---:"] * 6]),
    ]
    for label, row in record["rows"].items():
        change = f"{row['change_rms']:.1f}" if row["against"] != label else "–"
        distances = [f"{scale * row[name]:.{digits}f} ± {scale * row[name + '_error']:.{digits}f}" for name, scale, digits in _DISTANCES]
        lines.append(_row([label, f"{row['over_direct']:.3f}", f"{row['over_reference']:.3f}", change, *distances]))
    cascade = record["cascade"]
    about = (
        f"{record['prompts']} prompts of the tune split on `{record['base'].partition('@')[0]}`, {cascade['height']} px, K / T = {cascade['start']:g}, "
        f"{cascade['upscale']}, eta {cascade['eta']:g}."
    )
    return "\n".join([*lines, "", f"{about} {_made(record)}"])


def watermarks(record: dict[str, Any]) -> str:
    """Markdown: what each bound of the score takes for marked, of pictures with a mark and without one."""
    columns = list(dict.fromkeys(name for found in record["sets"].values() for row in found["rows"] for name in row if name != "threshold"))
    lines = [_row(["`max_watermark`", "set", "unmarked, left out all the same", *columns[1:]]), _row(["---:", "---", *["---:"] * len(columns)])]
    for place, row in enumerate(next(iter(record["sets"].values()))["rows"]):
        for name, found in record["sets"].items():
            shares = found["rows"][place]
            lines.append(_row([str(row["threshold"]), name, *(f"{100 * shares[column]:.1f} %" if column in shares else "–" for column in columns)]))
    counts = ", ".join(f"{found['pictures']} {name}" for name, found in record["sets"].items())
    about = f"{counts}, each but the patterns with four marks; {record['threshold']} is the bound that the other half of the pictures chose."
    fewest = min(found["pictures"] for found in record["sets"].values() if len(found["rows"][0]) > 2)
    about += f" None of {fewest} can still be {300 / fewest:.0f} % of many."
    spent = ", ".join(f"{value:g} ms of {side} x {side} pixels" for side, value in record["milliseconds"].items())
    return "\n".join([*lines, "", f"{about} A score takes {spent}. {_made(record)}"])


def shrinking(record: dict[str, Any]) -> str:
    """Markdown: how far a JPEG that its decoder shrinks is from the whole picture, and how far that is from what quality 95 leaves of it."""
    names = ["shrunk by", "left for the filter", "used", "PSNR", "PSNR of quality 95", "photographs below that", "least margin"]
    lines = [_row(names), _row(["---:", "---:", "---", "---:", "---:", "---:", "---:"])]
    for row in record["rows"]:
        decibels = (f"{row[name]:.1f} dB" for name in ("psnr", "psnr_jpeg"))
        below = f"{row['worse']} of {row['photographs']}"
        lines.append(_row([str(row["shrink"]), f"{row['gap']:g}", "yes" if row["chosen"] else "no", *decibels, below, f"{row['worst']:+.1f} dB"]))
    return "\n".join([*lines, "", f"Against the photographs decoded whole, resized by the same filter; PSNR are means. {_made(record)}"])


_DISTANCES = (("kid_b", 1000, 1), ("kid_r", 1000, 1), ("layout_b", 1, 3))


def sweep(record: dict[str, Any]) -> str:
    """Markdown: the cascade by where its stage starts, how its pivot grows and eta, beside what it is compared with."""
    names = [metric for metric in METRICS if metric.name in next(iter(record["rows"].values()))]
    lines = [_row(["tune split", *(heading(metric) for metric in names)]), _row(["---", *["---:"] * len(names)])]
    for label, numbers in record["rows"].items():
        lines.append(_row([label, *(_cell(Number(value=value, error=error), metric) for metric in names for value, error in [numbers[metric.name]])]))
    return "\n".join([*lines, "", f"{record['prompts']} prompts of the tune split on `{record['base'].partition('@')[0]}`; ± is a standard error."])


def memory(records: list[dict[str, Any]]) -> str:
    """Markdown: peak memory by base, size and tier."""
    tiers = list(dict.fromkeys(record["tier"] for record in records))
    cells: dict[tuple[str, int, str, int], dict[str, int]] = {}
    for record in records:
        cells.setdefault((record["base"], record["side"], record["device"], record["networks_mib"]), {})[record["tier"]] = record["peak_mib"]
    lines = [
        _row(["base", "size", "device", "networks, MiB", *(f"`{tier}`, MiB" for tier in tiers)]),
        _row(["---", "---:", "---", *["---:"] * (1 + len(tiers))]),
    ]
    for (base, side, device, networks), row in cells.items():
        lines.append(_row([base, f"{side} px", device, f"{networks:,}", *(f"{row[tier]:,}" if tier in row else "–" for tier in tiers)]))
    return "\n".join(lines)


def upscalers(record: dict[str, Any]) -> str:
    """Markdown: what each way to enlarge the pivot makes of its latent, and what the cascade makes of that."""
    names = [metric for metric in METRICS if metric.name in next(iter(record["cascade"].values()))]
    lines = [
        _row(["pivot enlarged by", "latent RMSE", "PSNR to D(E(x)), dB", "ms a picture", *(heading(metric) for metric in names)]),
        _row(["---", *["---:"] * (3 + len(names))]),
    ]
    for label, numbers in record["cascade"].items():
        latent = record["latents x2"].get(label)
        quality = ["–"] * 3 if latent is None else [f"{latent['latent_rmse']:.3f}", f"{latent['psnr_to_decoded_db']:.1f}", f"{latent['ms']:.1f}"]
        lines.append(_row([label, *quality, *(_cell(Number(value=value, error=error), metric) for metric in names for value, error in [numbers[metric.name]])]))
    given = record["arguments"]
    about = (
        f"Latents of {given['pictures']} held-out pictures, from {int(given['size']) // 2} to {given['size']} px; the tuning-free cascade on "
        f"{given['prompts']} prompts of the tune split, K / T = {float(given['start']):g}, on `{record['base'].partition('@')[0]}`; ± is a standard error."
    )
    learned = f" The learned upscaler has {record['parameters']:,} numbers." if "parameters" in record else ""
    return "\n".join([*lines, "", about + learned])


def seeds(record: dict[str, Any]) -> str:
    """Markdown: by how much the tuned row of the demo lies below the tuning-free one, for each seed of the training."""
    rows = [(metric, record["rows"][metric.name]) for metric in METRICS if metric.name in record["rows"]]
    tried = sorted(rows[0][1]["gains"], key=int)
    lines = [_row(["distance", *(f"seed {seed}" for seed in tried), "mean", "deviation"]), _row(["---", *["---:"] * (len(tried) + 2)])]
    for metric, row in rows:
        values = [*(row["gains"][seed] for seed in tried), row["mean"], row["spread"]]
        lines.append(_row([heading(metric), *(_cell(Number(value=value), metric) for value in values)]))
    return "\n".join([*lines, "", f"{record['prompts']} prompts. {_made(record)}"])


def duplicates(record: dict[str, Any]) -> str:
    """Markdown: precision and recall of near duplicates by distance, then what the stage takes as rows grow."""
    lines = [
        _row(["`near_distance`", "set", "precision", "different pictures taken for one", *(kinds := list(record["sets"]["photographs"]["rows"][0]["recall"]))]),
        _row(["---:", "---", *["---:"] * (2 + len(kinds))]),
    ]
    for rows in zip(*(found["rows"] for found in record["sets"].values()), strict=True):
        for name, row in zip(record["sets"], rows, strict=True):
            shares = [row["precision"], row["mistaken"], *(row["recall"][kind] for kind in kinds)]
            lines.append(_row([str(row["distance"]), name, *(f"{100 * share:.1f} %" for share in shares)]))
    counts = ", ".join(f"{found['pictures']} {name}" for name, found in record["sets"].items())
    lines += ["", f"{counts}, each with {len(kinds)} variants, whose recall the last columns give. {_made(record)}", ""]
    lines += [_row(["rows", "`near_distance`", "seconds", "peak memory", "passes"]), _row(["---:"] * 5)]
    lines += [_row([f"{row['rows']:,}", str(row["distance"]), f"{row['seconds']:.1f}", f"{row['mib']} MiB", str(row["passes"])]) for row in record["scale"]]
    return "\n".join(lines)


def evaluation(records: list[dict[str, Any]]) -> str:
    """Markdown: CPU time of an evaluation beside others, by network, and what a picture leaves in memory."""
    lines = [_row(["figure", "median", "lowest", "highest", "rounds", "aim", "measured on"]), _row(["---", *["---:"] * 5, "---"])]
    for record in records:
        _, *network, figure = record["id"].split("/")
        cells = [f"{record[key]:.2f}" for key in ("value", "low", "high")]
        lines.append(_row([", ".join([figure.replace("_", " "), *network]), *cells, str(record["n"]), record["aim"], record["note"]]))
    return "\n".join([*lines, "", _made(records[0])])


def coverage(records: list[dict[str, Any]]) -> str:
    """Markdown: how often intervals held the truth and gates fired."""
    lines = [_row(["", "held or fired", "against", "aim"]), _row(["---", "---:", "---", "---:"])]
    for record in records:
        share = f"{100 * record['value']:.1f} % ({100 * record['low']:.1f} to {100 * record['high']:.1f})"
        note = f" ({record['note']})" if record["id"].endswith("all") else ""
        lines.append(_row([record["id"].partition("/")[2], share, record["against"] + note, record["aim"] or "–"]))
    shape = next(record["note"] for record in records if record["id"] == "coverage/KID")
    return "\n".join([*lines, "", f"{records[0]['n']:,} studies each: {shape}; for FID as many prompts as ten times the features."])


def operations(records: list[dict[str, Any]]) -> str:
    """Markdown: what generation at scale takes beside its sampling."""
    lines = [_row(["figure", "median", "lowest", "highest", "rounds", "aim", "against", "measured on"]), _row(["---", *["---:"] * 5, "---", "---"])]
    for record in sorted(records, key=lambda record: [part.zfill(9) if part.isdigit() else part for part in record["id"].split("/")]):
        _, figure, *more = record["id"].split("/")
        name = ", ".join([figure, *(f"{int(part):,} prompts" if part.isdigit() else part for part in more)])
        cells = [f"{record[key]:.3g}{'' if record['unit'] == 'ratio' else ' ' + record['unit']}" for key in ("value", "low", "high")]
        lines.append(_row([name, *cells, str(record["n"]), record["aim"] or "–", record["against"], record["note"]]))
    return "\n".join([*lines, "", _made(*({**record, "id": ""} for record in records))])


def faults(record: dict[str, Any]) -> str:
    """Markdown: which requests were spoilt while the pipeline ran, and what differed in the end."""
    lines = [
        _row(["requests", *record["spoilt"], "objects and pointers published", "of them other than on a whole store"]),
        _row(["---:"] * (3 + len(record["spoilt"]))),
    ]
    counts = [record["requests"], *record["spoilt"].values(), record["objects"] + record["pointers"], record["different"]]
    lines.append(_row([f"{count:,}" for count in counts]))
    return "\n".join([*lines, "", f"{100 * record['share']:g} % of the requests, each late by {record['delay']:g} s or worse. {_made(record)}"])


def paired(records: list[dict[str, Any]]) -> str:
    """Markdown: ratios to what others need for the same, with the rates."""
    lines = [_row(["ratio", "median", "lowest", "highest", "rounds", "aim", "ours against theirs"]), _row(["---", *["---:"] * 5, "---"])]
    for record in records:
        name = ", ".join(record["id"].split("/")[1:])
        lines.append(_row([name, *(f"{record[key]:.2f}" for key in ("value", "low", "high")), str(record["n"]), record["aim"] or "–", record["note"]]))
    return "\n".join([*lines, "", _made(*({**record, "id": ""} for record in records))])


BLOCKS = {
    "reading": paired,
    "curation": paired,
    "faults": faults,
    "sampling": sampling,
    "training": training,
    "gpu": gpu,
    "seeds": seeds,
    "speed": speed,
    "memory": memory,
    "upscalers": upscalers,
    "sweep": sweep,
    "duplicates": duplicates,
    "evaluation": evaluation,
    "coverage": coverage,
    "operations": operations,
    "watermarks": watermarks,
    "shrinking": shrinking,
}
"""What fills each block of a page, from the file of its name."""


def _made(*records: dict[str, Any]) -> str:
    """Where and at which commit; of several, each with the subjects that were measured there."""
    places: dict[tuple[str, str], dict[str, None]] = {}
    for record in records:
        place = (record["machine"], record["commit"].partition("-dirty")[0])
        places.setdefault(place, {}).update(dict.fromkeys(record.get("id", "").split("/")[1:2]))
    told = [f"on {machine}, at commit {commit}" for machine, commit in places]
    if len(told) > 1:
        told = [f"{text} ({', '.join(subjects)})" for text, subjects in zip(told, places.values(), strict=True)]
    return f"Measured {'; '.join(told)}."


def between(text: str, block: str, body: str) -> str:
    """The page with what lies between the marks of a block made anew."""
    begin, end = f"<!-- {block}:begin -->", f"<!-- {block}:end -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{body}\n{end}{after}"


def methods() -> str:
    """Markdown: a row for each method of `generate`, in the order of reports."""
    lines = [_row(["method", "what it draws", "what it needs beside the base"]), _row(["---", "---", "---"])]
    for name in get_args(Method):
        lines.append(_row([f"`{name}`", CASCADE[name] if name in CASCADE else BASELINES[name].summary, NEEDS.get(name, "")]))
    return "\n".join(lines)


def table(results: Results) -> str:
    """Markdown: a row for each method, a column for each metric; then each step of the method against the one before it."""
    metrics = [metric for metric in results.metrics if metric.better == "lower"]
    lines = [_row(["", *(heading(metric) for metric in metrics)]), _row(["---", *["---:"] * len(metrics)])]
    for row in results.shown():
        lines.append(_row([row.label, *(_cell(row.numbers[metric.name], metric) for metric in metrics)]))
    lines += ["", "Paired differences with 95 % intervals; below 0 the second method is better:", ""]
    lines += [_row(["", *(heading(metric) for metric in metrics)]), _row(["---", *["---:"] * len(metrics)])]
    found = {(item.first, item.second, item.metric): item for item in results.differences}
    for first, second in pairwise(row.label for row in results.shown() if row.method not in ("base", "lanczos")):
        cells = []
        for metric in metrics:
            item = found.get((first, second, metric.name))
            if item is None:
                cells.append("–")
                continue
            cells.append(shown_difference(item, metric))
        lines.append(_row([f"{second} against {first}", *cells]))
    counts = f"{results.pictures} pictures of {results.prompts} held-out prompts a method against {results.real_pictures} real ones ({results.real})"
    chosen = f"Settings were chosen on the {results.chosen_on} split."
    lines += ["", f"{results.protocol.caption(counts)} {chosen} Lower is better everywhere; ± is a standard error."]
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(number: Number, metric: Metric) -> str:
    if number.value is None:
        return "–"
    return shown_number(number.value, metric) + ("" if number.error is None else f" ± {shown_number(number.error, metric)}")


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
    for page in PAGES:
        page.write_text(filled_page(page.read_text(encoding="utf-8")), encoding="utf-8")
