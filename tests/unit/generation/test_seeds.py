"""Seeds in closed form, keys that cannot collide, specs that no order changes."""

import hashlib
import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from selfcascade.generation.prompts import Prompt
from selfcascade.generation.seeds import sample_generator, sample_seed, sample_specs

identities = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,12}", fullmatch=True)


def test_a_seed_is_the_first_63_bits_of_the_sha256_of_its_three_parts():
    digest = hashlib.sha256(b'[7,"fox",3]').digest()
    assert sample_seed(7, "fox", 3) == int.from_bytes(digest[:8], "big") >> 1
    assert sample_seed(0, "café", 0) == int.from_bytes(hashlib.sha256('[0,"café",0]'.encode()).digest()[:8], "big") >> 1


@given(st.integers(0, 2**63), identities, st.integers(0, 10_000))
def test_a_seed_fits_torch_and_every_part_matters(run, identity, index):
    seed = sample_seed(run, identity, index)
    assert 0 <= seed < 2**63
    assert len({seed, sample_seed(run + 1, identity, index), sample_seed(run, identity + "x", index), sample_seed(run, identity, index + 1)}) == 4


def test_ten_thousand_samples_have_noise_of_their_own():
    """Torch reads the low 32 bits of a seed: among 10,000 they must differ for all but the odd birthday pair."""
    low = {sample_seed(0, f"p{number}", 0) & 0xFFFFFFFF for number in range(10_000)}
    assert len(low) >= 9_998


def test_a_generator_is_what_torch_gives_for_the_seed_by_hand():
    assert torch.equal(torch.randn(5, generator=sample_generator(123)), torch.randn(5, generator=torch.Generator().manual_seed(123)))


@given(st.lists(identities, min_size=1, max_size=8, unique=True), st.integers(1, 3), st.randoms(use_true_random=False))
def test_specs_do_not_depend_on_the_order_of_the_prompts(names, per_prompt, rng: random.Random):
    prompts = [Prompt(id=name, text=f"text of {name}") for name in names]
    specs = sample_specs(prompts, run_seed=1, per_prompt=per_prompt)
    rng.shuffle(prompts)
    assert sample_specs(prompts, run_seed=1, per_prompt=per_prompt) == specs
    keys = [spec.key for spec in specs]
    assert keys == sorted(set(keys))
    assert len(keys) == len(names) * per_prompt
    assert all("." not in key and "/" not in key for key in keys)
    assert all(spec.seed == sample_seed(1, spec.prompt_id, spec.index) for spec in specs)


def test_more_samples_of_a_prompt_leave_the_first_ones_as_they_were():
    prompts = [Prompt(id="a", text="a"), Prompt(id="b", text="b")]
    few, many = sample_specs(prompts, run_seed=5, per_prompt=1), sample_specs(prompts, run_seed=5, per_prompt=3)
    assert set(few) < set(many)


def test_a_prompts_own_seed_and_negative_prompt_win():
    specs = sample_specs([Prompt("a", "fox", negative_prompt="", seed=2**63 - 1), Prompt("b", "cat")], run_seed=0, per_prompt=2, negative_prompt="blurry")
    assert [(spec.prompt_id, spec.negative_prompt) for spec in specs] == [("a", ""), ("a", ""), ("b", "blurry"), ("b", "blurry")]
    assert [spec.seed for spec in specs[:2]] == [2**63 - 1, 0]
