"""Retention as a model: whatever refers to whatever, what is kept stays whole."""

from datetime import UTC, datetime, timedelta

from hypothesis import given, settings
from hypothesis import strategies as st

from selfcascade.config import CurationSettings
from selfcascade.storage.entry import entry_of
from selfcascade.storage.manifest import KINDS, Manifest, artifact_version, plain_settings
from selfcascade.storage.retention import Published, Rules, retire

NOW = datetime(2026, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)
NONE = timedelta(0)


@st.composite
def stores(draw):
    """Artifacts in the order of their making: each may name the version of earlier ones and share objects of them, and an equal version may have two names."""
    found: list[Published] = []
    for number in range(draw(st.integers(1, 14))):
        base = draw(st.sampled_from(["datasets/a", "datasets/b", "upsamplers/a", "samples/a", "samples/b", "reports/a"]))
        version = f"{number // 2 if draw(st.booleans()) else 100 + number:064x}"
        if any(artifact.prefix == f"{base}/{version}" for artifact in found):
            continue
        earlier = [artifact for artifact in found if artifact.prefix.rpartition("/")[2] != version]
        versions = [artifact.prefix.rpartition("/")[2] for artifact in earlier]
        named = draw(st.sets(st.sampled_from([*versions, "f" * 64]), max_size=3))  # the last: of no artifact of this store
        holders = draw(st.sets(st.sampled_from([artifact.prefix for artifact in earlier]), max_size=2)) if earlier else set()
        age = draw(st.integers(0, 9)) * DAY
        found.append(Published(f"{base}/{version}", NOW - age, frozenset(named), frozenset(holders), draw(st.integers(0, 5)) == 0))
    return found


rules_ = st.builds(
    Rules,
    keep_last=st.none() | st.integers(1, 4),
    keep=st.none() | st.integers(0, 10).map(lambda days: days * DAY),
    kinds=st.frozensets(st.sampled_from(["datasets", "upsamplers", "samples", "reports"]), min_size=1),
)


def refers(one: Published, other: Published) -> bool:
    return one is not other and (other.prefix.rpartition("/")[2] in one.named or other.prefix in one.holders)


def whole(left, before) -> bool:
    """Nothing that is left refers to what was there before and is not."""
    gone = [artifact for artifact in before if artifact not in left]
    return not any(refers(artifact, other) for artifact in left for other in gone)


@settings(max_examples=1500, deadline=None)
@given(stores(), rules_, st.integers(0, 3).map(lambda days: days * DAY), st.data())
def test_nothing_that_is_kept_refers_to_what_goes(artifacts, rules, grace, data):
    """Wherever the deletion is stopped. What a rule keeps, what is young, what ``latest`` points to and the newest of each name stay; all else goes that
    nothing kept leads to; the same rules once more find nothing; and with ``only``, nothing that came meanwhile is made incomplete."""
    found = retire(artifacts, rules, now=NOW, grace=grace)
    by_prefix = {artifact.prefix: artifact for artifact in artifacts}
    going = [by_prefix[prefix] for prefix in found.retired]
    for stop in range(len(going) + 1):
        assert whole([artifact for artifact in artifacts if artifact not in going[:stop]], artifacts)

    left = [artifact for artifact in artifacts if artifact not in going]
    by_rule = set()
    for artifact in artifacts:
        newer = [other for other in artifacts if other.base == artifact.base and (other.published, other.prefix) > (artifact.published, artifact.prefix)]
        age = NOW - artifact.published
        if (
            artifact.pointed
            or len(newer) < (rules.keep_last or 1)
            or age < grace
            or (rules.keep is not None and age < rules.keep)
            or artifact.prefix.split("/")[0] not in rules.kinds
        ):
            by_rule.add(artifact.prefix)
    assert by_rule <= {artifact.prefix for artifact in left}
    assert set(found.needed) == {artifact.prefix for artifact in left} - by_rule
    assert all(any(refers(other, by_prefix[prefix]) for other in left) for prefix in found.needed)

    assert retire(left, rules, now=NOW, grace=grace).retired == ()

    only = frozenset(data.draw(st.sets(st.sampled_from(sorted(by_prefix)))))
    fewer = retire(artifacts, rules, now=NOW, grace=grace, only=only).retired
    assert set(fewer) <= only & set(found.retired)
    assert whole([artifact for artifact in artifacts if artifact.prefix not in fewer], artifacts)


def test_what_a_manifest_refers_to_is_read_off_it():
    """Versions in inputs however they are written, and the holders of shared objects."""
    plain = plain_settings(CurationSettings())
    one, two, three = ("1" * 64, "2" * 64, "3" * 64)
    inputs = {"dataset": one, "upsampler": f"phi@{two}", "samples/tuned": f"samples/tuned@{three}", "features.weights": "imagenet"}
    version = artifact_version(CurationSettings(), inputs)
    objects = (entry_of("a.tar", b"a"), entry_of("b.tar", b"b").renamed("b.tar", source=f"datasets/pics/{one}"))
    manifest = Manifest(kind="reports", name="demo", version=version, settings=plain, inputs=inputs, objects=objects, counts={})
    found = Published.of(manifest, f"reports/demo/{version}", NOW, pointed=True)
    assert found.named == {one, two, three}
    assert found.holders == {f"datasets/pics/{one}"}
    assert (found.base, found.pointed) == ("reports/demo", True)


def test_without_kinds_rules_are_about_all():
    old = [Published(f"{kind}/a/{number:064x}", NOW - (9 - number) * DAY) for kind in KINDS for number in range(3)]
    found = retire(old, Rules(keep_last=2), now=NOW, grace=NONE)
    assert sorted(found.retired) == sorted(f"{kind}/a/{0:064x}" for kind in KINDS)
