"""Tables for other documents: they say what the report says, and text from outside is only text in them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from selfcascade.evaluation.published import read_results
from selfcascade.evaluation.report import shown_number
from selfcascade.evaluation.text_tables import latex, latex_table, markdown_table
from selfcascade.storage import Artifact

HOSTILE = "a|b \\input{/etc/passwd} & **c** <script>alert(1)</script> 100 % $x_1$ `d`\n~^#"


@pytest.fixture(scope="module")
def results(scene):
    return read_results(scene.store, scene.report)


@pytest.fixture(scope="module")
def hostile(results):
    """The first method has a label that an attacker chose."""
    first, *others = results.rows
    return results.model_copy(update={"rows": (first.model_copy(update={"label": HOSTILE}), *others)})


def test_they_are_in_the_artifact(scene, results):
    artifact = Artifact(scene.store, scene.report)
    assert artifact.read("table.md").decode() == markdown_table(results)
    assert artifact.read("table.tex").decode() == latex_table(results)


def test_markdown_reads_back_as_the_table(results):
    """A reader of Markdown sees a row for each method and the floor, every number at its digits, bold where it is best, and the protocol."""
    head, *rows = _rendered(markdown_table(results))
    shown = [metric for metric in results.metrics if any(row.numbers[metric.name].value is not None for row in results.shown())]
    assert [cell.rstrip(" ↓↑") for cell in head] == ["method", *(f"{m.heading} × {m.scale:,}" if m.scale != 1 else m.heading for m in shown)]
    assert len(rows) == len(results.shown()) + 1
    bold = 0
    for cells, row in zip(rows, (*results.shown(), results.floor), strict=True):
        assert cells[0] == ("floor" if row is results.floor else row.label)
        for cell, metric in zip(cells[1:], shown, strict=True):
            value = row.numbers[metric.name].value
            bold += cell.startswith("<strong>")
            assert cell.removeprefix("<strong>").partition(" ±")[0].removesuffix("</strong>") == ("–" if value is None else shown_number(value, metric))
    judged = [metric for metric in shown if metric.judged]
    assert bold >= len(judged)
    assert results.protocol.weights_sha256[:12] in markdown_table(results)


def test_bold_is_what_nothing_beats(results):
    """Per column: every method with the best value and none else; the base, which has another size, never."""
    for metric in results.metrics:
        best = {row.label for row in results.rows if results.is_best(row, metric)}
        values = {row.label: row.numbers[metric.name].value for row in results.shown() if row.method != "base"}
        known = [value for value in values.values() if value is not None]
        wanted = (max(known) if metric.better == "higher" else min(known)) if metric.better else None
        assert best == {label for label, value in values.items() if wanted is not None and value == wanted}


def test_labels_from_outside_stay_labels(hostile):
    head, first, *_ = _rendered(markdown_table(hostile))
    assert first[0] == "a|b \\input{/etc/passwd} &amp; **c** &lt;script&gt;alert(1)&lt;/script&gt; 100 % $x_1$ `d` ~^#"
    assert len(first) == len(head)
    rows = [line for line in latex_table(hostile).splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in rows} == {len(head) - 1}
    assert r"\input" not in latex_table(hostile)


@given(st.text())
def test_latex_sees_no_command_in_text(text):
    """Once the known escapes are gone, no character that means something to LaTeX is left."""
    plain = re.sub(r"\\(text[a-z]+\{\}|[&%$#_{}])|\$\\(times|to|pm)\$", "", latex(text))
    assert not set(plain) & set("\\&%$#_{}~^\n")


def test_latex_has_every_number(results):
    table = latex_table(results)
    assert table.count(r"\mathbf") == sum(results.is_best(row, metric) for row in results.shown() for metric in results.metrics)
    for row in results.shown():
        for metric in results.metrics:
            value = row.numbers[metric.name].value
            if value is not None:
                assert shown_number(value, metric).replace("−", "-").replace(",", "{,}") in table


def _rendered(markdown: str) -> list[list[str]]:
    """Cells of the table as HTML."""
    html = MarkdownIt("commonmark").enable("table").render(markdown)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)]
