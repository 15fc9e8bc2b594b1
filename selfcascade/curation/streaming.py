"""A published dataset as a stream for training: ``torch.utils.data.DataLoader`` over shards in a bucket, without a copy on disk."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from selfcascade.config import StoreSettings
from selfcascade.curation.index import Shard, read_index
from selfcascade.curation.order import Uneven, parts, shard_order, share_of_rank, share_of_worker, shuffled
from selfcascade.curation.readahead import ReadAhead, Span
from selfcascade.curation.splits import Split
from selfcascade.curation.unpacking import unpack
from selfcascade.settings import SettingsError
from selfcascade.storage import BLOCK, Artifact, IntegrityError, Store, located, resolve

Decode = Literal["bytes", "pil", "tensor"]
FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
"""Extensions that are decoded as pictures, and by which of Pillow's decoders."""


@dataclass(frozen=True)
class _Position:
    """How far an epoch has been read."""

    epoch: int
    seen: list[int]
    """Samples handed out of each of the parts that the workers read."""
    turn: int = 0
    """The part whose batch is the next."""


class StreamedDataset(IterableDataset[Any]):
    """Samples of one split, each a dict as WebDataset gives it: ``__key__``, ``__url__``, and a member for each extension (``png``, ``txt``, ``json``).

    Blocks of 8 MiB are fetched ahead by threads and held against the manifest before anything of them is handed out: a sample that was handed out is
    sound, and damage ends the iteration with an :class:`~selfcascade.storage.IntegrityError` that names the object. Memory of each worker is bounded by
    ``ahead`` + 2 blocks and ``window`` encoded samples.

    Order and split among ranks and workers follow from seed and epoch alone (:mod:`selfcascade.curation.order`). Call :meth:`set_epoch` before each epoch.
    """

    def __init__(
        self,
        artifact: Artifact,
        *,
        split: Split | None = "train",
        decode: Decode = "tensor",
        transform: Callable[[dict[str, Any]], Any] | None = None,
        shuffle: bool = True,
        seed: int = 0,
        window: int = 256,
        rank: int | None = None,
        world_size: int | None = None,
        uneven: Uneven = "keep",
        threads: int = 4,
        ahead: int = 8,
    ) -> None:
        """Reads manifest and tables, no picture.

        Args:
            artifact: a published dataset, as :func:`selfcascade.storage.resolve` finds it; samples of ``generate`` too, with ``split=None``.
            split: what is read; None is all.
            decode: ``bytes`` gives every member as it is stored; ``pil`` RGB pictures and ``tensor`` (3, H, W) uint8, both with ``txt`` as str and
                ``json`` as what it holds.
            transform: applied to each sample last; must be picklable where workers are spawned.
            shuffle: whether shards are permuted and samples shuffled; if not, they come in key order.
            seed: of the shuffling.
            window: samples among which one is shuffled, and the most that are held for it; 1 permutes shards only.
            rank: of this process; without it torch.distributed's if it is initialised by now, else 0.
            world_size: number of ranks, as ``rank``.
            uneven: ``keep`` reads every sample once, so ranks may differ by one; ``pad`` repeats up to world_size - 1 samples and ``drop`` leaves out as
                many, others in each epoch, so that all ranks have equally many samples, and as many batches under equal numbers of workers.
            threads: requests under way in each worker.
            ahead: blocks of 8 MiB that each worker may have fetched ahead.

        Raises:
            SettingsError: an argument is out of bounds, or the split is empty.
            NotFound, IntegrityError: as :func:`selfcascade.curation.index.read_index`.
        """
        rank, world_size = _place(rank, world_size)
        for name, value in (("window", window), ("threads", threads), ("ahead", ahead)):
            if value < 1:
                raise SettingsError(f"{name}={value} must be at least 1")
        self.artifact = artifact
        self.split: Split | None = split
        self.decode: Decode = decode
        self.transform = transform
        self.shuffle = shuffle
        self.seed = seed
        self.window = window
        self.rank = rank
        self.world_size = world_size
        self.uneven: Uneven = uneven
        self.threads = threads
        self.ahead = ahead
        self.shards = read_index(artifact, split)
        self.samples = sum(len(shard.chosen) for shard in self.shards)
        """Of the split, on all ranks."""
        self._share = share_of_rank(self.samples, rank, world_size, uneven)
        if self._share[0] == self._share[1] and uneven == "drop":
            raise SettingsError(f"{artifact} has {self.samples} samples of split {split!r} for {world_size} ranks: uneven='drop' leaves none; use 'pad'")
        # Shared, so that persistent workers hear of a new epoch.
        self._epoch: torch.Tensor = torch.zeros(1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._resume: _Position | None = None
        self._position: _Position | None = None

    @classmethod
    def open(cls, dataset: str, store: StoreSettings | None = None, **options: Any) -> Self:
        """By ``datasets/NAME`` or ``datasets/NAME@VERSION`` in the store that the settings name, or by ``s3://`` URI; options as for the class.

        Raises:
            StoreError: there is no such store.
            NotFound: there is no such artifact in it.
        """
        opened = Store.open(located(dataset, store), read_only=True)
        try:
            return cls(resolve(opened, dataset), **options)
        except BaseException:
            opened.close()
            raise

    def __len__(self) -> int:
        """Samples of this rank in an epoch."""
        return self._share[1] - self._share[0]

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration reads."""
        return int(self._epoch[0])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; workers that persist hear of it. Between epochs: an iteration keeps the one with which it began."""
        self._epoch[0] = epoch

    def __iter__(self) -> Iterator[Any]:
        """Samples of this rank and worker, from where a loaded state says."""
        worker, workers = _worker()
        epoch = self.epoch
        resume, self._resume = self._resume, None
        at = self._position = _begun(resume, epoch, workers)
        # A loader begins with worker 0, whosever turn it was when the state was taken: the parts move round, the workers do not.
        part = (worker + at.turn) % workers
        for sample in self._samples(epoch, *share_of_worker(*self._share, part, workers), at.seen[part]):
            done = self._finished(sample)
            at.seen[part] += 1
            yield done

    # Resuming

    def state_dict(self) -> dict[str, Any]:
        """Where the reading is in this process: JSON-able, for :meth:`load_state_dict` of an equal dataset.

        What a DataLoader without workers has handed out, exactly. With workers the main process does not read: see :meth:`state_after`, or use torchdata's
        StatefulDataLoader, which asks every worker.
        """
        _, workers = _worker()
        found = next((at for at in (self._resume, self._position) if at is not None and at.epoch == self.epoch), None)
        return self._state(found or _begun(None, self.epoch, workers))

    def state_after(self, batches: int, *, batch_size: int, num_workers: int, drop_last: bool = False) -> dict[str, Any]:
        """The state once a DataLoader with workers has handed out ``batches`` of this epoch, counted from where it began, by a count of each worker's samples.

        A DataLoader takes batches from its workers in turn, and passes over one that has no more.
        """
        workers = max(num_workers, 1)
        at = _begun(self._resume, self.epoch, workers)
        shares = [share_of_worker(*self._share, part, workers) for part in range(workers)]
        left = [stop - start - seen for (start, stop), seen in zip(shares, at.seen, strict=True)]
        most = [count // batch_size if drop_last else -(-count // batch_size) for count in left]
        taken = [0] * workers
        turn = at.turn
        while batches > 0 and taken != most:
            if taken[turn] < most[turn]:
                taken[turn] += 1
                batches -= 1
            turn = (turn + 1) % workers
        seen = [old + min(count * batch_size, rest) for old, count, rest in zip(at.seen, taken, left, strict=True)]
        return self._state(_Position(self.epoch, seen, turn))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken: the next iteration of its epoch hands out what was not yet, and reads nothing that is behind.

        With workers that persist, before the first iteration of the loader.

        Raises:
            SettingsError: the state is of other data, another order or another number of ranks; says what differs.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise SettingsError(f"the state was taken with {name}={state.get(name)!r}, this dataset has {value!r}; resume with what the run had")
        self.set_epoch(state["epoch"])
        self._resume = _Position(state["epoch"], list(state["seen"]), state["turn"])
        self._position = None

    def _state(self, at: _Position) -> dict[str, Any]:
        return self._identity() | {"epoch": at.epoch, "seen": list(at.seen), "turn": at.turn}

    def _identity(self) -> dict[str, Any]:
        names = ("split", "samples", "shuffle", "seed", "window", "world_size", "uneven")
        return {"version": self.artifact.ref.version} | {name: getattr(self, name) for name in names}

    # Reading

    def _samples(self, epoch: int, start: int, stop: int, seen: int) -> Iterator[dict[str, Any]]:
        """Encoded samples of the indices ``start`` .. ``stop - 1`` of the epoch's stream, in the order of the epoch, without the first ``seen``."""
        order = shuffled(start, stop, window=self.window if self.shuffle else 1, seed=self.seed, epoch=epoch)[seen:]
        if not len(order):
            return
        reading = self._read(epoch, np.sort(order))
        held: dict[int, dict[str, Any]] = {}
        for index in order.tolist():
            while index not in held:
                at, sample = next(reading)
                held[at] = sample
            yield held.pop(index)

    def _read(self, epoch: int, indices: np.ndarray[Any, np.dtype[np.int64]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """The samples of ``indices``, ascending, and what they are; shards that hold none of them are not touched."""
        names = [shard.name for shard in self.shards]
        order = shard_order(names, seed=self.seed, epoch=epoch) if self.shuffle else range(len(names))
        shards = [self.shards[number] for number in order]
        pieces: list[tuple[Shard, np.ndarray[Any, Any], Sequence[int]]] = []
        for number, first, _, index in parts([len(shard.chosen) for shard in shards], int(indices[0]), int(indices[-1]) + 1):
            low, high = np.searchsorted(indices, (index, index + len(shards[number].chosen) - first))
            if low < high:
                part = indices[low:high]
                pieces.append((shards[number], shards[number].chosen[first + part - index], part.tolist()))
        spans = [_span(shard, places) for shard, places, _ in pieces]
        with ReadAhead(self.artifact.store, spans, threads=self.threads, ahead=self.ahead) as blocks:
            for number, (shard, places, wanted) in enumerate(pieces):
                where = self.artifact.store.uri(shard.entry.key)
                begin = 0 if shard.offsets is None else int(places[0])
                found = unpack(
                    blocks.blocks(number),
                    places.tolist(),
                    start=spans[number].start % BLOCK,
                    first=begin,
                    samples=shard.samples,
                    where=f"object {where}",
                )
                for index, sample in zip(wanted, found, strict=False):
                    yield index, {"__url__": where, **sample}

    def _finished(self, sample: dict[str, Any]) -> Any:
        if self.decode != "bytes":
            for name, value in sample.items():
                try:
                    if name in FORMATS:
                        sample[name] = _picture(value, FORMATS[name], tensor=self.decode == "tensor")
                    elif name == "txt":
                        sample[name] = value.decode()
                    elif name == "json":
                        sample[name] = json.loads(value)
                except (OSError, ValueError) as error:
                    raise IntegrityError(f"sample {sample['__key__']} of {sample['__url__']}: its {name} cannot be decoded ({error})") from None
        return sample if self.transform is None else self.transform(sample)


def open_dataset(reference: str, *, store: StoreSettings | None = None, **options: Any) -> StreamedDataset:
    """A published dataset for :class:`torch.utils.data.DataLoader`; samples of ``generate`` too, which have no splits.

    Args:
        reference: ``s3://bucket/prefix/datasets/NAME[/VERSION]``, or ``datasets/NAME[@VERSION]`` in the store of ``store``.
        store: endpoint and keys; by default those of the environment, or the embedded store of this folder.
        options: as for :class:`StreamedDataset`; ``split`` is "train" for a dataset unless it is given.

    Raises:
        StoreError: there is no such store, or it cannot be reached.
        NotFound: there is no such artifact.
        SettingsError: an option is out of bounds, or the split is empty.
    """
    if re.search(r"(^|/)samples/", reference):
        options = {"split": None} | options
    return StreamedDataset.open(reference, store, **options)


def _span(shard: Shard, places: np.ndarray[Any, Any]) -> Span:
    """The bytes of a tar in which the samples at ``places`` lie: without offsets all of it, of which reading stops at the last."""
    if shard.offsets is None:
        return Span(shard.entry, 0, shard.entry.size)
    after = int(places[-1]) + 1
    return Span(shard.entry, int(shard.offsets[places[0]]), shard.entry.size if after == shard.samples else int(shard.offsets[after]))


def _picture(data: bytes, kind: str, *, tensor: bool) -> Image.Image | torch.Tensor:
    with Image.open(io.BytesIO(data), formats=[kind]) as opened:
        image = opened.convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous() if tensor else image


def _worker() -> tuple[int, int]:
    """Number of this worker of a DataLoader, and how many there are."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def _begun(resume: _Position | None, epoch: int, workers: int) -> _Position:
    """Where as many workers begin an epoch: at its start, unless a state says more."""
    if resume is None or resume.epoch != epoch or not any(resume.seen):
        return _Position(epoch, [0] * workers)
    if len(resume.seen) != workers:
        raise SettingsError(f"the state was taken with {len(resume.seen)} reading processes, the loader has {workers}; resume with the same num_workers")
    return replace(resume, seen=list(resume.seen))


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Rank and number of ranks: as given, else torch.distributed's."""
    if (rank is None) != (world_size is None):
        raise SettingsError("rank and world_size go together: give both, or neither to ask torch.distributed")
    if rank is None or world_size is None:
        group = torch.distributed
        ready = group.is_available() and group.is_initialized()
        rank, world_size = (group.get_rank(), group.get_world_size()) if ready else (0, 1)
    if not 0 <= rank < world_size:
        raise SettingsError(f"rank={rank} must be from 0 to world_size - 1, which is {world_size - 1}")
    return rank, world_size
