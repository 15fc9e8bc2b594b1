"""Retention on a real store: published artifacts go by rules, and whatever stays can be read to the last byte, wherever the deletion is stopped."""

import random
import time
from datetime import timedelta

import pytest
from small_artifacts import NOW

from selfcascade.config import CurationSettings
from selfcascade.storage import Artifact, Store, lease, pointer, resolve, rollback
from selfcascade.storage.collect import collect, plan_collection
from selfcascade.storage.lineage import walk
from selfcascade.storage.listing import listing
from selfcascade.storage.retention import Rules
from selfcascade.storage.verification import verify
from selfcascade_flows.cli import main
from selfcascade_flows.store_commands import readable

LAST = Rules(keep_last=1)


@pytest.fixture(autouse=True)
def _no_wait_for_the_disk(monkeypatch):
    monkeypatch.setattr("selfcascade.storage.embedded.VACUUM_PAUSE", 0)


def publish(store, kind, name, number, inputs=None, shared=(), *, later=True) -> Artifact:
    """An artifact that is ``later`` than those of its name, by a clock of seconds."""
    if later and listing(store, f"{kind}/{name}"):
        time.sleep(1.05)
    artifact = Artifact.plan(store, kind, name, CurationSettings(name=name, size=8 * (number + 1)), inputs or {})
    artifact.put(f"{number:05d}.tar", f"data of {artifact}".encode())
    artifact.publish(counts={}, shared=shared)
    return artifact


def published(store) -> set[str]:
    return {row.ref.prefix for row in listing(store)}


def whole(store) -> bool:
    """Every published artifact has its objects, shared ones too, and nothing that it was made from is missing."""
    for row in listing(store):
        found = Artifact(store, row.ref)
        if not all(finding.state == "sound" for finding in verify(found)):
            return False
        if any(source.state == "missing" for step in walk(store, {"it": row.ref}) for source in step.sources):
            return False
    return True


def test_an_increment_keeps_what_it_shares_and_what_it_came_from(store):
    """Three increments of a dataset and a report on the second: the newest keeps both it shares with; of another line, only the newest stays."""
    first = publish(store, "datasets", "pics", 1)
    second = publish(store, "datasets", "pics", 2, {"before": first.ref.version}, [first.share("00001.tar")])
    third = publish(store, "datasets", "pics", 3, {"source": "0" * 64}, [second.share("00001.tar")])  # shares the first one's, and names neither
    lone = publish(store, "datasets", "other", 1)
    newer = publish(store, "datasets", "other", 2)
    report = publish(store, "reports", "demo", 1, {"dataset": f"datasets/other@{lone.ref.version}"})
    planned = plan_collection(store, grace=NOW, rules=LAST)
    assert planned.retired == (second.prefix,)
    assert planned.needed == tuple(sorted([first.prefix, lone.prefix]))
    gone = collect(store, planned, grace=NOW, rules=LAST)
    assert gone.retired == (second.prefix,)
    assert {item.key for item in gone.garbage} == {f"{second.prefix}/{key}" for key in ("00002.tar", "manifest.json")}
    assert second.existing() == set()
    assert published(store) == {artifact.prefix for artifact in (first, third, lone, newer, report)}
    assert whole(store)


@pytest.mark.parametrize("seed", range(6))
def test_a_collection_that_is_stopped_anywhere_leaves_only_whole_artifacts(store, seed, monkeypatch):
    """A random graph of sixteen artifacts; the deletion dies at the n-th request, and the next one goes on: after each, all that is published is whole."""
    draw = random.Random(seed)
    made: list[Artifact] = []
    for number in range(16):
        kind = draw.choice(["datasets", "upsamplers", "samples", "reports"])
        inputs = {}
        for place, parent in enumerate(draw.sample(made, min(len(made), draw.randint(0, 2)))):
            ref, role = parent.ref, {"datasets": "dataset", "upsamplers": "upsampler", "samples": f"samples/{place}", "reports": f"report {place}"}
            inputs[role[ref.kind]] = f"{ref.kind}/{ref.name}@{ref.version}"
        shared = {}
        for parent in draw.sample(made, min(len(made), draw.randint(0, 2))):
            entry = parent.share(draw.choice(parent.manifest().objects).key)
            shared[entry.key] = entry
        made.append(publish(store, kind, draw.choice("ab"), number, inputs, list(shared.values()), later=False))
    rules = Rules(keep_last=1, kinds=frozenset(draw.sample(["datasets", "upsamplers", "samples", "reports"], 3)))
    planned = plan_collection(store, grace=NOW, rules=rules)
    assert whole(store)
    delete, left = Store.delete, [0]

    def dying(self, keys):
        keys = list(keys)
        if not all(key.startswith("leases/") for key in keys):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        return delete(self, keys)

    monkeypatch.setattr(Store, "delete", dying)
    for _ in range(40):
        left[0] = 1
        try:
            collect(store, plan_collection(store, grace=NOW, rules=rules), grace=NOW, rules=rules)
            break
        except KeyboardInterrupt:
            assert whole(store)
    left[0] = 1000
    again = plan_collection(store, grace=NOW, rules=rules)
    collect(store, again, grace=NOW, rules=rules)
    assert whole(store)
    assert published(store) == {artifact.prefix for artifact in made} - set(planned.retired)
    listed = {f"{entry.source or row.ref.prefix}/{entry.key}" for row in listing(store) for entry in Artifact(store, row.ref).manifest().objects}
    there = {info.key for kind in ("datasets/", "upsamplers/", "samples/", "reports/") for info in store.list(kind)}
    assert {key for key in there if key.endswith(".tar")} == listed  # and nothing is left behind


def test_latest_an_unfinished_pointer_the_young_and_other_kinds_stay(store):
    """``latest`` of an older version after a roll-back, and a version whose pointer has still to move, are kept by name."""
    old, middle, new = (publish(store, "datasets", "pics", number) for number in (1, 2, 3))
    rollback(store, old.ref)
    assert plan_collection(store, rules=LAST).retired == ()  # within the grace period
    assert plan_collection(store, grace=NOW, rules=Rules(keep_last=1, kinds=frozenset({"samples"}))).retired == ()
    assert plan_collection(store, grace=NOW, rules=Rules(keep=timedelta(days=1))).retired == ()
    assert plan_collection(store, grace=NOW).retired == ()  # no rules, and nothing published goes
    assert plan_collection(store, grace=NOW, rules=Rules(keep=NOW)).retired == (middle.prefix,)
    sequence = pointer.take(store, "datasets/pics", middle.ref.version)
    assert plan_collection(store, grace=NOW, rules=LAST).retired == ()
    pointer.move(store, "datasets/pics", middle.ref.version, sequence)
    assert set(plan_collection(store, grace=NOW, rules=LAST).retired) == {old.prefix}
    assert published(store) == {old.prefix, middle.prefix, new.prefix}


def test_nothing_published_goes_while_somebody_works(store):
    """A lease does not say what its run reads. It is looked at again when the deletion begins."""
    old, new = publish(store, "datasets", "pics", 1), publish(store, "datasets", "pics", 2)
    planned = plan_collection(store, grace=NOW, rules=LAST)
    assert planned.retired == (old.prefix,)
    with lease(store, "samples/x/0"):
        held = plan_collection(store, grace=NOW, rules=LAST)
        assert (held.retired, held.at_work) == ((), ("samples/x/0",))
        assert collect(store, planned, grace=NOW, rules=LAST).garbage == ()
    assert published(store) == {old.prefix, new.prefix}


def test_what_was_published_after_the_plan_keeps_its_inputs(store):
    """Old versions were planned to go; then a report is made of one of them. By the same rules the report itself might go: it was not shown, so both stay."""
    old, new = publish(store, "datasets", "pics", 1), publish(store, "datasets", "pics", 2)
    planned = plan_collection(store, grace=NOW, rules=LAST)
    assert planned.retired == (old.prefix,)
    first = publish(store, "reports", "demo", 1, {"dataset": f"datasets/pics@{old.ref.version}"})
    second = publish(store, "reports", "demo", 2, {"dataset": f"datasets/pics@{new.ref.version}"})
    assert set(plan_collection(store, grace=NOW, rules=LAST).retired) == {first.prefix, old.prefix}
    assert collect(store, planned, grace=NOW, rules=LAST).retired == ()
    assert published(store) == {artifact.prefix for artifact in (old, new, first, second)}


def test_the_command_shows_what_goes_and_what_does_not(store, capsys):
    settings = store.settings
    where = [word for name in ("folder", "bucket", "prefix") for word in ("--set", f"store.{name}={getattr(settings, name)}")]
    kept = publish(store, "datasets", "pics", 1)
    old = publish(store, "reports", "demo", 3)
    publish(store, "reports", "demo", 2, {"dataset": kept.ref.version})
    publish(store, "datasets", "pics", 2)
    size = sum(info.size for info in store.list(f"{old.prefix}/"))

    def gc(*words: str) -> tuple[int, list[str], str]:
        code = main(["store", "gc", "--grace-hours", "0", *words, *where])
        shown = capsys.readouterr()
        return code, shown.out.splitlines(), shown.err

    code, lines, _ = gc("--keep-last", "1", "--dry-run")
    assert code == 0
    assert lines[0] == f"{old.prefix}  2 objects, {readable(size)}, retired by the rules"
    assert lines[1] == f"{kept.prefix}  kept: an artifact that stays refers to it"
    assert old.prefix in published(store)
    assert gc("--keep-days", "1", "--yes")[1][-1].startswith("to delete: 0 objects")
    assert gc("--keep-last", "1", "--kinds", "datasets, samples", "--yes")[1][-1].startswith("to delete: 0 objects")
    assert gc("--yes")[1][-1].startswith("to delete: 0 objects")
    code, lines, _ = gc("--keep-last", "1", "--kinds", "reports", "--yes")
    assert lines[-1].startswith(f"deleted 2 objects, {readable(size)}, 1 published artifacts among them")
    assert old.prefix not in published(store)
    assert resolve(store, "reports/demo").manifest()
    for words, said in (
        (("--kinds", "samples"), "add --keep-last or --keep-days"),
        (("--keep-last", "1", "--kinds", "cache"), "'cache' is no kind of artifact"),
    ):
        code, _, error = gc(*words)
        assert code == 2
        assert said in error
    assert gc("--keep-last", "0")[0] == 2
