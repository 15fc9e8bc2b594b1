"""A dataset read back from a real server: every sample once, in one order, from any position, and none of a damaged block."""

from __future__ import annotations

import io
import json
import pickle
import urllib.request
from collections import Counter
from itertools import islice

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from webdataset.gopen import gopen_schemes

from selfcascade import StreamedDataset
from selfcascade.config import CurationSettings
from selfcascade.curation import readahead, shards
from selfcascade.curation.encoding import encode
from selfcascade.curation.record import Entry, Picture
from selfcascade.settings import SettingsError
from selfcascade.storage import Artifact, IntegrityError, entry_of
from selfcascade.storage.purge import plan_purge, purge

SIZES = (7, 1, 12, 5, 9)
"""Samples of each shard; every third is of another split."""


def image(number: int, side: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8))


def published(store, folder, *, sizes=SIZES, side=8, offsets=True) -> Artifact:
    """A dataset as curation writes it, with a rejected input in each shard; every third sample is of the test split."""
    artifact = Artifact.plan(store, "datasets", "things", CurationSettings(name="things", size=256), {"source": f"{side:064x}"})
    number = 0
    with artifact.writing():
        for index, size in enumerate(sizes):
            samples = []
            for _ in range(size):
                entry = Entry(f"k{number:04d}", f"k{number}.png", 9, "sha256:0", f"thing {number}, 猫")
                picture = Picture(*encode(np.asarray(image(number, side)), "png"), 80, 60, f"{number:064d}", {})
                samples.append((entry, picture, "test" if number % 3 == 2 else "train"))
                number += 1
            path = folder / shards.tar_name(index)
            shards.write_tar(path, samples)
            keys = [entry.key for entry, _, _ in samples]
            rejected = {f"{keys[0]}x": {"key": f"{keys[0]}x", "source": "x", "split": "train", "kept": False, "reason": "blank"}}
            table = shards.table_bytes(path, rejected, dict.fromkeys([keys[0], f"{keys[0]}x", *keys[1:]], "0"))
            artifact.put(shards.tar_name(index), path)
            artifact.put(shards.table_name(index), table if offsets else without_offsets(table))
            artifact.put(shards.stats_name(index), b"{}")
        artifact.publish(counts={})
    return Artifact(store, artifact.ref)


def without_offsets(table: bytes) -> bytes:
    """The table as datasets of before had it."""
    sink = io.BytesIO()
    pq.write_table(pq.read_table(io.BytesIO(table)).drop_columns(["offset"]), sink)
    return sink.getvalue()


@pytest.fixture
def dataset(store, tmp_path) -> Artifact:
    return published(store, tmp_path)


TRAIN = [f"k{number:04d}" for number in range(sum(SIZES)) if number % 3 != 2]


def keys(samples) -> list[str]:
    return [sample["__key__"] for sample in samples]


def batched(loader) -> list[str]:
    return [key for batch in loader for key in batch["__key__"]]


def test_samples_are_those_of_webdatasets_own_loader(dataset, tmp_path, monkeypatch):
    """Member for member, byte for byte, from files, and over HTTP by an opener in place of its pipe to curl."""
    ours = list(StreamedDataset(dataset, split=None, shuffle=False, decode="bytes"))
    urls = [f"file:{tmp_path / shards.tar_name(index)}" for index in range(len(SIZES))]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(ours) == sum(SIZES)

    def members(samples):
        return [{name: value for name, value in sample.items() if name == "__key__" or not name.startswith("__")} for sample in samples]

    assert members(ours) == members(theirs)
    links = [dataset.store.presign(dataset.entry(shards.tar_name(index)).key) for index in range(len(SIZES))]
    monkeypatch.setitem(gopen_schemes, "http", lambda url, mode, bufsize: urllib.request.urlopen(url))
    assert members(webdataset.WebDataset(links, shardshuffle=False)) == members(theirs)


def test_only_the_chosen_split_is_read(dataset):
    assert keys(StreamedDataset(dataset, shuffle=False)) == TRAIN
    assert len(StreamedDataset(dataset, split="test")) == sum(SIZES) - len(TRAIN)
    with pytest.raises(SettingsError, match="no sample of split 'tune'"):
        StreamedDataset(dataset, split="tune")


@pytest.mark.parametrize("decode", ["pil", "tensor"])
def test_decoded_samples(dataset, decode):
    sample = next(iter(StreamedDataset(dataset, shuffle=False, decode=decode)))
    expected = np.asarray(image(0))
    if decode == "tensor":
        assert sample["png"].shape == (3, 8, 8)
        assert np.array_equal(sample["png"].permute(1, 2, 0).numpy(), expected)
    else:
        assert np.array_equal(np.asarray(sample["png"]), expected)
    assert (sample["txt"], sample["json"]["split"]) == ("thing 0, 猫", "train")


def test_a_loader_collates_and_transforms(dataset):
    loader = DataLoader(StreamedDataset(dataset, transform=lambda sample: sample["png"].float() / 255), batch_size=4)
    batches = list(loader)
    assert [tuple(batch.shape) for batch in batches[:-1]] == [(4, 3, 8, 8)] * (len(batches) - 1)
    assert batches[0].dtype == torch.float32


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_epoch_is_every_sample_once_whatever_the_workers_and_ranks(dataset, workers):
    for ranks in (1, 3):
        found = [
            batched(DataLoader(StreamedDataset(dataset, window=5, rank=rank, world_size=ranks), batch_size=4, num_workers=workers)) for rank in range(ranks)
        ]
        assert sorted(key for part in found for key in part) == TRAIN
        assert max(map(len, found)) - min(map(len, found)) <= 1


def test_every_rank_has_as_many_batches(dataset):
    for uneven, each in (("pad", -(-len(TRAIN) // 5)), ("drop", len(TRAIN) // 5)):
        parts = [StreamedDataset(dataset, rank=rank, world_size=5, uneven=uneven, window=4) for rank in range(5)]
        found = [keys(part) for part in parts]
        assert {len(part) for part in found} == {each} == {len(part) for part in parts}
        counted = Counter(key for part in found for key in part)
        assert max(counted.values()) == (2 if uneven == "pad" else 1)
        assert len(counted) == (len(TRAIN) if uneven == "pad" else 5 * each)


def test_the_order_is_that_of_seed_and_epoch_and_not_of_the_threads(dataset):
    stream = StreamedDataset(dataset, window=6)
    first = keys(stream)
    assert first != TRAIN
    assert keys(stream) == first == keys(StreamedDataset(dataset, window=6, threads=1, ahead=1))
    stream.set_epoch(1)
    assert keys(stream) != first
    assert keys(StreamedDataset(dataset, window=6, seed=1)) != first


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_hear_of_a_new_epoch(dataset, persistent):
    stream = StreamedDataset(dataset, window=6)
    loader = DataLoader(stream, batch_size=4, num_workers=2, persistent_workers=persistent)
    orders = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        orders.append(batched(loader))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[1]) == TRAIN


@pytest.mark.parametrize("offsets", [False, True])
def test_resumed_is_uninterrupted_from_every_position(store, tmp_path, offsets):
    dataset = published(store, tmp_path, offsets=offsets)
    for options in ({"window": 5}, {"shuffle": False}, {"window": 5, "rank": 1, "world_size": 2}):
        stream = StreamedDataset(dataset, decode="bytes", **options)
        stream.set_epoch(3)
        whole = keys(stream)
        for seen in range(len(whole) + 1):
            stream = StreamedDataset(dataset, decode="bytes", **options)
            stream.set_epoch(3)
            assert keys(islice(stream, seen)) == whole[:seen]
            state = json.loads(json.dumps(stream.state_dict()))
            again = StreamedDataset(dataset, decode="bytes", **options)
            again.load_state_dict(state)
            assert again.state_dict() == state
            assert keys(again) == whole[seen:]
            assert keys(again) == whole  # once resumed, the epoch begins anew
            again.load_state_dict(state)
            again.set_epoch(4)
            assert sorted(keys(again)) == sorted(whole) or options.get("rank")


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_loader_with_workers_goes_on_after_any_batch(dataset, workers, drop_last):
    options = {"batch_size": 3, "num_workers": workers, "drop_last": drop_last}
    whole = [batch["__key__"] for batch in DataLoader(StreamedDataset(dataset, window=5), **options)]
    for seen in range(0, len(whole) + 1, 1 if workers == 0 else 4):
        stream = StreamedDataset(dataset, window=5)
        stream.load_state_dict(stream.state_after(seen, **options))
        assert [batch["__key__"] for batch in DataLoader(stream, **options)] == whole[seen:]
    middle = StreamedDataset(dataset, window=5)
    middle.load_state_dict(middle.state_after(2, **options))
    assert middle.state_after(3, **options) == StreamedDataset(dataset, window=5).state_after(5, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_torchdatas_loader_resumes_it(dataset, workers):
    options = {"batch_size": 3, "num_workers": workers}
    whole = [batch["__key__"] for batch in StatefulDataLoader(StreamedDataset(dataset, window=5), **options)]
    for seen in range(1, len(whole)):
        loader = StatefulDataLoader(StreamedDataset(dataset, window=5), **options)
        assert [batch["__key__"] for batch in islice(loader, seen)] == whole[:seen]
        again = StatefulDataLoader(StreamedDataset(dataset, window=5), **options)
        again.load_state_dict(loader.state_dict())
        assert [batch["__key__"] for batch in again] == whole[seen:]


def test_a_state_of_other_data_or_order_is_refused(dataset):
    state = StreamedDataset(dataset, seed=1).state_dict()
    for change in ({"seed": 2}, {"seed": 1, "window": 3}, {"seed": 1, "split": None}, {"seed": 1, "rank": 0, "world_size": 2}):
        with pytest.raises(SettingsError, match="the state was taken with"):
            StreamedDataset(dataset, **change).load_state_dict(state)
    stream = StreamedDataset(dataset)
    stream.load_state_dict(stream.state_after(1, batch_size=2, num_workers=2))
    with pytest.raises(SettingsError, match="same num_workers"):
        next(iter(stream))


def test_resuming_reads_nothing_that_is_behind(store, tmp_path, monkeypatch):
    """Without offsets whole shards are passed over, with them the beginning of a shard too: requests of tars are counted in blocks of 4 KiB."""
    requests = small_blocks(monkeypatch)
    for offsets in (False, True):
        dataset = published(store, tmp_path, sizes=(12, 12, 12), side=32 + offsets, offsets=offsets)
        stream = StreamedDataset(dataset, shuffle=False, decode="bytes", split=None)
        list(islice(stream, 21))
        state = stream.state_dict()
        requests.clear()
        again = StreamedDataset(dataset, shuffle=False, decode="bytes", split=None)
        again.load_state_dict(state)
        assert keys(again) == [f"k{number:04d}" for number in range(21, 36)]
        begun = {key.rpartition("/")[2]: start for key, start in reversed(requests)}
        assert sorted(begun) == ["00001.tar", "00002.tar"]
        assert (begun["00001.tar"] > 0) is offsets


def test_what_is_read_ahead_is_bounded(store, tmp_path, monkeypatch):
    requests = small_blocks(monkeypatch)
    dataset = published(store, tmp_path, sizes=(30, 30), side=32)
    reading = iter(StreamedDataset(dataset, shuffle=False, decode="bytes", split=None, ahead=3, threads=2))
    bytes_out = 0
    for _ in range(40):
        bytes_out += len(next(reading)["png"]) + 3000  # two more members, and headers
        assert len(requests) <= bytes_out // 4096 + 2 + 3 + 2
    reading.close()


def small_blocks(monkeypatch) -> list[tuple[str, int]]:
    """Read ahead in blocks of 4 KiB, unchecked; what is asked for."""
    requests: list[tuple[str, int]] = []

    def read_range(store, entry, start, end, *, buffer):
        requests.append((entry.key, start))
        return memoryview(b"".join(store.stream(entry.key, span=(start, end))))

    monkeypatch.setattr(readahead, "BLOCK", 4096)
    monkeypatch.setattr("selfcascade.curation.streaming.BLOCK", 4096)
    monkeypatch.setattr("selfcascade.storage.store.Store.read_range", read_range)
    return requests


def test_samples_larger_than_a_block_come_whole(store, tmp_path, monkeypatch):
    small_blocks(monkeypatch)
    dataset = published(store, tmp_path, sizes=(3, 2), side=100)
    for sample in StreamedDataset(dataset, shuffle=False, split=None):
        assert np.array_equal(sample["png"].permute(1, 2, 0).numpy(), np.asarray(image(int(sample["__key__"][1:]), 100)))


def test_memory_is_used_again_only_for_what_comes_after(store, tmp_path, monkeypatch):
    """Blocks of 4 KiB, each checked by its digest, in the memory of those before: every sample is still its own, and hardly any memory is new."""
    for module in ("selfcascade.storage.entry", "selfcascade.storage.store", "selfcascade.curation.readahead", "selfcascade.curation.streaming"):
        monkeypatch.setattr(f"{module}.BLOCK", 4096)
    dataset = published(store, tmp_path, sizes=(20, 20), side=40)
    buffers = []
    read_range = type(store).read_range

    def noted(store, entry, start, end, *, buffer=None):
        buffers.append(id(buffer))
        return read_range(store, entry, start, end, buffer=buffer)

    monkeypatch.setattr("selfcascade.storage.store.Store.read_range", noted)
    for sample in StreamedDataset(dataset, shuffle=False, split=None, ahead=3, threads=2):
        assert np.array_equal(sample["png"].permute(1, 2, 0).numpy(), np.asarray(image(int(sample["__key__"][1:]), 40)))
    assert len(buffers) > 20
    assert len(set(buffers)) <= 5


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["changed", "short", "gone"])
def test_a_damaged_shard_is_named_and_nothing_of_it_handed_out(dataset, store, workers, damage):
    key = dataset.entry("00002.tar").key
    data = store.read(key)
    if damage == "gone":
        store.delete([key])
    else:
        store.overwrite(key, data[:-1] + b"x" if damage == "changed" else b"")
    loader = DataLoader(StreamedDataset(dataset, shuffle=False), batch_size=None, num_workers=workers)
    found = []
    with pytest.raises(Exception, match=r"00002\.tar") as caught:
        found.extend(sample["__key__"] for sample in loader)
    assert isinstance(caught.value, SettingsError)
    assert damage == "gone" or isinstance(caught.value, IntegrityError)
    assert not {f"k{number:04d}" for number in range(8, 20)} & set(found)


def test_a_tar_that_disagrees_with_its_table_is_refused(store, tmp_path):
    for number, (sizes, of) in enumerate((((4,), (3,)), ((3,), (4,)))):
        folder = tmp_path / str(number)
        folder.mkdir()
        held = published(store, folder, sizes=sizes, side=16 + number)
        tabled = published(store, folder, sizes=of, side=18 + number)
        mixed = Artifact.plan(store, "datasets", "mixed", CurationSettings(name="mixed"), {"source": f"{number:064x}"})
        with mixed.writing():
            mixed.put("00000.tar", held.read("00000.tar"))
            mixed.put("00000.parquet", tabled.read("00000.parquet"))
            mixed.publish(counts={})
        with pytest.raises(IntegrityError, match=r"00000\.tar (holds more samples than the 3|ends after 3 samples, its table has 4)"):
            list(StreamedDataset(mixed, split=None))


def test_a_removed_sample_is_gone_and_a_reader_at_work_is_told(dataset, store):
    before = StreamedDataset(dataset, shuffle=False)
    purge(store, plan_purge(store, ["k0009"]), reason="asked for")
    fresh = Artifact(store, dataset.ref)
    assert keys(StreamedDataset(fresh, shuffle=False)) == [key for key in TRAIN if key != "k0009"]
    with pytest.raises(IntegrityError, match="rewritten by a removal request after the dataset was opened"):
        list(before)


def test_a_connection_that_breaks_is_taken_up_at_the_byte_reached(store):
    """A body that ends early twice: the rest is asked for by range, of the same version of the object."""
    data = bytes(range(256)) * 20_000
    store.put_new("datasets/x", data)
    entry = entry_of("datasets/x", data)
    asked: list[dict[str, str]] = []

    def cut(parsed, **kwargs):
        asked.append(kwargs["context"]["asked"])
        if len(asked) <= 2:
            whole = parsed["Body"].read(1_500_000)
            parsed["Body"] = Cut(whole)

    def note(params, context, **kwargs):
        context["asked"] = {name: str(params.get(name, "")) for name in ("Range", "IfMatch")}

    store.client.meta.events.register("before-parameter-build.s3.GetObject", note)
    store.client.meta.events.register("after-call.s3.GetObject", cut)
    assert store.read_range(entry, 0, len(data)) == data
    assert [request["Range"] for request in asked] == [f"bytes={start}-{len(data) - 1}" for start in (0, 1_500_000, 3_000_000)]
    assert all(request["IfMatch"] for request in asked[1:])


class Cut:
    """A body whose connection breaks after what it holds."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def iter_chunks(self, size):
        from botocore.exceptions import IncompleteReadError

        yield self.data
        raise IncompleteReadError(actual_bytes=len(self.data), expected_bytes=0)

    def close(self) -> None:
        pass


def test_arguments_out_of_bounds_are_refused(dataset):
    for options, said in (
        ({"window": 0}, "window=0 must be at least 1"),
        ({"rank": 0}, "go together"),
        ({"rank": 2, "world_size": 2}, "rank=2 must be from 0"),
        ({"rank": 0, "world_size": 99, "uneven": "drop"}, "uneven='drop' leaves none"),
    ):
        with pytest.raises(SettingsError, match=said):
            StreamedDataset(dataset, **options)


def test_the_ranks_of_torch_distributed_are_found(dataset, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        stream = StreamedDataset(dataset)
        assert (stream.rank, stream.world_size) == (0, 1)
    finally:
        torch.distributed.destroy_process_group()


def test_a_dataset_is_opened_by_name_and_pickled(dataset, store, store_settings):
    stream = StreamedDataset.open("datasets/things", store_settings, shuffle=False)
    assert keys(pickle.loads(pickle.dumps(stream))) == keys(stream) == TRAIN
