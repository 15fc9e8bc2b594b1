"""The main table of a report as Markdown, for an issue or a README, and as LaTeX, for a paper."""

from __future__ import annotations

import re
from collections.abc import Callable

from selfcascade.evaluation.report import heading, shown_number
from selfcascade.evaluation.results import Metric, Results, Row

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "×": r"$\times$", "→": r"$\to$", "±": r"$\pm$",
}  # fmt: skip
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|!~&])")
_ARROWS = {"lower": "↓", "higher": "↑", None: ""}


def markdown_table(results: Results) -> str:
    """A pipe table with a column for each metric that some method has, best values bold, and the protocol below it."""
    metrics = _metrics(results)
    rows = [["method", *(_heading(metric, _plain) for metric in metrics)], ["---", *["---:"] * len(metrics)]]
    for row in _rows(results):
        cells = []
        for metric in metrics:
            text = _shown(row, metric, " ± ")
            cells.append(f"**{text}**" if results.is_best(row, metric) else text)
        rows.append([_plain(row.label), *cells])
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([*lines, "", _plain(_caption(results)), ""])


def latex_table(results: Results) -> str:
    """A ``table*`` for the packages ``booktabs`` and ``graphicx``, best values bold, the protocol as caption."""
    metrics = _metrics(results)
    lines = [
        r"% \usepackage{booktabs, graphicx}",
        r"\begin{table*}",
        r"\centering",
        rf"\caption{{{latex(_caption(results))}}}",
        r"\resizebox{\textwidth}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * len(metrics)}}}",
        r"\toprule",
        " & ".join(["method", *(_heading(metric, latex, {"↓": r"$\downarrow$", "↑": r"$\uparrow$", "": ""}) for metric in metrics)]) + r" \\",
        r"\midrule",
    ]
    for row in _rows(results):
        if row.method == "real":
            lines.append(r"\midrule")
        cells = [_latex_number(results, row, metric) for metric in metrics]
        lines.append(" & ".join([latex(row.label), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}", r"\end{table*}", ""])


def latex(text: str) -> str:
    """``text`` as LaTeX shows it: no character of it is a command. Line breaks become spaces."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def _plain(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def _metrics(results: Results) -> list[Metric]:
    return [metric for metric in results.metrics if any(row.numbers[metric.name].value is not None for row in results.shown())]


def _rows(results: Results) -> list[Row]:
    floor = [] if results.floor is None else [results.floor.model_copy(update={"label": "floor"})]
    return [*results.shown(), *floor]


def _heading(metric: Metric, escaped: Callable[[str], str], arrows: dict[str, str] | None = None) -> str:
    arrow = _ARROWS[metric.better]
    return f"{escaped(heading(metric))} {arrows[arrow] if arrows else arrow}".rstrip()


def _shown(row: Row, metric: Metric, between: str) -> str:
    number = row.numbers[metric.name]
    if number.value is None:
        return "–"
    return shown_number(number.value, metric) + ("" if number.error is None else between + shown_number(number.error, metric))


def _latex_number(results: Results, row: Row, metric: Metric) -> str:
    if row.numbers[metric.name].value is None:
        return "--"
    value, _, error = _shown(row, metric, "±").replace("\N{MINUS SIGN}", "-").replace(",", "{,}").partition("±")
    bold = rf"\mathbf{{{value}}}" if results.is_best(row, metric) else value
    return f"${bold}" + (rf" \pm {error}$" if error else "$")


def _caption(results: Results) -> str:
    return f"{results.caption()} Bold: best at the target size. Floor: real pictures against other real ones. ±: {results.protocol.intervals}."
