"""Prompt files of every kind, what a bad one gets, and captions of a dataset."""

import csv
import hashlib
import io
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selfcascade.config import PromptSettings
from selfcascade.generation.prompts import Prompt, PromptList, load_prompts, prompts_of_rows, read_prompt_file, words_of
from selfcascade.settings import SettingsError, digest_of

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(lambda text: text.strip() != "")
rows = st.fixed_dictionaries(
    {"prompt": texts},
    optional={"negative_prompt": st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=10), "seed": st.integers(0, 2**63 - 1)},
)
tables = st.lists(rows, min_size=1, max_size=6)
relaxed = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def as_csv(table):
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, ["prompt", "negative_prompt", "seed"])
    writer.writeheader()
    writer.writerows(table)
    return buffer.getvalue().encode()


def as_jsonl(table):
    return "\n".join(json.dumps(row) for row in table).encode()


def as_parquet(table):
    schema = pa.schema([("prompt", pa.string()), ("negative_prompt", pa.string()), ("seed", pa.int64())])
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(table, schema=schema), buffer)
    return buffer.getvalue()


def version_of(prompts):
    return PromptList(enumerate(prompts)).version


def read(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    return tuple(read_prompt_file(path))


@relaxed
@given(table=tables, rng=st.randoms(use_true_random=False))
def test_every_kind_of_file_holds_the_same_prompts_in_any_order(tmp_path, table, rng: random.Random):
    """csv, jsonl and parquet of the same rows give equal prompts, ids included, and so does any order of the rows."""
    expected = read(tmp_path, "p.jsonl", as_jsonl(table))
    assert sorted(prompt.text for prompt in expected) == sorted(row["prompt"].strip() for row in table)
    assert len({prompt.id for prompt in expected}) == len(table)
    rng.shuffle(table)
    assert read(tmp_path, "p.jsonl", as_jsonl(table)) == expected
    assert read(tmp_path, "p.parquet", as_parquet(table)) == expected
    assert read(tmp_path, "p.csv", as_csv(table)) == expected
    assert (
        version_of(expected)
        == version_of(reversed(expected))
        == digest_of([[prompt.id, prompt.text, prompt.negative_prompt, prompt.seed] for prompt in expected])
    )


@relaxed
@given(st.lists(texts.filter(lambda text: not set(text) & set("\r\n")), min_size=1, max_size=6))
def test_a_text_file_has_a_prompt_a_line(tmp_path, lines):
    prompts = read(tmp_path, "p.txt", "\r\n".join(["", *lines, "  "]).encode("utf-8-sig"))
    assert sorted(prompt.text for prompt in prompts) == sorted(line.strip() for line in lines)


def test_ids_are_the_hash_of_the_text_and_number_equal_texts(tmp_path):
    prompts = read(tmp_path, "p.txt", b"a red fox\na cat\na red fox\n")
    fox = hashlib.sha256(b"a red fox").hexdigest()[:16]
    assert {(prompt.id, prompt.text) for prompt in prompts} == {
        (fox, "a red fox"),
        (fox + "-2", "a red fox"),
        (hashlib.sha256(b"a cat").hexdigest()[:16], "a cat"),
    }


def test_equal_texts_are_numbered_by_negative_prompt_then_seed_none_first(tmp_path):
    """Texts compare as texts, a prefix before what it begins; seeds as numbers."""
    order = [(None, None), (None, 2), (None, 10), ("", 5), ("a", None), ("a", 3), ("a b", 1), ("é", 0)]
    table = [{"prompt": "fox", "negative_prompt": negative, "seed": seed} for negative, seed in reversed(order)]
    stem = hashlib.sha256(b"fox").hexdigest()[:16]
    found = {prompt.id: (prompt.negative_prompt, prompt.seed) for prompt in read(tmp_path, "p.jsonl", as_jsonl(table))}
    assert [found[stem if number == 1 else f"{stem}-{number}"] for number in range(1, 9)] == order


def test_given_ids_seeds_and_negative_prompts_are_kept_and_other_columns_ignored(tmp_path):
    data = b'id,prompt,seed,category,negative_prompt\n7,"fox, red",5.0,animals,blurry\nB_2,cat,,,\n'
    assert read(tmp_path, "p.csv", data) == (Prompt("7", "fox, red", "blurry", 5), Prompt("B_2", "cat"))
    data = b'{"id": 7, "prompt": "fox, red", "seed": 5, "negative_prompt": "blurry", "tags": [1]}\n\n{"id": "B_2", "prompt": " cat ", "seed": null}\n'
    assert read(tmp_path, "p.jsonl", data) == (Prompt("7", "fox, red", "blurry", 5), Prompt("B_2", "cat"))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.txt", b"", "has no prompt"),
        ("p.txt", b"\n  \n", "has no prompt"),
        ("p.txt", "fox\ncaf\u00e9\n".encode("latin-1"), "row 2: not UTF-8 (byte 0xe9); save the file as UTF-8"),
        ("p.txt", "fox".encode("utf-16"), "row 1: not UTF-8"),
        ("p.csv", b"", "has no prompt"),
        ("p.csv", b"prompt\n", "has no prompt"),
        ("p.csv", b"text\nfox\n", "row 1: no column 'prompt' among 'text'"),
        ("p.csv", b"prompt,prompt\nfox,cat\n", "row 1: two columns have the same name"),
        ("p.csv", b"prompt\nfox\na red fox, running\n", "row 3: 2 cells under 1 columns"),
        ("p.csv", b'prompt,id\n"fox,1\n', "row 2: unexpected end of data"),
        ("p.csv", b"prompt,id\nfox,a\n,b\n", "row 3: 'prompt' must be a text that is not blank, not ''"),
        ("p.csv", b"prompt,id\nfox,a.b\n", "row 2: 'id' must be at most 64 of"),
        ("p.csv", b"prompt,id\nfox,a\ncat,a\n", "row 3: id 'a' is taken by row 2"),
        ("p.csv", b"prompt,seed\nfox,-1\n", "row 2: 'seed' must be a whole number from 0 to 2^63 - 1, not '-1'"),
        ("p.csv", b"prompt,seed\nfox,9223372036854775808\n", "row 2: 'seed' must be"),
        ("p.csv", b"prompt,seed\nfox,1.5\n", "row 2: 'seed' must be"),
        ("p.csv", b"prompt,height\nfox,512\n", "row 2: 'height' of a single prompt is not supported; set cascade.height"),
        ("p.jsonl", b'{"prompt": "fox"}\n{"prompt"\n', "row 2: not JSON"),
        ("p.jsonl", b'"fox"\n', "row 1: must be a JSON object"),
        ("p.jsonl", b'{"prompt": ["fox"]}\n', "row 1: 'prompt' must be a text"),
        ("p.jsonl", b'{"Prompt": "fox"}\n', "row 1: 'prompt' must be a text that is not blank, not None"),
        ("p.jsonl", b'{"prompt": "fox", "seed": true}\n', "row 1: 'seed' must be"),
        ("p.jsonl", b'{"prompt": "fox", "seed": 1e300}\n', "row 1: 'seed' must be"),
        ("p.jsonl", b'{"prompt": "fox", "negative_prompt": 3}\n', "row 1: 'negative_prompt' must be a text"),
        ("p.jsonl", b'{"prompt": "\\ud800"}\n', "row 1: half of a surrogate pair"),
        ("p.parquet", b"PAR1", "whole file: not parquet"),
        ("p.json", b"[]", "must end in one of .txt, .csv, .jsonl, .parquet"),
    ],
)
def test_a_bad_file_gets_one_line_that_names_file_and_row(tmp_path, name, data, message):
    with pytest.raises(SettingsError) as caught:
        read(tmp_path, name, data)
    assert message in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_id_that_is_the_hash_of_another_prompt_is_refused(tmp_path):
    fox = hashlib.sha256(b"fox").hexdigest()[:16]
    with pytest.raises(SettingsError, match=r"row 2: its id .* is taken by row 1"):
        read(tmp_path, "p.jsonl", as_jsonl([{"prompt": "cat", "id": fox}, {"prompt": "fox"}]))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"none\.txt cannot be read: No such file"):
        read_prompt_file(tmp_path / "none.txt")


def test_the_version_sees_every_field():
    versions = {
        version_of([prompt]) for prompt in (Prompt("a", "fox"), Prompt("b", "fox"), Prompt("a", "cat"), Prompt("a", "fox", ""), Prompt("a", "fox", seed=0))
    }
    assert len(versions) == 5


CAPTIONS = [
    {"key": "d", "caption": "Red fox", "split": "test", "kept": True},
    {"key": "a", "caption": "red Cat", "split": "train", "kept": True},
    {"key": "b", "caption": "a fox", "split": "train", "kept": True},
    {"key": "c", "caption": "red zebra", "split": "test", "kept": True},
    {"key": "e", "caption": "cat", "split": "test", "kept": False},
    {"key": "f", "caption": " ", "split": "test", "kept": True},
    {"key": "g", "caption": "zebra", "split": "train", "kept": False},
    {"key": "h", "caption": "A cat.", "split": "test", "kept": True},
]


def test_captions_of_kept_rows_in_their_order():
    assert [prompt.id for prompt in prompts_of_rows(lambda: CAPTIONS, split="test", known_words=False)] == ["d", "c", "h"]
    assert [prompt.id for prompt in prompts_of_rows(lambda: CAPTIONS, split="train", known_words=True)] == ["a", "b"]


def test_known_words_leaves_out_what_only_held_out_or_rejected_captions_say():
    assert tuple(prompts_of_rows(lambda: CAPTIONS, split="test", known_words=True)) == (Prompt("d", "Red fox"), Prompt("h", "A cat."))


def test_words_are_case_folded_runs_of_letters_and_digits():
    assert words_of("Man’s-hat, No. 1 (RED) straße") == {"man", "s", "hat", "no", "1", "red", "strasse"}


def test_more_prompts_than_there_are_is_an_error(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("fox\ncat\n")
    assert len(load_prompts(PromptSettings(file=path, count=1), None)) == 1
    with pytest.raises(SettingsError, match=r"p\.txt has 2 prompts but prompts\.count asks for 3"):
        load_prompts(PromptSettings(file=path, count=3), None)


def test_neither_file_nor_dataset_is_an_error():
    with pytest.raises(SettingsError, match=r"set prompts\.dataset or prompts\.file"):
        load_prompts(PromptSettings(dataset=None), None)
