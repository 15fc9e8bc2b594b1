"""The processes that train one network together, as one of them sees them: its share of a batch, sums over all, what the first of them says."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PATIENT = timedelta(days=30)
"""For how long a rank waits for the others. One that previews, validates or stores makes the rest wait; that one died is noticed by its parent."""
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


class RankLost(RuntimeError):
    """Another rank is gone."""


@dataclass(frozen=True)
class Ranks:
    """Rank ``rank`` of ``count``. One alone shares, sums and hears by doing nothing.

    Gradients are summed over the ranks by one all-reduce of all of them, flattened, after the backward pass of a step. DistributedDataParallel and accelerate,
    which wraps it, would hook the forward pass of the network that trains. But none of ours is passed forward as a whole: Φ and LoRA are called from inside the
    UNet, in pieces. They would also average what each rank takes for a mean, where this is the sum that the parts of a step have always been added to, so that
    N ranks are as N parts of ``accumulation``. What they would gain is that sums overlap with the backward pass.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this rank writes, previews and reports."""
        return self.rank == 0

    def share(self, total: int) -> range:
        """This rank's places among ``total``, which divide: one run of them."""
        size = total // self.count
        return range(self.rank * size, (self.rank + 1) * size)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace float32 tensors of one device, the same shapes on every rank, by their sums over the ranks: the same bits on all of them.

        Raises:
            RankLost: another rank is gone.
        """
        if self.count > 1:
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            with _others():
                dist.all_reduce(flat)
            for tensor, summed in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(summed.view_as(tensor))

    def total(self, values: Sequence[float]) -> list[float]:
        """Numbers summed over the ranks, in float64, the same bits on all of them.

        Raises:
            RankLost: another rank is gone.
        """
        if self.count == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        with _others():
            dist.all_reduce(numbers)
        return numbers.tolist()

    def agreed(self, answer: bool) -> bool:
        """What the first rank answers.

        Raises:
            RankLost: another rank is gone.
        """
        if self.count == 1:
            return answer
        said = torch.tensor(int(answer), dtype=torch.uint8)
        with _others():
            dist.broadcast(said, 0)
        return bool(said)

    def of_first(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
        """Named tensors and a record of the first rank, on every rank; tensors come on the CPU. What the others pass is not looked at.

        A tensor comes when it is asked for, so that nobody holds all of them: every rank asks for the same ones in the same order, the first as well.

        Raises:
            RankLost: another rank is gone; so does asking for a tensor.
        """
        if self.count == 1:
            return tensors, dict(record)
        head: list[Any] = [None]
        if self.first:
            head = [({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}, dict(record))]
        with _others():
            dist.broadcast_object_list(head, 0, device=torch.device("cpu"))
        described, found = head[0]
        return _OfFirst(tensors if self.first else None, described), found

    @contextmanager
    def after_first(self) -> Iterator[None]:
        """A block that the first rank is through with before the others begin it."""
        if not self.first:
            self.total([0.0])
        yield
        if self.first:
            self.total([0.0])

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that no rank leaves before all have come to its end, unless by an error."""
        yield
        self.total([0.0])


class _OfFirst(Mapping[str, Tensor]):
    """Tensors of the first rank, each of which is sent to the others when all of them ask for it."""

    def __init__(self, own: Mapping[str, Tensor] | None, described: Mapping[str, tuple[torch.Size, torch.dtype]]) -> None:
        self._own, self._described = own, described

    def __getitem__(self, name: str) -> Tensor:
        shape, dtype = self._described[name]
        tensor = torch.empty(shape, dtype=dtype) if self._own is None else self._own[name].detach().cpu().contiguous()
        if tensor.numel():
            with _others():
                dist.broadcast(tensor.reshape(-1).view(torch.uint8), 0)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._described

    def __iter__(self) -> Iterator[str]:
        return iter(self._described)

    def __len__(self) -> int:
        return len(self._described)


ALONE = Ranks()


@contextmanager
def joined(folder: Path, *, rank: int, count: int, device: torch.device) -> Iterator[Ranks]:
    """The ranks of this machine that meet in ``folder``, for as long as the block lasts: gloo between processors, NCCL between GPUs, all of it on loopback.

    They find each other by a file, since torch's own meeting point would listen on every address of the machine.

    Args:
        folder: seen by all of them; a new one each time.
        rank: of this process.
        count: how many there are.
        device: on a GPU rank r computes on the r-th.

    Raises:
        RankLost: the others do not come.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = LOOPBACK
    if device.type == "cuda":
        torch.cuda.set_device(rank)
    # Words go by gloo even between GPUs: a rank that waits for one does not occupy its GPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with _others():
        store = dist.FileStore(str(folder / "ranks"), count)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENT)
    yield Ranks(rank, count)
    dist.destroy_process_group()  # not after an error: it would wait for what the others never send


def lost(error: Exception) -> RankLost | None:
    """What an error of a pass says of another rank: shards are exchanged in the middle of it, where much else may fail."""
    # gloo's have no type of their own; their text names the source file.
    return _lost(error) if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error)) else None


def _lost(error: Exception) -> RankLost:
    return RankLost(f"another process of this training is gone ({' '.join(str(error).split())[:200]})")


@contextmanager
def _others() -> Iterator[None]:
    """Says by its type that what fails is the talk between ranks."""
    try:
        yield
    except RuntimeError as error:
        raise _lost(error) from error
