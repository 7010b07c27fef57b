"""Data sets as the files in which they come: Parquet, JSONL, JSON, CSV, wherever they were found.

`datasets` is not needed: a folder copied by hand, the cache and a download of the hub are one case.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fedrot.errors import FedrotError

# What a damaged file raises, an archive that was cut off included.
BROKEN = UnicodeDecodeError, json.JSONDecodeError, csv.Error, EOFError, zlib.error, gzip.BadGzipFile
DATA_SUFFIXES = (".parquet", ".jsonl", ".json", ".jsonl.gz", ".csv")

Columns = dict[str, list[Any]]


def read_part(folder: Path, part: str) -> Columns:
    """The columns that all files of a part have.

    Raises:
        FedrotError: as :func:`part_files` and :func:`read_file`.
    """
    return joined([read_file(file) for file in part_files(folder, part)])


def part_files(folder: Path, part: str, *, needed: bool = True) -> list[Path]:
    """The data files of a part, at any depth under ``folder``, sorted.

    ``part`` is a whole word of the file's name or of the name of a folder that it is in. Words are
    what stands between characters that are no letters; capitals do not matter.

    Raises:
        FedrotError: there is none, though ``needed``; or one is of both the train and test part.
    """

    def has(file: Path, word: str) -> bool:
        whole = rf"(?<![^\W\d_]){re.escape(word)}(?![^\W\d_])"
        return bool(re.search(whole, file.relative_to(folder).as_posix(), re.IGNORECASE))

    data = (file for file in folder.rglob("*") if file.name.endswith(DATA_SUFFIXES))
    files = sorted(file for file in data if has(file, part))
    if needed and not files:
        raise FedrotError(
            f"{folder} holds no {part} part: a file with the word {part!r} in its name or its "
            f"folder's, and one of the endings {' '.join(DATA_SUFFIXES)}"
        )
    if both := [file for file in files if has(file, "train") and has(file, "test")]:
        raise FedrotError(
            f"{both[0]} is of both the train and the test part of {folder}: its name and its "
            "folders' there must have only one of the two words"
        )
    return files


def joined(read: Sequence[Columns]) -> Columns:
    """One below the other, the columns that all have."""
    shared = [name for name in read[0] if all(name in columns for columns in read)]
    return {name: [value for columns in read for value in columns[name]] for name in shared}


def read_file(file: Path) -> Columns:
    """The columns of a Parquet, JSONL, JSON (a list of objects) or CSV file with a header.

    Raises:
        FedrotError: it cannot be read, holds no rows, or a row of a CSV file is longer than its
            header.
    """
    name = file.name.removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            return _read_parquet(file)
        opened = gzip.open if file.name.endswith(".gz") else open
        # Excel begins a file with a byte order mark, which utf-8-sig leaves out.
        with opened(file, "rt", encoding="utf-8-sig", newline="") as text:
            if name.endswith(".csv"):
                rows = list(csv.DictReader(text))
            elif name.endswith(".json"):
                content = text.read()
                listed = content.lstrip().startswith("[")
                rows = json.loads(content) if listed else _json_lines(file, content.splitlines())
            else:
                rows = _json_lines(file, text)
    except BROKEN as error:
        raise FedrotError(f"{file} cannot be read: {error}") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise FedrotError(f"{file} must hold rows with named columns")
    for number, row in enumerate(rows, 1):
        if None in row:  # where csv puts what is beyond the header
            raise FedrotError(
                f"{file}, row {number}: more values than the header has columns (is a text with a "
                f"comma not in quotes?): {row[None][0]!r}"
            )
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _json_lines(file: Path, lines: Iterable[str]) -> list[Any]:
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(json.loads(line.rstrip()))
            except json.JSONDecodeError as error:
                where = f"{file}, line {number}, column {error.colno}"
                raise FedrotError(f"{where} is not JSON: {error.msg}") from error
    return rows


def _read_parquet(file: Path) -> Columns:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise FedrotError(
            f"{file.name} is a Parquet file: pip install 'fedrot[hub]' (pyarrow) reads it"
        ) from error
    try:
        table = parquet.read_table(file)
    except ArrowException as error:
        raise FedrotError(f"{file} cannot be read: {error}") from error
    if not table.num_rows:
        raise FedrotError(f"{file} must hold rows with named columns")
    return table.to_pydict()


def column(columns: Columns, names: Sequence[str], where: str, *, blank: bool = True) -> list[Any]:
    """The first of ``names`` that there is; ``blank``: its values may be empty strings.

    Raises:
        FedrotError: there is none, a value is missing, or is a list or an object.
    """
    for name in names:
        if name in columns:
            for number, value in enumerate(columns[name], 1):
                _check(value, f"{where}, row {number}, column {name}", blank)
            return columns[name]
    raise FedrotError(
        f"{where} has no column {' or '.join(names)}; it has {', '.join(columns) or 'none'}"
    )


def _check(value: Any, place: str, blank: bool) -> None:
    """Refuse null, NaN, unless ``blank`` an empty string, and what is several values."""
    empty = not blank and isinstance(value, str) and not value.strip()
    if value is None or value != value or empty:
        raise FedrotError(f"{place}: the value is missing")
    if isinstance(value, list | dict):
        raise FedrotError(f"{place}: must be a text or a number, got {value!r:.60}")
