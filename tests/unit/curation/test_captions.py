"""Captions from text files, JSON lines and parquet; wrong bytes cost one picture, a wrong table stops at its line."""

from __future__ import annotations

import json
import unicodedata

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from selfcascade.curation.captions import Caption, Tables, captioned, clean_caption, words_of
from selfcascade.curation.decoding import format_of_name
from selfcascade.curation.embedded import embedded_caption
from selfcascade.curation.folder import FolderTree
from selfcascade.curation.rows import Rows
from selfcascade.settings import SettingsError


def read(folder, kind="auto"):
    tree, tables = FolderTree(folder), Tables()
    with Rows() as pictures, Rows() as texts:
        for file in tree.files():
            if format_of_name(file.name):
                pictures.add(file.name, file.size, file.etag)
            elif file.name.endswith(".txt"):
                texts.add(file.name[:-4], file.name, file.size, file.etag)
            else:
                tables.take(file)
        return {row[0]: caption for row, caption in captioned(tree, pictures, texts, tables, kind)}


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_cleaning_is_idempotent_and_leaves_one_printable_line(text):
    clean = clean_caption(text)
    assert clean_caption(clean) == clean
    assert clean == clean.strip()
    assert "  " not in clean
    assert not any(unicodedata.category(character) == "Cc" for character in clean)


@given(st.lists(st.text("abcé猫-,.'!", min_size=1), min_size=1))
def test_cleaning_keeps_every_word(words):
    assert clean_caption("\n\t ".join(words)) == unicodedata.normalize("NFC", " ".join(words))


def test_half_a_surrogate_is_no_text():
    with pytest.raises(ValueError, match="surrogate"):
        clean_caption("a \ud800 b")


def test_text_files_beside_the_pictures(pictures):
    pictures.put("a.png", b"x", "\ufeffa  red\r\nfox ".encode())
    pictures.put("sub/b.jpg", b"x", "b")
    pictures.put("c.png", b"x", None)
    pictures.put("d.png", b"x", "caf\u00e9".encode("latin-1"))
    pictures.put("e.png", b"x", "a fox".encode("utf-16"))
    found = read(pictures.folder)
    assert found["a.png"] == Caption("a red fox")
    assert found["sub/b.jpg"] == Caption("b")
    assert found["c.png"] == Caption()
    assert found["d.png"].problem == "caption encoding: d.txt is not UTF-8"
    assert found["e.png"].problem == "caption encoding: e.txt is not UTF-8"


def test_json_lines_win_over_text_and_know_their_folder(pictures):
    pictures.put("a.png", b"x", "from text")
    pictures.put("sub/b.png", b"x", None)
    pictures.put("sub/c.png", b"x", None)
    (pictures.folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "from table"}\n\n{"file_name": "gone.png", "text": "x"}\n')
    lines = [b'{"file_name": "b.png", "caption": "caf\xe9"}', json.dumps({"file_name": "./c.png", "caption": 7}).encode()]
    (pictures.folder / "sub/metadata.jsonl").write_bytes(b"\n".join(lines))
    found = read(pictures.folder)
    assert found["a.png"] == Caption("from table")
    assert found["sub/b.png"].problem == "caption encoding: sub/metadata.jsonl line 1 is not UTF-8"
    assert found["sub/c.png"].problem == "caption unreadable: sub/metadata.jsonl line 2 holds no text"
    assert read(pictures.folder, "txt")["a.png"] == Caption("from text")


def test_two_captions_for_one_picture_are_ambiguous(pictures):
    pictures.put("a.png", b"x", None)
    pictures.put("b.png", b"x", None)
    rows = [("a.png", "one"), ("a.png", "two"), ("b.png", "one"), ("b.png", "one")]
    (pictures.folder / "metadata.jsonl").write_text("".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows))
    found = read(pictures.folder)
    assert (found["a.png"].problem or "").startswith("caption ambiguous")
    assert found["b.png"] == Caption("one")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"file_name": "a.png"\n', "metadata.jsonl line 1 is not UTF-8 JSON"),
        (b'{"file_name": "a.png", "text": "x"}\n[1]\n', "metadata.jsonl line 2 names no picture"),
        ('{"file_name": "a.png", "text": "x"}'.encode("utf-16"), "metadata.jsonl line 1 is not UTF-8 JSON"),
    ],
)
def test_a_broken_table_stops_at_its_line(pictures, content, complaint):
    pictures.put("a.png", b"x", None)
    (pictures.folder / "metadata.jsonl").write_bytes(content)
    with pytest.raises(SettingsError, match=complaint):
        read(pictures.folder)


def test_parquet_of_captions(pictures):
    for name in "abc":
        pictures.put(f"{name}.png", b"x", None)
    wrong = pa.Array.from_buffers(pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\4\0\0\0\5\0\0\0"), pa.py_buffer(b"xc\xe9yz")])
    pq.write_table(pa.table({"file_name": ["a.png", "b.png", "c.png"], "text": wrong}), pictures.folder / "captions.parquet")
    found = read(pictures.folder)
    assert (found["a.png"], found["c.png"]) == (Caption("x"), Caption("z"))
    assert found["b.png"].problem == "caption encoding: captions.parquet row 1 is not UTF-8"


def test_parquet_without_the_columns_or_no_parquet_is_refused(pictures):
    pictures.put("a.png", b"x", None)
    path = pictures.folder / "captions.parquet"
    pq.write_table(pa.table({"id": [1]}), path)
    with pytest.raises(SettingsError, match=r"captions\.parquet lacks a column file_name or path, or text or caption; it has id"):
        read(pictures.folder)
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(SettingsError, match=r"captions\.parquet is not a parquet file"):
        read(pictures.folder)
    with pytest.raises(SettingsError, match=r"'jsonl' but .* holds no metadata\.jsonl"):
        read(pictures.folder, "jsonl")


def xmp(text: str) -> bytes:
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:description><rdf:Alt>'
        f'<rdf:li xml:lang="x-default">{text}</rdf:li></rdf:Alt></dc:description></rdf:Description></rdf:RDF></x:xmpmeta>'
    ).encode()


def with_iptc(jpeg: bytes, caption: bytes) -> bytes:
    """A JPEG with a Photoshop segment whose resource 0x0404 holds an IPTC caption."""
    record = b"\x1c\x02\x78" + len(caption).to_bytes(2, "big") + caption
    resource = b"8BIM\x04\x04\0\0" + len(record).to_bytes(4, "big") + record + b"\0" * (len(record) % 2)
    body = b"Photoshop 3.0\0" + resource
    return jpeg[:2] + b"\xff\xed" + (len(body) + 2).to_bytes(2, "big") + body + jpeg[2:]


def test_captions_inside_the_files_are_found_xmp_before_iptc_before_exif(pictures):
    noise = pictures.noise()
    exif = Image.Exif()
    exif[0x010E] = "un caf\u00e9 d\u00e9crit".encode()
    plain, described, both = (pictures.encode(noise, "JPEG", **more) for more in ({}, {"exif": exif}, {"exif": exif, "xmp": xmp("from XMP &amp; more")}))
    assert embedded_caption(plain, "a.jpg").text is None
    assert embedded_caption(described, "a.jpg").text == "un caf\u00e9 d\u00e9crit"
    assert embedded_caption(with_iptc(described, b"from IPTC"), "a.jpg").text == "from IPTC"
    assert embedded_caption(with_iptc(plain, "\u00e9t\u00e9".encode("latin-1")), "a.jpg").text == "\u00e9t\u00e9"
    assert embedded_caption(with_iptc(both, b"from IPTC"), "a.jpg").text == "from XMP & more"
    for damaged in (b"", b"no picture", both[:40], pictures.encode(noise, "JPEG", xmp=b"<x:xmpmeta><unclosed>")):
        assert embedded_caption(damaged, "a.jpg") == Caption()


@pytest.mark.parametrize(
    ("inside", "caption"),
    [
        ("<title> a red\n fox </title><desc>drawn</desc>", "a red fox"),
        ("<metadata><dc:title>fox &amp; hen</dc:title></metadata><desc>drawn</desc>", "fox & hen"),
        ("<title/><metadata><dc:title>fox</dc:title></metadata>", "fox"),
        ("<g><title>of a part</title></g><desc>a drawing</desc>", "a drawing"),
        ("<g/>", None),
        ("<title>&fox;</title>", None),
        ("<title>unclosed", None),
    ],
)
def test_the_title_of_a_drawing_is_its_caption(inside, caption):
    """Its own, else that of its metadata, else its description; not that of a part, and of a damaged file nothing."""
    drawing = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:dc="http://purl.org/dc/elements/1.1/" width="9" height="9">{inside}</svg>'
    assert embedded_caption(drawing.encode(), "a.svg") == Caption(caption)
    assert embedded_caption(b'<!DOCTYPE svg [<!ENTITY fox "fox">]>' + drawing.encode(), "a.svg") == Caption()


def test_a_bomb_of_entities_in_xmp_is_not_expanded(pictures):
    bomb = b'<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]>' + xmp("&b;")
    assert embedded_caption(pictures.encode(pictures.noise(), "JPEG", xmp=bomb), "a.jpg").text is None


@pytest.mark.parametrize(
    ("name", "words"),
    [("birds/grey_heron-012.jpg", "grey heron"), ("Tree.png", "Tree"), ("a.b c.png", "a b c"), ("2004 default.jpg", "2004 default"), ("007.png", "007")],
)
def test_the_words_of_a_file_name(name, words):
    assert words_of(name) == words


def test_csv_beside_the_pictures_quotes_lines_and_wrong_bytes(pictures):
    for name in ("a", "b", "c", "folder/d"):
        pictures.put(f"{name}.png", b"x", None)
    pictures.put("metadata.csv", b'\xef\xbb\xbffile_name,label,text\r\na.png,1,"a red, ""quick""\r\nfox"\r\nb.png,2,caf\xe9\r\n./folder/d.png,3,\r\n', None)
    assert read(pictures.folder) == {
        "a.png": Caption('a red, "quick" fox'),
        "b.png": Caption(problem="caption encoding: metadata.csv line 4 is not UTF-8"),
        "c.png": Caption(),
        "folder/d.png": Caption(""),
    }
    assert read(pictures.folder, "csv") == read(pictures.folder)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"name,text\na.png,b\n", r"metadata.csv lacks a column file_name or path, or text or caption; it has name, text"),
        (b"", r"metadata.csv lacks a column file_name"),
        (b"file_name,text\na.png,b\n,c\n", r"metadata.csv line 3 names no picture"),
        (b'file_name,text\na.png,"b\n', r"metadata.csv is no CSV after line 1"),
    ],
)
def test_a_wrong_csv_is_named_with_its_line(pictures, data, message):
    pictures.put("a.png", b"x", None)
    pictures.put("metadata.csv", data, None)
    with pytest.raises(SettingsError, match=message):
        read(pictures.folder)
