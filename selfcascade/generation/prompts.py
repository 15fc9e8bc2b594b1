"""Prompts of a run: the captions of a dataset's split, or a file of the user's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from selfcascade.config import PromptSettings
from selfcascade.curation.index import numbered
from selfcascade.curation.shards import read_table_bytes
from selfcascade.generation.prompt_file import read_prompt_file
from selfcascade.generation.prompt_list import Prompt, PromptList
from selfcascade.settings import SettingsError
from selfcascade.storage import Artifact, Store, resolve

__all__ = ["Prompt", "PromptList", "load_prompts", "prompts_of_rows", "read_prompt_file", "words_of"]

_WORD = re.compile(r"[^\W_]+")


def load_prompts(settings: PromptSettings, store: Store) -> PromptList:
    """The prompts that ``settings`` ask for, sorted by id. Of a dataset, one table of a shard is in memory at a time, and the words that are known.

    Raises:
        SettingsError: neither or both of file and dataset fit, the file has a bad row (its number is named), no prompt is left, or fewer than ``count``.
    """
    if settings.file is not None:
        found, origin = read_prompt_file(settings.file, count=settings.count), f"prompt file {settings.file}"
    elif settings.dataset is not None:
        artifact = resolve(store, settings.dataset, "datasets")
        chosen = prompts_of_rows(lambda: _rows(artifact), split=settings.split, known_words=settings.known_words)
        found = PromptList(enumerate(chosen, start=1), count=settings.count)
        origin = f"split {settings.split!r} of {artifact.ref}" + (", known words only" if settings.known_words else "")
        if not found:
            raise SettingsError(f"{origin}: no prompt is left; choose another prompts.split, or set prompts.known_words to false")
    else:
        raise SettingsError("no prompts: set prompts.dataset or prompts.file")
    if settings.count is not None and found.found < settings.count:
        raise SettingsError(f"{origin} has {found.found} prompts but prompts.count asks for {settings.count}; lower it or leave it unset")
    return found


def words_of(text: str) -> set[str]:
    """The words of a caption: runs of letters and digits, case folded."""
    return set(_WORD.findall(text.casefold()))


def prompts_of_rows(rows: Callable[[], Iterable[Mapping[str, Any]]], *, split: str, known_words: bool) -> Iterator[Prompt]:
    """Captions of the kept rows of ``split``, in the order of the rows. Each row has ``key``, ``caption``, ``split`` and ``kept``.

    ``known_words`` keeps only captions whose words all occur in captions of the train split: a held-out caption with a word of its own is a prompt that
    a base trained on this data cannot know. The rows are then asked for twice.
    """
    known: set[str] = set()
    if known_words:
        for row in rows():
            if row["kept"] and row["split"] == "train":
                known |= words_of(row["caption"])
    for row in rows():
        if row["kept"] and row["split"] == split and row["caption"].strip() and (not known_words or words_of(row["caption"]) <= known):
            yield Prompt(id=row["key"], text=row["caption"].strip())


def _rows(artifact: Artifact) -> Iterator[Mapping[str, Any]]:
    for name in numbered(artifact, ".parquet"):
        yield from read_table_bytes(artifact.read(name)).select(["key", "caption", "split", "kept"]).to_pylist()
