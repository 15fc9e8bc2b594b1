"""Manifests: equal runs write equal bytes, what is stored comes back, what contradicts itself is refused."""

import json
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfcascade.config import NAME, CurationSettings, StoreSettings
from selfcascade.settings import Settings, where
from selfcascade.storage import IntegrityError, Manifest, ObjectEntry, artifact_version
from selfcascade.storage.manifest import KINDS, plain_settings, version_of

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
entries = st.builds(
    ObjectEntry,
    key=st.text(min_size=1, max_size=12),
    size=st.integers(0, 2**50),
    sha256=digests,
    blocks=st.lists(digests, max_size=3).map(tuple),
    source=st.none() | st.text(min_size=1, max_size=12),
)


@st.composite
def manifests(draw) -> Manifest:
    settings = draw(st.dictionaries(st.text(max_size=5), values, max_size=4))
    inputs = draw(st.dictionaries(st.text(max_size=5), digests, max_size=3))
    objects = draw(st.lists(entries, max_size=4, unique_by=lambda entry: entry.key))
    return Manifest(
        kind=draw(st.sampled_from(KINDS)),
        name=draw(st.from_regex(NAME, fullmatch=True)),
        version=version_of(settings, inputs),
        settings=settings,
        inputs=inputs,
        objects=tuple(sorted(objects, key=lambda entry: entry.key)),
        counts=draw(st.dictionaries(st.text(max_size=5), st.integers(0, 2**53) | st.floats(0, 1e9) | st.text(max_size=5), max_size=3)),
    )


@given(manifests())
def test_a_manifest_comes_back_as_it_was_stored(manifest):
    """Parse and print are inverse, to the byte."""
    data = manifest.to_bytes()
    again = Manifest.from_bytes(data, where="m")
    assert again == manifest
    assert again.to_bytes() == data


@given(manifests(), st.randoms())
def test_a_manifest_does_not_depend_on_the_order_of_its_mappings(manifest, random):
    def shuffled(tree):
        if isinstance(tree, dict):
            names = list(tree)
            random.shuffle(names)
            return {name: shuffled(tree[name]) for name in names}
        return tree

    other = Manifest.model_validate({**json.loads(manifest.to_bytes()), "settings": shuffled(manifest.settings), "inputs": shuffled(manifest.inputs)})
    assert other.to_bytes() == manifest.to_bytes()


@given(manifests(), st.data())
def test_changed_settings_or_inputs_are_noticed(manifest, data):
    """The version is the digest of both, so a manifest cannot be turned into another run's."""
    tree = json.loads(manifest.to_bytes())
    place = data.draw(st.sampled_from(["settings", "inputs"]))
    tree[place] = {**tree[place], "added": "f" * 64}
    with pytest.raises(IntegrityError, match=r"object x is not a valid manifest .*digest of settings and inputs"):
        Manifest.from_bytes(json.dumps(tree).encode(), where="object x")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b'{"kind": "datasets"}'])
def test_what_is_no_manifest_is_refused_in_one_line(data):
    with pytest.raises(IntegrityError, match="object x is not a valid manifest") as caught:
        Manifest.from_bytes(data, where="object x")
    assert "\n" not in str(caught.value)


class Two(Settings):
    FORMAT: ClassVar[int] = 3
    b: tuple[int, ...] = (1, 2)
    a: float = 0.1
    folder: str = where("x", description="where")


@given(st.text(max_size=10))
def test_version_is_that_of_what_is_computed_never_of_where(folder):
    """Equal what-settings and inputs: one address. Known value, so that a change of the rule is noticed: published artifacts live under it."""
    version = artifact_version(Two(folder=folder), {"data": "0" * 64})
    assert version == "c9095851d03ae7afc4228827981b08081327ddf0b34873fc2d2964d9ef8fb98c"
    assert version != artifact_version(Two(folder=folder, a=0.2), {"data": "0" * 64})
    assert version != artifact_version(Two(folder=folder), {"data": "1" * 64})
    assert version != artifact_version(Two(folder=folder), {"other": "0" * 64})


def test_plain_settings_are_their_own_json():
    plain = plain_settings(CurationSettings())
    assert json.loads(json.dumps(plain)) == plain
    assert "path" not in json.dumps(plain)


def test_secrets_are_not_written_anywhere():
    settings = StoreSettings(access_key="A", secret_key="TOPSECRET")
    assert "TOPSECRET" not in repr(settings) + settings.model_dump_json() + json.dumps(settings.what())
