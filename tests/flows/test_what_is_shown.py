"""Keys are stable, and text from outside cannot become markup."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from selfcascade_tasks.artifacts import artifact_key, data_uri, escaped


@given(st.lists(st.text(max_size=30), min_size=1, max_size=4))
def test_a_key_is_what_prefect_takes(parts):
    assert re.fullmatch(r"([a-z0-9]+(-[a-z0-9]+)*)?", artifact_key(*parts))


def test_keys_of_different_etas_differ():
    assert artifact_key("demo", "direct eta 0.5") == "demo-direct-eta-0-5"
    assert artifact_key("demo", "direct eta 0") != artifact_key("demo", "direct eta 1")


@pytest.mark.parametrize(
    "caption",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "[click](javascript:alert(1))",
        "![x](http://example.com/pixel.png)",
        "`code` *em* _em_ ~~gone~~ # heading",
        "a\n\n# heading\n\n- item",
        "a | b",
        "&lt;b&gt; &amp; \\",
    ],
)
def test_a_caption_is_shown_as_it_is(caption):
    html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(f"1. {escaped(caption)}")
    inner = re.fullmatch(r"<ol>\n<li>(.*)</li>\n</ol>\n", html, re.S).group(1)
    assert "<" not in inner
    shown = inner.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace("&amp;", "&")
    assert shown == " ".join(caption.split())


@given(st.text(max_size=200))
def test_no_caption_becomes_markup(caption):
    html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(f"x {escaped(caption)}")
    assert re.fullmatch(r"<p>[^<]*</p>\n", html)


def test_an_image_travels_in_its_uri():
    assert data_uri(b"\x89PNG") == "data:image/png;base64,iVBORw=="
