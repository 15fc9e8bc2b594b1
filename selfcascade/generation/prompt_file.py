"""Files of prompts: read row by row, checked, and given ids that neither the order of the rows nor the name of the file shapes."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from selfcascade.curation.listing import Sorter
from selfcascade.curation.tables import BATCH
from selfcascade.generation.prompt_list import Prompt, PromptList, TakenId
from selfcascade.settings import SettingsError, canonical_json

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_LATER = ("height", "width")
_FIELDS = ("id", "prompt", "negative_prompt", "seed")

Row = tuple[int, dict[str, Any]]
"""Number of a row and its fields."""


def read_prompt_file(path: Path, *, count: int | None = None) -> PromptList:
    """Prompts of a UTF-8 ``.txt`` (a prompt a line), ``.csv``, ``.jsonl`` or ``.parquet`` file, sorted by id; a batch of rows is in memory at a time.

    All but ``.txt`` have a field ``prompt`` and optionally ``id``, ``negative_prompt`` and ``seed``; other fields are ignored. An id that is not given is the
    first 16 digits of the SHA-256 of the text, with a number from the second of equal texts on, so that neither order nor file name matters.

    Args:
        path: the file.
        count: how many are kept, the first ones by id; unset: all.

    Raises:
        SettingsError: the file is missing, empty, of another kind or encoding, or has a bad row; names file and row.
    """
    readers: dict[str, Callable[[Path], Iterator[Row]]] = {".txt": _txt_rows, ".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise SettingsError(f"prompt file {path} must end in one of {', '.join(readers)}")
    try:
        prompts = PromptList(_with_ids(_draft(fields, row) for row, fields in reader(path)), count=count)
    except OSError as error:
        raise SettingsError(f"prompt file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"prompt file {path}, {_undecodable(path)}") from None
    except TakenId as error:
        own = "" if error.row > 0 else "its "
        made = "" if error.row > 0 else ", made from the text,"
        remedy = "" if error.row > 0 else "; give it an 'id' of its own"
        raise SettingsError(f"prompt file {path}, row {abs(error.row)}: {own}id {error.identity!r}{made} is taken by row {abs(error.other)}{remedy}") from None
    except _BadRow as error:
        raise SettingsError(f"prompt file {path}, {error}") from None
    if not prompts:
        raise SettingsError(f"prompt file {path} has no prompt")
    return prompts


class _BadRow(Exception):
    """Row and reason; the caller adds the file."""


def _undecodable(path: Path) -> str:
    """Which row is not UTF-8: a text file is decoded in blocks, whose errors do not tell."""
    with path.open("rb") as file:
        for row, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"row {row}: not UTF-8 (byte 0x{line[error.start]:02x}); save the file as UTF-8"
    return "whole file: not UTF-8; save it as UTF-8"


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for line in file:
            yield line.removesuffix("\n")


def _txt_rows(path: Path) -> Iterator[Row]:
    for row, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield row, {"prompt": line}


def _csv_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
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


def _jsonl_rows(path: Path) -> Iterator[Row]:
    for row, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _BadRow(f"row {row}: not JSON ({error})") from None
        if not isinstance(fields, dict):
            raise _BadRow(f'row {row}: must be a JSON object such as {{"prompt": "a red fox"}}')
        yield row, fields


def _parquet_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        yield from enumerate(_rows_of_parquet(file), start=1)


def _rows_of_parquet(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    try:
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=2**20) as table:
            names = table.schema_arrow.names
            _check_header(names)
            for batch in table.iter_batches(batch_size=BATCH, columns=[name for name in names if name in _FIELDS + _LATER], use_threads=False):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise _BadRow(f"whole file: not parquet ({' '.join(str(error).split())[:200]})") from None


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


def _with_ids(drafts: Iterable[tuple[int, Prompt]]) -> Iterator[tuple[int, Prompt]]:
    """Every prompt with an id; equal texts are numbered in the order of their other fields, never of the file, and their rows are negative."""
    with Sorter() as nameless:
        waiting: list[bytes] = []
        for row, prompt in drafts:
            if prompt.id:
                yield row, prompt
                continue
            waiting.append(_nameless(row, prompt))
            if len(waiting) == BATCH:
                nameless.add(waiting)
                waiting.clear()
        nameless.add(waiting)
        last, number = b"", 0
        for line in nameless.lines():
            stem, _, _, place, fields = line.split(b" ", 4)
            last, number = stem, number + 1 if stem == last else 1
            text, negative, seed = json.loads(fields)
            identity = stem.decode() if number == 1 else f"{stem.decode()}-{number}"
            yield -int(place), Prompt(id=identity, text=text, negative_prompt=negative, seed=seed)


def _nameless(row: int, prompt: Prompt) -> bytes:
    """A line that sorts by text, negative prompt (none first) and seed (none first): hex keeps the order of texts and holds no blank."""
    stem = hashlib.sha256(prompt.text.encode()).hexdigest()[:16].encode()
    negative = b"-" if prompt.negative_prompt is None else b"0" + prompt.negative_prompt.encode().hex().encode()
    seed = b"%019d" % (0 if prompt.seed is None else prompt.seed + 1)
    return b" ".join([stem, negative, seed, b"%012d" % row, canonical_json([prompt.text, prompt.negative_prompt, prompt.seed])]) + b"\n"
