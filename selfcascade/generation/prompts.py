"""Prompts of a run: the captions of a dataset's split, or a file of the user's."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from selfcascade.config import PromptSettings
from selfcascade.curation.reading import read_table
from selfcascade.settings import SettingsError, digest_of
from selfcascade.storage import Store, resolve

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_WORD = re.compile(r"[^\W_]+")
_LATER = ("height", "width")
_FIELDS = ("id", "prompt", "negative_prompt", "seed")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt. ``negative_prompt`` and ``seed`` are the run's where they are unset."""

    id: str
    text: str
    negative_prompt: str | None = None
    seed: int | None = None


def load_prompts(settings: PromptSettings, store: Store) -> tuple[Prompt, ...]:
    """The prompts that ``settings`` ask for, sorted by id.

    Raises:
        SettingsError: neither or both of file and dataset fit, the file has a bad row (its number is named), no prompt is left, or fewer than ``count``.
    """
    if settings.file is not None:
        found, origin = read_prompt_file(settings.file), f"prompt file {settings.file}"
    elif settings.dataset is not None:
        artifact = resolve(store, settings.dataset, "datasets")
        rows = read_table(artifact).select(["key", "caption", "split", "kept"]).to_pylist()
        found = prompts_of_rows(rows, split=settings.split, known_words=settings.known_words)
        origin = f"split {settings.split!r} of {artifact.ref}" + (", known words only" if settings.known_words else "")
        if not found:
            raise SettingsError(f"{origin}: no prompt is left; choose another prompts.split, or set prompts.known_words to false")
    else:
        raise SettingsError("no prompts: set prompts.dataset or prompts.file")
    if settings.count is not None and len(found) < settings.count:
        raise SettingsError(f"{origin} has {len(found)} prompts but prompts.count asks for {settings.count}; lower it or leave it unset")
    return found[: settings.count]


def prompts_version(prompts: Iterable[Prompt]) -> str:
    """SHA-256 of the sorted list: the version of the prompts as an input, wherever they came from."""
    return digest_of(sorted([prompt.id, prompt.text, prompt.negative_prompt, prompt.seed] for prompt in prompts))


def words_of(text: str) -> set[str]:
    """The words of a caption: runs of letters and digits, case folded."""
    return set(_WORD.findall(text.casefold()))


def prompts_of_rows(rows: Iterable[dict[str, Any]], *, split: str, known_words: bool) -> tuple[Prompt, ...]:
    """Captions of the kept rows of ``split``, sorted by key. Each row has ``key``, ``caption``, ``split`` and ``kept``.

    ``known_words`` keeps only captions whose words all occur in captions of the train split: a held-out caption with a word of its own is a prompt that
    a base trained on this data cannot know.
    """
    kept = [row for row in rows if row["kept"] and row["caption"].strip()]
    known = set().union(*(words_of(row["caption"]) for row in kept if row["split"] == "train")) if known_words else set()
    chosen = [row for row in kept if row["split"] == split and (not known_words or words_of(row["caption"]) <= known)]
    return tuple(Prompt(id=row["key"], text=row["caption"].strip()) for row in sorted(chosen, key=lambda row: row["key"]))


def read_prompt_file(path: Path) -> tuple[Prompt, ...]:
    """Prompts of a UTF-8 ``.txt`` (a prompt a line), ``.csv``, ``.jsonl`` or ``.parquet`` file, sorted by id.

    All but ``.txt`` have a field ``prompt`` and optionally ``id``, ``negative_prompt`` and ``seed``; other fields are ignored. An id that is not given is the
    first 16 digits of the SHA-256 of the text, with a number from the second of equal texts on, so that neither order nor file name matters.

    Raises:
        SettingsError: the file is missing, empty, of another kind or encoding, or has a bad row; names file and row.
    """
    readers = {".txt": _txt_rows, ".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise SettingsError(f"prompt file {path} must end in one of {', '.join(readers)}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SettingsError(f"prompt file {path} cannot be read: {error.strerror}") from None
    try:
        drafts = [_draft(fields, row) for row, fields in reader(data)]
        prompts = _with_ids(drafts)
    except _BadRow as error:
        raise SettingsError(f"prompt file {path}, {error}") from None
    if not prompts:
        raise SettingsError(f"prompt file {path} has no prompt")
    return prompts


class _BadRow(Exception):
    """Row and reason; the caller adds the file."""


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _BadRow(f"row {line}: not UTF-8 (byte 0x{data[error.start]:02x}); save the file as UTF-8") from None


def _txt_rows(data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    for row, line in enumerate(_text(data).split("\n"), start=1):
        if line.strip():
            yield row, {"prompt": line}


def _csv_rows(data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(_text(data), newline=""), strict=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            if not any(cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                _check_header(header)
            elif len(cells) != len(header):
                raise _BadRow(f"row {reader.line_num}: {len(cells)} cells under {len(header)} columns; quote cells that hold a comma")
            else:
                # An empty cell is a value that is not given, but an empty prompt is refused below.
                yield reader.line_num, {name: cell for name, cell in zip(header, cells, strict=True) if cell != "" or name == "prompt"}
    except csv.Error as error:
        raise _BadRow(f"row {reader.line_num}: {error}") from None


def _jsonl_rows(data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    for row, line in enumerate(_text(data).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _BadRow(f"row {row}: not JSON ({error})") from None
        if not isinstance(fields, dict):
            raise _BadRow(f'row {row}: must be a JSON object such as {{"prompt": "a red fox"}}')
        yield row, fields


def _parquet_rows(data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError) as error:
        raise _BadRow(f"whole file: not parquet ({' '.join(str(error).split())[:200]})") from None
    _check_header(table.column_names)
    yield from enumerate(table.to_pylist(), start=1)


def _check_header(names: list[str]) -> None:
    if "prompt" not in names:
        raise _BadRow(f"row 1: no column 'prompt' among {', '.join(repr(name) for name in names)}")
    if len(set(names)) != len(names):
        raise _BadRow("row 1: two columns have the same name")


def _draft(fields: dict[str, Any], row: int) -> tuple[int, Prompt]:
    given = {name: value for name, value in fields.items() if value is not None}
    for name in _LATER:
        if name in given:
            raise _BadRow(f"row {row}: {name!r} of a single prompt is not supported; set cascade.height and cascade.width, and remove the column")
    text, negative, identity = given.get("prompt"), given.get("negative_prompt"), given.get("id", "")
    if not isinstance(text, str) or not text.strip():
        raise _BadRow(f"row {row}: 'prompt' must be a text that is not blank, not {text!r}")
    if any("\ud800" <= character <= "\udfff" for character in f"{text}{negative}"):
        raise _BadRow(f"row {row}: half of a surrogate pair (\\ud800 to \\udfff) is no character")
    if negative is not None and not isinstance(negative, str):
        raise _BadRow(f"row {row}: 'negative_prompt' must be a text, not {negative!r}")
    if isinstance(identity, int) and not isinstance(identity, bool):
        identity = str(identity)
    if not isinstance(identity, str) or (identity and not _ID.fullmatch(identity)):
        raise _BadRow(f"row {row}: 'id' must be at most 64 of A-Z a-z 0-9 _ -, beginning with a letter or digit, not {identity!r}")
    return row, Prompt(id=identity, text=text.strip(), negative_prompt=negative, seed=_seed(given.get("seed"), row))


def _seed(value: Any, row: int) -> int | None:
    if value is None:
        return None
    # A column with gaps that went through pandas comes back as floats, 5.0 for 5.
    if isinstance(value, str) and re.fullmatch(r"\s*\d{1,19}(\.0*)?\s*", value, re.ASCII):
        value = int(value.split(".")[0])
    elif isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise _BadRow(f"row {row}: 'seed' must be a whole number from 0 to 2^63 - 1, not {value!r}")
    return value


def _with_ids(drafts: list[tuple[int, Prompt]]) -> tuple[Prompt, ...]:
    """Sorted prompts, each with an id; equal texts are numbered in the order of their other fields, never of the file."""
    taken: dict[str, int] = {}
    prompts = []
    for row, prompt in drafts:
        if prompt.id:
            if prompt.id in taken:
                raise _BadRow(f"row {row}: id {prompt.id!r} is taken by row {taken[prompt.id]}")
            taken[prompt.id] = row
            prompts.append(prompt)
    nameless = [(row, prompt) for row, prompt in drafts if not prompt.id]
    counts: dict[str, int] = {}
    for row, prompt in sorted(nameless, key=lambda item: _canonical(item[1])):
        stem = hashlib.sha256(prompt.text.encode()).hexdigest()[:16]
        counts[stem] = counts.get(stem, 0) + 1
        identity = stem if counts[stem] == 1 else f"{stem}-{counts[stem]}"
        if identity in taken:
            raise _BadRow(f"row {row}: its id {identity!r}, made from the text, is taken by row {taken[identity]}; give it an 'id' of its own")
        prompts.append(Prompt(id=identity, text=prompt.text, negative_prompt=prompt.negative_prompt, seed=prompt.seed))
    return tuple(sorted(prompts, key=lambda prompt: prompt.id))


def _canonical(prompt: Prompt) -> tuple[str, bool, str, int]:
    return prompt.text, prompt.negative_prompt is not None, prompt.negative_prompt or "", -1 if prompt.seed is None else prompt.seed
