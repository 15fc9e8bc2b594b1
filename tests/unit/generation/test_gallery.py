"""The gallery of a samples artifact: every sample once, text as text, the same bytes whoever makes it, and a browser shows it without complaint."""

import base64
import html
import io
import os
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

from selfcascade.config import PromptSettings
from selfcascade.generation.gallery import COVERS, SIDE, index_page, page_name
from selfcascade.generation.generate import generate_unit, plan_generation, publish_generation
from selfcascade.generation.samples import read_generated
from selfcascade.storage import Store, resolve
from selfcascade.storage.figures import figures, holds, without
from selfcascade.storage.purge import plan_purge, purge
from selfcascade.storage.verification import verify

HOSTILE = ("<script>alert(1)</script>", '" onerror="alert(2)', "a & b </figcaption></figure>", "‮gnp.exe 🦊 ünï", "x" * 400, "'--><b>")

HEAD = {"html", "head", "meta", "title", "link", "style", "body", "main"}
BODY = {"h1", "small", "code", "dl", "div", "dt", "dd", "nav", "a", "span", "p", "figure", "img", "figcaption", "h2", "ul", "li"}


def made(settings, store, order=None):
    plan = plan_generation(settings, store)
    for index in order or plan.todo:
        generate_unit(settings, store, plan, index, "cpu")
    publish_generation(settings, store, plan)
    return resolve(store, f"samples/{settings.name}")


@pytest.fixture
def hostile(generation, tmp_path):
    """Settings whose prompts are not kind to a page."""
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(HOSTILE))
    return generation.model_copy(update={"prompts": PromptSettings(file=path)})


class Seen(HTMLParser):
    """Elements by name, with their attributes, and all text."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page.decode())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def picture(attributes) -> np.ndarray:
    data = base64.b64decode(attributes["src"].removeprefix("data:image/webp;base64,"))
    return np.asarray(Image.open(io.BytesIO(data), formats=["WEBP"]).convert("RGB"), dtype=float)


def test_pages_show_every_sample_once_and_the_index_leads_to_them(store, generation):
    """A figure a sample, in the order of keys, its picture nearer to the sample's than to any other's; links lead to objects of the artifact."""
    artifact = made(generation, store)
    samples = list(read_generated(artifact))
    pages = [Seen(artifact.read(page_name(index))) for index in (0, 1)]
    assert [each["id"] for page in pages for each in page.all("figure")] == [sample.key for sample in samples]
    for sample, shown in zip(samples, [each for page in pages for each in page.all("img")], strict=True):
        assert max(sample.image.shape) <= SIDE
        assert shown["alt"] == sample.prompt
        far = [np.abs(picture(shown) - other.image).mean() for other in samples]
        assert samples[int(np.argmin(far))] is sample
    index = Seen(artifact.read("index.html"))
    assert [each["id"] for each in index.all("figure")] == [sample.key for sample in samples]
    objects = {entry.key for entry in artifact.manifest().objects}
    for number, page in enumerate([*pages, index]):
        links = [each["href"] for each in page.all("a")]
        assert {link.partition("#")[0] for link in links} - {""} <= objects
        assert (page_name(1 - number) in links) if number < 2 else {page_name(0), page_name(1)} <= set(links)
        assert not page.all("script")
        assert {each["src"][:16] for each in page.all("img")} == {"data:image/webp;"}


def test_text_of_prompts_stays_text(store, hostile):
    """No element and no attribute that the page of harmless prompts has not; every prompt is there, whole."""
    artifact = made(hostile, store)
    for key in ("00000.html", "00001.html", "index.html"):
        seen = Seen(artifact.read(key))
        assert {tag for tag, _ in seen.tags} <= HEAD | BODY
        assert not [name for _, attributes in seen.tags for name in attributes if name.startswith("on")]
    alts = {each["alt"] for key in ("00000.html", "00001.html") for each in Seen(artifact.read(key)).all("img")}
    assert alts == {" ".join(prompt.split()) for prompt in HOSTILE}


def test_pages_do_not_depend_on_who_made_them_or_in_which_order(store, store_settings, generation):
    first = made(generation, store)
    with Store.open(store_settings.model_copy(update={"prefix": store_settings.prefix + "-2"})) as other:
        second = made(generation, other, order=(1, 0))
        assert second.manifest().to_bytes() == first.manifest().to_bytes()


def test_a_missing_page_is_made_from_the_tar_that_is_there(store, generation, monkeypatch):
    """Killed between table and page; a unit without a page is not done."""
    plan = plan_generation(generation, store)
    generate_unit(generation, store, plan, 0, "cpu")
    key = f"{plan.ref.prefix}/{page_name(0)}"
    whole = store.read(key)
    store.delete([key])
    assert plan_generation(generation, store).todo == (0, 1)
    monkeypatch.setattr("selfcascade.generation.generate._sample", lambda *arguments: pytest.fail("sampled again"))
    assert generate_unit(generation, store, plan, 0, "cpu").count == 0
    assert store.read(key) == whole


def test_the_index_is_bounded(store, generation, monkeypatch):
    """Of a million samples in shards of 32: no more pictures than of a few shards, and no more pages read; a link to each page."""
    artifact = made(generation, store)
    read: list[str] = []
    monkeypatch.setattr(type(artifact), "read", lambda self, key: read.append(key) or b'<figure id="a">one</figure>\n<figure id="b">two</figure>\n')
    page = index_page(artifact, generation, [32] * 31_250)
    assert len(read) == COVERS == page.count(b"<figure")
    assert page.count(b'<li><a href="') == 31_250
    assert b"999,969 \xe2\x80\x93 1,000,000" in page
    assert len(page) < 3_000_000


def test_a_removed_sample_leaves_the_pages_too(store, generation, monkeypatch):
    """Picture, prompt and key are gone from its page and from the index, the other samples are not; verify calls both purged."""
    monkeypatch.setattr("selfcascade.storage.embedded.VACUUM_PAUSE", 0)
    artifact = made(generation, store)
    before = {key: artifact.read(key) for key in ("00000.html", "00001.html", "index.html")}
    sample = next(read_generated(artifact))
    purge(store, plan_purge(store, [sample.key]), reason="asked")
    again = resolve(store, "samples/tiny")
    for key, page in before.items():
        lines = [line for line in figures(page) if sample.key not in line]
        assert list(figures(again.read(key))) == lines
        assert sample.key.encode() not in again.read(key)
    states = {finding.key: finding.state for finding in verify(again)}
    assert {key for key, state in states.items() if state == "purged"} == {"00000.tar", "00000.parquet", "00000.html", "index.html"}
    assert set(states.values()) == {"purged", "sound"}


@pytest.mark.parametrize("key", ["cat", 'a"b', "<i>", "a&b"])
def test_a_sample_is_found_by_its_whole_key(key):
    from selfcascade.storage.figures import figure

    page = "\n".join(["<main>", figure("catfish", "one"), figure(key, "two\nlines"), f"<p>{html.escape(key)}</p>", "</main>"]).encode()
    assert holds(page, {key})
    assert not holds(page, {key[:-1], key + "x"})
    assert list(figures(without(page, {key}))) == [figure("catfish", "one")]
    assert without(page, {"dog"}) == page


@pytest.mark.full
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_gallery(store, hostile, tmp_path, scheme, width):
    """Chromium, from a pulled folder: nothing complained of and nothing asked for, every picture decoded, no sideways scrolling, links lead on and back."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None and "CI" not in os.environ:
        pytest.skip("chromium is not installed")
    assert browser is not None, "chromium is not installed"
    artifact = made(hostile, store)
    for entry in artifact.manifest().objects:
        artifact.download(entry.key, tmp_path / "gallery" / entry.key)
    with sync_playwright() as running:
        launched = running.chromium.launch(executable_path=browser, headless=True, args=["--no-sandbox"])
        page = launched.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("request", lambda request: said.append(request.url) if not request.url.startswith(("data:", "file:")) else None)
        page.goto(f"file://{tmp_path}/gallery/index.html")
        count = len(HOSTILE)
        decoded = "Promise.all([...document.images].map(image => { image.loading = 'eager'; return image.decode(); })).then(found => found.length)"

        def sound() -> None:
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            assert page.evaluate(decoded) == page.locator("figure").count()
            paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (paper == "rgb(255, 255, 255)") == (scheme == "light")

        sound()
        assert page.locator("figure").count() == count
        last = page.locator("figure").last.get_attribute("id")
        page.locator("figure a").last.click()
        assert page.url.endswith(f"00001.html#{last}")
        sound()
        assert page.evaluate("document.querySelector('figure:target').id") == last
        page.locator("a[rel=prev]").click()
        assert page.url.endswith("00000.html")
        page.locator("nav a").first.click()
        assert re.search(r"index\.html$", page.url)
        page.screenshot(path=tmp_path / "gallery.png", full_page=True)
        launched.close()
    assert said == []
