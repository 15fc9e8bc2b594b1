"""The samples of a run in the order of their keys, cut into chunks: kept on disk, and computed chunk by chunk when they are asked for."""

from __future__ import annotations

import os
import tempfile
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Mapping

from selfcascade.config import GenerationSettings
from selfcascade.curation.listing import Sorter
from selfcascade.generation.prompts import PromptList, load_prompts
from selfcascade.generation.seeds import SampleSpec, sample_key, sample_spec
from selfcascade.settings import SettingsError, digest_of
from selfcascade.storage import Store

HELD = 4
"""Lists of chunks that a process keeps: those of the methods that are compared have the same prompts."""

_held: OrderedDict[str, Chunks] = OrderedDict()
_lock = threading.Lock()


class Chunks(Mapping[int, tuple[SampleSpec, ...]]):
    """Samples of each chunk by its number. In memory are eight bytes a chunk; the rest is in temporary files that go with this object. Threads may share it."""

    def __init__(self, prompts: PromptList, *, size: int, run_seed: int, per_prompt: int = 1, negative_prompt: str = "") -> None:
        """Lay out ``per_prompt`` samples for each of ``prompts``, ``size`` a chunk, as :func:`selfcascade.generation.seeds.sample_specs` orders them."""
        self.prompts = prompts
        self.samples = len(prompts) * per_prompt
        self._size, self._run_seed, self._negative_prompt = size, run_seed, negative_prompt
        self._starts = array("q")
        self._file = tempfile.NamedTemporaryFile(prefix="selfcascade-")  # noqa: SIM115 it lives as long as this object
        with Sorter() as sorter:
            # Ids sort otherwise than the keys that are made from them: a-0 comes after a, but a-0-0000 before a-0000.
            sorter.add(
                f"{sample_key(place.id, index)} {place.start} {place.size} {index}\n".encode() for place in prompts.places() for index in range(per_prompt)
            )
            position = 0
            for number, line in enumerate(sorter.lines()):
                if number % size == 0:
                    self._starts.append(position)
                self._file.write(line)
                position += len(line)
        self._starts.append(position)
        self._file.flush()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __getitem__(self, index: int) -> tuple[SampleSpec, ...]:
        if not 0 <= index < len(self):
            raise KeyError(index)
        lines = os.pread(self._file.fileno(), self._starts[index + 1] - self._starts[index], self._starts[index])
        return tuple(self._spec(line) for line in lines.split(b"\n")[:-1])

    def size_of(self, index: int) -> int:
        """Samples of a chunk, without reading them."""
        return min(self._size, self.samples - index * self._size)

    def _spec(self, line: bytes) -> SampleSpec:
        start, size, index = (int(number) for number in line.split(b" ")[-3:])
        return sample_spec(self.prompts.at(start, size), index, run_seed=self._run_seed, negative_prompt=self._negative_prompt)


def lay_out(settings: GenerationSettings, store: Store) -> Chunks:
    """The chunks of a run, its prompts read now; this process keeps them for :func:`chunks_of`.

    Raises:
        SettingsError: as :func:`selfcascade.generation.prompts.load_prompts`.
    """
    chunks = Chunks(
        load_prompts(settings.prompts, store),
        size=settings.chunk,
        run_seed=settings.seed,
        per_prompt=settings.prompts.per_prompt,
        negative_prompt=settings.negative_prompt,
    )
    key = _key(settings, chunks.prompts.version)
    with _lock:
        _held[key] = chunks
        _held.move_to_end(key)
        while len(_held) > HELD:
            _held.popitem(last=False)
    return chunks


def chunks_of(settings: GenerationSettings, store: Store, version: str) -> Chunks:
    """The chunks of prompts that were planned at ``version``: as this process keeps them, else laid out again.

    Raises:
        SettingsError: the prompts are others by now.
    """
    with _lock:
        found = _held.get(_key(settings, version))
    if found is None:
        found = lay_out(settings, store)
        if found.prompts.version != version:
            raise SettingsError(f"generation.prompts are now at version {found.prompts.version[:12]} but were planned as {version[:12]}; run again")
    return found


def _key(settings: GenerationSettings, version: str) -> str:
    return digest_of([version, settings.prompts.per_prompt, settings.seed, settings.negative_prompt, settings.chunk])
