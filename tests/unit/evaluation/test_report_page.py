"""The page: what it says of uncertain numbers, that outside text cannot break it, that it opens without a request."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import sync_playwright

from selfcascade.evaluation.history_plot import history_svg
from selfcascade.evaluation.lineage import thinned
from selfcascade.evaluation.loss_plot import log_ticks, loss_svg, running_mean, step_ticks
from selfcascade.evaluation.published import Past, read_results
from selfcascade.evaluation.report import render_report, short, shown_number
from selfcascade.evaluation.results import METRICS, Curve, Number, SheetRow
from selfcascade.evaluation.spectrum_plot import spectrum_svg
from selfcascade.storage import Artifact

_NAMED = {metric.name: metric for metric in METRICS}
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7 * 7 }} ' + "wide " * 3 + "\u202e" + "W" * 200


def blank_pictures(results, side):
    """A black picture for each that the page of ``results`` shows."""
    keys = {line.key for line in (*results.sheet, *results.extremes)}
    return {row.label: dict.fromkeys(keys, np.zeros((side, side, 3), np.uint8)) for row in results.rows}


@pytest.fixture(scope="module")
def hostile_page(scene):
    """The scene's results under texts that an attacker chose, with a long curve."""
    results = read_results(scene.store, scene.report)
    rows = tuple(row.model_copy(update={"label": f"{HOSTILE} {row.label}"}) for row in results.rows)
    relabelled = {row.label: new.label for row, new in zip(results.rows, rows, strict=True)}
    results = results.model_copy(
        update={
            "name": HOSTILE,
            "rows": rows,
            "differences": tuple(item.model_copy(update={"first": relabelled[item.first], "second": relabelled[item.second]}) for item in results.differences),
            "sheet": tuple(SheetRow(key=row.key, prompt=HOSTILE) for row in results.sheet),
            "extremes": tuple(each.model_copy(update={"label": relabelled[each.label], "prompt": HOSTILE}) for each in results.extremes),
            "curves": (Curve(name=HOSTILE, steps=tuple(range(1, 101)), losses=tuple(1 / step for step in range(1, 101))),),
        }
    )
    return render_report(results, blank_pictures(results, 24))


def test_text_from_outside_is_only_text(hostile_page):
    """No tag, attribute or template of a prompt, label or name survives."""
    assert hostile_page.count("<script") == 1
    assert "onerror=alert(1)>" not in hostile_page
    assert "{{ 7 * 7 }}" in hostile_page
    assert set(re.findall(r"<img src=\"([^\"]{0,16})", hostile_page)) == {"data:image/jpeg;"}


def test_the_page_asks_for_nothing(scene):
    """Every reference is a data URI, and the policy of the page forbids anything else: of scripts it allows this one alone."""
    page = Artifact(scene.store, scene.report).read("report.html").decode()
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    allowed = "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src '{allowed}'\"" in page
    assert all(reference.startswith("data:") for reference in re.findall(r"(?:src|href)=\"([^\"]*)", page))
    assert "url(" not in page
    assert "@import" not in page
    assert page.count("<script") == 1


def test_kid_leads_and_fid_is_doubted(scene):
    page = Artifact(scene.store, scene.report).read("report.html").decode()
    assert page.index("KID_r") < page.index("FID_r")
    assert "FID is biased upwards" in page
    assert "chosen on the <b>tune</b> split and frozen" in page
    assert "real pictures against" in page
    assert "by construction" in page


def test_a_report_on_what_was_tuned_says_so(scene):
    results = read_results(scene.store, scene.report)
    pictures = blank_pictures(results, 4)
    assert "the same pictures" not in render_report(results, pictures)
    assert "These are the same pictures" in render_report(results.model_copy(update={"chosen_on": "test"}), pictures)


@pytest.mark.parametrize(
    ("value", "name", "signed", "shown"),
    [
        (-0.0241, "kid_r", True, "−24.1"),
        (1.2345, "kid_r", False, "1,234.5"),
        (-0.00001, "kid_r", True, "0.0"),
        (16.4, "fid_r", True, "+16"),
        (0.1234, "layout_b", False, "0.123"),
    ],
)
def test_numbers_are_shown_at_their_scale(value, name, signed, shown):
    assert shown_number(value, _NAMED[name], signed=signed) == shown


def test_versions_are_cut_for_people():
    assert short("tiny@" + "a" * 64) == "tiny@" + "a" * 12
    assert short("b" * 64) == "b" * 12
    assert short("owner/name@main") == "owner/name@main"


@given(st.lists(st.floats(1e-6, 1e3), min_size=2, max_size=60), st.integers(0, 10_000), st.integers(1, 50))
def test_any_curve_can_be_drawn(losses, first, stride):
    """Finite coordinates inside the picture, for constant losses, single steps and wide ranges."""
    curve = Curve(name="a", steps=tuple(first + stride * place for place in range(len(losses))), losses=tuple(losses))
    svg = loss_svg(curve)
    assert "nan" not in svg
    assert "inf" not in svg
    for points in re.findall(r"points=\"([^\"]*)", svg):
        for point in points.split():
            x, y = map(float, point.split(","))
            assert -1 <= x <= 721
            assert -1 <= y <= 261


@given(st.floats(1e-5, 10), st.floats(1.001, 1e4))
def test_ticks_lie_inside_and_are_few(low, factor):
    ticks = log_ticks(low, low * factor)
    assert 2 <= len(ticks) <= 8
    assert all(low * 0.999 <= tick <= low * factor * 1.001 for tick in ticks)


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_steps_have_few_round_ticks(first, length):
    ticks = step_ticks(first, first + length)
    assert len(ticks) <= 8
    assert all(first <= tick <= first + length for tick in ticks)


def test_a_running_mean_does_not_lag():
    assert running_mean([1, 2, 3, 4, 5], 1) == pytest.approx([1, 2, 3, 4, 5])
    assert running_mean([0, 0, 9, 0, 0], 1) == pytest.approx([0, 3, 3, 3, 0])


def test_a_long_curve_is_thinned_by_averaging():
    curve = thinned("a", list(range(1, 2502)), [1.0, 3.0] * 1250 + [5.0])
    assert len(curve.steps) <= 1000
    assert curve.steps[-1] == 2501
    assert curve.steps == tuple(sorted(curve.steps))
    assert sum(curve.losses) / len(curve.losses) == pytest.approx(2, abs=0.1)


@pytest.fixture
def chromium():
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None and "CI" not in os.environ:
        pytest.skip("chromium is not installed")
    assert browser is not None, "chromium is not installed"
    with sync_playwright() as running:
        launched = running.chromium.launch(executable_path=browser, headless=True, args=["--no-sandbox"])
        yield launched
        launched.close()


def _opened(chromium, path: Path, html: str, **options):
    """A page of the browser with ``html``, and whatever it complains of or asks for from now on."""
    path.write_text(html)
    page = chromium.new_page(**options)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda request: said.append(request.url) if not request.url.startswith(("data:", "file:")) else None)
    page.goto(f"file://{path}")
    return page, said


@pytest.mark.full
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_opens_in_a_browser(hostile_page, scene, chromium, tmp_path: Path, scheme, width):
    """Chromium: no console message, no request, no sideways scrolling of the page, every picture decoded; for the plain and for the hostile page."""
    pages = {"plain": Artifact(scene.store, scene.report).read("report.html").decode(), "hostile": hostile_page}
    for name, html in pages.items():
        page, said = _opened(chromium, tmp_path / f"{name}.html", html, viewport={"width": width, "height": 900}, color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
        assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert page.evaluate("document.images.length") == 15 + 5 * 2 * 3
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
        page.locator(".sheet img").first.click()
        assert page.evaluate("document.querySelector('dialog').scrollWidth <= document.querySelector('dialog').clientWidth"), name
        assert said == []


@pytest.mark.full
def test_a_click_on_a_heading_sorts(scene, chromium, tmp_path: Path):
    """Best first, worst first, as it was; rows without a number last, the floor always at the end."""
    results = read_results(scene.store, scene.report)
    page, said = _opened(chromium, tmp_path / "report.html", Artifact(scene.store, scene.report).read("report.html").decode())
    table = page.locator("table.sortable").first

    def order() -> list[str]:
        return [text.split("\n")[0].strip() for text in table.locator("tbody th").all_inner_texts()]

    before = order()
    assert before == [*(row.label for row in results.shown()), "floor"]
    for name in ("kid_r", "coverage_r", "fid_b"):
        metric = _NAMED[name]
        values = {row.label: row.numbers[name].value for row in results.shown()}
        known = sorted((label for label in values if values[label] is not None), key=lambda label: values[label], reverse=metric.better == "higher")
        blank = [label for label in before[:-1] if values[label] is None]
        heading = table.locator("thead button", has_text=re.compile(f"^{metric.heading}"))
        heading.click()
        assert [values[label] for label in order()[: len(known)]] == [values[label] for label in known]
        assert order()[len(known) :] == [*blank, "floor"]
        heading.press("Enter")
        assert [values[label] for label in order()[: len(known)]] == [values[label] for label in reversed(known)]
        assert order()[len(known) :] == [*blank, "floor"]
        heading.click()
        assert order() == before
    assert said == []


@pytest.mark.full
def test_a_picture_is_enlarged_beside_the_others_of_its_prompt(scene, chromium, tmp_path: Path):
    """All methods' pictures of the prompt, moved to one place together; keys go on to other prompts, change the scale and close."""
    results = read_results(scene.store, scene.report)
    page, said = _opened(chromium, tmp_path / "report.html", Artifact(scene.store, scene.report).read("report.html").decode())
    sheet, dialog = page.locator(".sheet").first, page.locator("dialog")
    assert not dialog.is_visible()
    sheet.locator("tbody tr").nth(1).locator("img").nth(2).click()
    assert dialog.locator("h3").inner_text() == results.sheet[1].prompt
    assert dialog.locator("figcaption").all_inner_texts() == [row.label for row in results.shown()]
    sources = "row => [...row.querySelectorAll('img')].map(image => image.src)"
    assert dialog.evaluate(sources) == sheet.locator("tbody tr").nth(1).evaluate(sources)
    box = dialog.locator("figure > div").nth(3).bounding_box()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.75 * box["height"])
    origins = dialog.locator("img").evaluate_all("images => images.map(image => image.style.transformOrigin)")
    assert len(set(origins)) == 1
    assert [float(part.rstrip("%")) for part in origins[0].split()] == pytest.approx([25, 75], abs=1)
    scales = "images => images.map(image => image.style.transform)"
    assert set(dialog.locator("img").evaluate_all(scales)) == {"scale(3)"}
    page.keyboard.press("+")
    assert set(dialog.locator("img").evaluate_all(scales)) == {"scale(3.75)"}
    page.mouse.move(1, 1)
    assert set(dialog.locator("img").evaluate_all(scales)) == {""}
    page.keyboard.press("ArrowRight")
    assert dialog.locator("h3").inner_text() == results.sheet[2 % len(results.sheet)].prompt
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    page.locator(".sheet").last.locator("tbody tr").nth(3).locator("img").last.click()
    shown = results.shown()[3].label
    assert dialog.locator("h3").inner_text() == shown
    extremes = [each for each in results.extremes if each.label == shown]
    assert dialog.locator("figcaption").all_inner_texts() == [f"{each.realism:.2f} {each.prompt}" for each in extremes]
    assert said == []


def test_a_history_is_drawn_at_its_place_with_its_intervals(scene):
    """A line for each method that has the metric, a bar an interval high at each version, dates of no more than six, and nothing where no version has it."""
    results = read_results(scene.store, scene.report)
    first = datetime(2026, 1, 1, tzinfo=UTC)

    def past(number):
        rows = tuple(row.model_copy(update={"numbers": row.numbers | {"kid_r": Number(value=0.1 + 0.01 * number, error=0.005)}}) for row in results.rows[-2:])
        return Past(f"{number:064x}", first + timedelta(days=number), results.model_copy(update={"rows": rows}))

    labels = [row.label for row in results.rows[-2:]]
    svg = history_svg(_NAMED["kid_r"], [past(number) for number in range(11)], labels)
    lines = [[tuple(map(float, point.split(","))) for point in points.split()] for points in re.findall(r'points="([^"]+)"', svg)]
    assert len(lines) == 2
    assert [(x + 4, y) for x, y in lines[0]] == [pytest.approx(point, abs=0.11) for point in lines[1]]
    steps = [(after[0] - before[0], before[1] - after[1]) for before, after in pairwise(lines[0])]
    assert all(step == pytest.approx(steps[0], abs=0.11) for step in steps)
    bars = [(float(top), float(low)) for low, top in re.findall(r'class="axis" x1="[0-9.]+" x2="[0-9.]+" y1="([0-9.]+)" y2="([0-9.]+)"', svg)]
    assert len(bars) == 22
    unit = (lines[0][0][1] - lines[0][-1][1]) / 0.1
    assert all(low - top == pytest.approx(2 * 1.95996 * 0.005 * unit, abs=0.21) for top, low in bars)
    assert len(re.findall("2026-01-", svg)) <= 6
    assert history_svg(_NAMED["cmmd_r"], [past(0), past(1)], labels) == ""
    assert "nan" not in history_svg(_NAMED["kid_r"], [past(0), past(0)], labels)


def test_spectra_are_drawn_beside_the_real_ones(scene):
    """A line for each shown method of the target's size, none of whose labels lie on another; a ratio of 1 lies on the axis."""
    results = read_results(scene.store, scene.report)
    assert [item.label for item in results.spectra] == ["real pictures", "lanczos", "direct eta 1", "tuning-free", "tuned"]
    svg = spectrum_svg(results.spectra)
    assert svg.count("<polyline") == 4
    places = sorted(float(y) for y in re.findall(r'<text x="608" y="([0-9.-]+)"', svg))
    assert len(places) == 4
    assert min(after - before for before, after in pairwise(places)) >= 14.9
    same = spectrum_svg([results.spectra[0], results.spectra[0].model_copy(update={"label": "itself"})])
    axis = re.search(r'class="axis" x1="64" x2="600" y1="([0-9.]+)"', same)[1]
    assert {point.partition(",")[2] for point in re.search(r'points="([^"]+)"', same)[1].split()} == {axis}
