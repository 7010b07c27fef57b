"""Files that are there whole or not at all, and errors that name them."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary name to write; it becomes ``path`` when the block ends without an error."""
    fresh = path.with_name(f".{path.name}.new-{os.getpid()}")
    with _named(fresh, path):
        fresh.touch()
        readable = fresh.stat().st_mode  # safetensors makes its files private
        fresh.unlink()
        try:
            yield fresh
            fresh.chmod(readable)
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill; it replaces ``path`` when the block ends without an error."""
    path = path.absolute()
    fresh = path.with_name(f".{path.name}.new-{os.getpid()}")
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    with _named(fresh, path):
        fresh.mkdir(parents=True)
        try:
            yield fresh
            # safetensors makes its files private; these are as readable as any new file.
            for file in (f for f in fresh.iterdir() if f.is_file()):
                file.chmod(fresh.stat().st_mode & 0o666)
            _swap_in(fresh, path, old)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def is_left(path: Path) -> bool:
    """Whether this is a temporary name of :func:`new_file` or :func:`new_folder`, which only a
    process that was killed leaves."""
    return bool(re.fullmatch(r"\..+\.(new|old)-\d+", path.name))


def left_behind(folder: Path) -> list[Path]:
    """All of that in ``folder`` and below it."""
    return [path for path in folder.rglob(".*") if is_left(path)]


def remove(paths: Iterable[Path]) -> None:
    """Files and folders, if they are there."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def _named(fresh: Path, path: Path) -> Iterator[None]:
    """What the system refuses is an ``OSError`` that names ``path``, not the temporary name.

    safetensors has an error of its own, which is no ``OSError``, even for a full disk.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error.filename, str):
            error.filename = error.filename.replace(str(fresh), str(path))
        raise
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def _swap_in(fresh: Path, path: Path, old: Path) -> None:
    """Put ``fresh`` in the place of ``path``, which waits as ``old`` until that has worked."""
    if not path.exists():
        fresh.rename(path)
        return
    path.rename(old)
    try:
        fresh.rename(path)
    except BaseException:
        old.rename(path)
        raise


def write_bytes(path: Path, content: bytes) -> None:
    with new_file(path) as fresh:
        fresh.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    with new_file(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
