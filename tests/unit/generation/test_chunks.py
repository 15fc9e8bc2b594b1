"""Prompts and samples laid out on disk: what a list in memory would be, chunk by chunk, whatever the ids."""

import json
import random
import tracemalloc

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from selfcascade.config import GenerationSettings, PromptSettings
from selfcascade.curation import listing
from selfcascade.generation import chunks as module
from selfcascade.generation.chunks import Chunks, chunks_of, lay_out
from selfcascade.generation.prompt_list import Prompt, PromptList, TakenId
from selfcascade.generation.seeds import sample_specs
from selfcascade.settings import SettingsError, digest_of

ids = st.from_regex(r"[Aa0][a0_-]{0,5}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
prompts = st.builds(Prompt, ids, texts, st.none() | texts, st.none() | st.integers(0, 2**63 - 1))
lists = st.lists(prompts, min_size=1, max_size=20, unique_by=lambda prompt: prompt.id)
relaxed = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


@relaxed
@example([Prompt("a", "x"), Prompt("a-0", "x"), Prompt("a-0000", "x")], 2, 2, 0, random.Random(0))
@given(lists, st.integers(1, 3), st.integers(1, 7), st.integers(0, 2**31), st.randoms(use_true_random=False))
def test_chunks_are_the_slices_of_the_sorted_samples(found, per_prompt, size, seed, rng):
    """Of any ids: `a` before `a-0`, though `a-0-0000` comes before `a-0000`. The version is the digest of the sorted list, whatever the order of the rows."""
    expected = sample_specs(found, run_seed=seed, per_prompt=per_prompt, negative_prompt="blurry")
    rng.shuffle(found)
    listed = PromptList(enumerate(found))
    assert listed.version == digest_of(sorted([prompt.id, prompt.text, prompt.negative_prompt, prompt.seed] for prompt in found))
    chunks = Chunks(listed, size=size, run_seed=seed, per_prompt=per_prompt, negative_prompt="blurry")
    assert [*chunks.values()] == [expected[start : start + size] for start in range(0, len(expected), size)]
    assert [chunks.size_of(index) for index in chunks] == [len(chunk) for chunk in chunks.values()]
    with pytest.raises(KeyError):
        chunks[len(chunks)]


def test_more_than_memory_takes_at_a_time_is_sorted_all_the_same(monkeypatch):
    monkeypatch.setattr(listing, "RUN", 8)
    found = [Prompt(f"p{number}", f"text {number}") for number in range(1000)]
    random.Random(0).shuffle(found)
    listed = PromptList(enumerate(found))
    assert [*listed] == sorted(found, key=lambda prompt: prompt.id)
    assert [spec for chunk in Chunks(listed, size=32, run_seed=1).values() for spec in chunk] == [*sample_specs(found, run_seed=1, per_prompt=1)]


def test_memory_does_not_grow_with_the_prompts():
    """Ten times as many prompts take the same memory but for eight bytes a chunk."""

    def peak(count):
        tracemalloc.start()
        chunks = Chunks(PromptList((number, Prompt(f"{number * 7919 % count}", "x" * 200)) for number in range(count)), size=8, run_seed=0)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most, len(chunks)

    (few, _), (many, chunks) = peak(10_000), peak(100_000)
    assert many < few + 2 * 8 * chunks + 2**20


def test_the_first_prompts_by_id_are_kept_and_shape_the_version():
    found = [Prompt(identity, "x") for identity in ("c", "a", "b")]
    listed = PromptList(enumerate(found), count=2)
    assert ([prompt.id for prompt in listed], len(listed), listed.found) == (["a", "b"], 2, 3)
    assert listed.version == PromptList(enumerate(found[1:])).version


def test_of_taken_ids_the_earliest_row_is_named_and_given_ones_before_made_ones():
    rows = [(1, Prompt("b", "x")), (-2, Prompt("a", "x")), (3, Prompt("b", "y")), (4, Prompt("a", "z")), (5, Prompt("b", "z"))]
    with pytest.raises(TakenId, match="id 'b' of row 3 is taken by row 1"):
        PromptList(rows)
    with pytest.raises(TakenId, match="id 'a' of row -2 is taken by row 4"):
        PromptList([rows[1], rows[3]])


def test_a_process_lays_out_once_and_refuses_prompts_that_changed(tmp_path, monkeypatch):
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"prompt {number}"}) for number in range(10)))
    run = GenerationSettings(prompts=PromptSettings(file=path), chunk=4)
    planned = lay_out(run, None)
    assert chunks_of(run, None, planned.prompts.version) is planned
    assert chunks_of(run.model_copy(update={"seed": 1}), None, planned.prompts.version)[0] != planned[0]
    module._held.clear()
    assert [*chunks_of(run, None, planned.prompts.version).values()] == [*planned.values()]
    module._held.clear()
    path.write_text('{"prompt": "another"}\n')
    with pytest.raises(SettingsError, match=r"^generation\.prompts are now at version \w{12} but were planned as \w{12}; run again$"):
        chunks_of(run, None, planned.prompts.version)
