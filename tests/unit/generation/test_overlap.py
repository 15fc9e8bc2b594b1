"""Sampling, encoding and storing side by side: the same bytes, in bounded memory, and no error lost."""

import threading

import numpy as np
import pytest

from selfcascade.generation import generate, samples
from selfcascade.generation.generate import generate_unit, generate_units, part_of, plan_generation
from selfcascade.generation.samples import Sample, write_shard
from selfcascade.generation.seeds import SampleSpec
from selfcascade.storage import Artifact, Store, StoreUnreachable

PATIENCE = 60.0


def objects(store, plan):
    return {info.key: store.entry(info.key).sha256 for info in store.list(plan.ref.prefix)}


def test_units_of_one_call_leave_the_bytes_of_one_call_each(store, store_settings, generation):
    plan = plan_generation(generation, store)
    reports = generate_units(generation, store, part_of(generation, store, plan, (0, 1)), (0, 1), "cpu")
    assert [report.count for report in reports] == [4, 2]
    assert [report.count for report in generate_units(generation, store, plan, (0, 1), "cpu")] == [0, 0]
    with Store.open(store_settings.model_copy(update={"prefix": store_settings.prefix + "-2"})) as other:
        for index in (1, 0):
            generate_unit(generation, other, plan.model_copy(update={"artifact_ref": plan_generation(generation, other).ref}), index, "cpu")
        assert objects(other, plan) == objects(store, plan)
    assert len(objects(store, plan)) == 6


def test_a_shard_is_stored_while_the_next_is_sampled(store, generation, monkeypatch):
    """The first shard does not go up before the second chunk is being sampled, and that one does not end before the first shard is up."""
    sampling, stored = threading.Event(), threading.Event()
    sample, put = generate._sample, Artifact.put

    def watched(settings, store, plan, index, device, path):
        if index == 1:
            sampling.set()
            assert stored.wait(PATIENCE)
        return sample(settings, store, plan, index, device, path)

    def late(self, key, data):
        if key == "00000.tar":
            assert sampling.wait(PATIENCE)
        entry = put(self, key, data)
        if key == "00000.parquet":
            stored.set()
        return entry

    monkeypatch.setattr(generate, "_sample", watched)
    monkeypatch.setattr(Artifact, "put", late)
    plan = plan_generation(generation, store)
    assert [report.count for report in generate_units(generation, store, plan, plan.todo, "cpu")] == [4, 2]


@pytest.mark.parametrize("shard", [0, 1])
def test_an_error_while_storing_ends_the_call_and_what_is_stored_stays(store, generation, monkeypatch, shard):
    """The first shard's error arrives before the second is stored; the last shard's arrives too, and then the first is there."""
    put = Artifact.put

    def broken(self, key, data):
        if key == f"{shard:05d}.tar":
            raise StoreUnreachable("gone")
        return put(self, key, data)

    plan = plan_generation(generation, store)
    with monkeypatch.context() as patch:
        patch.setattr(Artifact, "put", broken)
        with pytest.raises(StoreUnreachable, match="gone"):
            generate_units(generation, store, plan, (0, 1), "cpu")
    assert sorted(key.rpartition("/")[2] for key in objects(store, plan)) == ([] if shard == 0 else ["00000.html", "00000.parquet", "00000.tar"])


def test_an_error_while_sampling_leaves_the_shard_before_it_whole(store, generation, monkeypatch):
    sample = generate._sample

    def broken(settings, store, plan, index, device, path):
        if index == 1:
            raise MemoryError
        return sample(settings, store, plan, index, device, path)

    monkeypatch.setattr(generate, "_sample", broken)
    plan = plan_generation(generation, store)
    with pytest.raises(MemoryError):
        generate_units(generation, store, plan, (0, 1), "cpu")
    assert plan_generation(generation, store).done == (0,)


def made(count):
    for number in range(count):
        yield Sample(SampleSpec(f"k{number:02d}", "k", "text", "", number, number), np.full((8, 8, 3), number, np.uint8))


def test_a_batch_is_encoded_while_the_next_is_sampled(tmp_path, monkeypatch):
    """Two batches of four: the first is encoded before the last picture of the second is drawn."""
    encoded = threading.Semaphore(0)
    encode = samples.encode

    def counted(image, kind):
        found = encode(image, kind)
        encoded.release()
        return found

    def drawn():
        for number, sample in enumerate(made(8)):
            if number == 4:
                assert all(encoded.acquire(timeout=PATIENCE) for _ in range(4))
            yield sample

    monkeypatch.setattr(samples, "encode", counted)
    assert write_shard(tmp_path / "a.tar", drawn(), method="base", settings="x", ahead=5) == 8
    write_shard(tmp_path / "b.tar", made(8), method="base", settings="x")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


@pytest.mark.parametrize("ahead", [1, 5])
def test_so_many_pictures_are_held_and_no_more(tmp_path, monkeypatch, ahead):
    """Drawn and not yet written."""
    written, most, add = [], [], samples.add_member
    monkeypatch.setattr(samples, "add_member", lambda tar, name, data: (written.append(name), add(tar, name, data)))

    def drawn():
        for number, sample in enumerate(made(20)):
            most.append(number + 1 - len(written) // 2)
            yield sample

    write_shard(tmp_path / "a.tar", drawn(), method="base", settings="x", ahead=ahead)
    assert max(most) == ahead + 1  # one is being written
