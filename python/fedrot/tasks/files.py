"""Data sets as the files in which they come: Parquet, JSONL, JSON, CSV, wherever they were found.

`datasets` is not needed: a folder copied by hand, the cache and a download of the hub are one case.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedrot.errors import FedrotError

DATA_SUFFIXES = (".parquet", ".jsonl", ".json", ".jsonl.gz", ".csv")

Columns = dict[str, list[Any]]


def read_part(folder: Path, part: str) -> Columns:
    """The columns of all data files under ``folder`` in whose relative path ``part`` occurs."""
    files = sorted(
        file
        for file in folder.rglob("*")
        if part in str(file.relative_to(folder)) and file.name.endswith(DATA_SUFFIXES)
    )
    if not files:
        raise FedrotError(
            f"{folder} holds no {part} part: a file with {part!r} in its name and one of the "
            f"endings {' '.join(DATA_SUFFIXES)}"
        )
    read = [read_file(file) for file in files]
    shared = [name for name in read[0] if all(name in columns for columns in read)]
    return {name: [value for columns in read for value in columns[name]] for name in shared}


def read_file(file: Path) -> Columns:
    """The columns of a Parquet, JSONL, JSON (a list of objects) or CSV file with a header."""
    name = file.name.removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            return _read_parquet(file)
        opened = gzip.open if file.name.endswith(".gz") else open
        with opened(file, "rt", encoding="utf-8", newline="") as text:
            if name.endswith(".csv"):
                rows = list(csv.DictReader(text))
            elif name.endswith(".json"):
                content = text.read()
                listed = content.lstrip().startswith("[")
                rows = json.loads(content) if listed else _json_lines(content.splitlines())
            else:
                rows = _json_lines(text)
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise FedrotError(f"{file} cannot be read: {error}") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise FedrotError(f"{file} must hold rows with named columns")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _json_lines(lines: Any) -> list[Any]:
    return [json.loads(line) for line in lines if line.strip()]


def _read_parquet(file: Path) -> Columns:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise FedrotError(
            f"{file.name} is a Parquet file: pip install 'fedrot[hub]' (pyarrow) reads it"
        ) from error
    try:
        return parquet.read_table(file).to_pydict()
    except ArrowException as error:
        raise FedrotError(f"{file} cannot be read: {error}") from error


def column(columns: Columns, names: Sequence[str], where: str) -> list[Any]:
    """The first of ``names`` that there is."""
    for name in names:
        if name in columns:
            return columns[name]
    raise FedrotError(
        f"{where} has no column {' or '.join(names)}; it has {', '.join(columns) or 'none'}"
    )
