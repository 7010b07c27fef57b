"""Base models that a task makes itself, kept as transformers folders."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn


def cache_folder() -> Path:
    """``$FEDROT_CACHE``, or ``~/.cache/fedrot``."""
    return Path(os.environ.get("FEDROT_CACHE") or Path.home() / ".cache" / "fedrot")


def made_by() -> dict[str, str]:
    """The libraries that a model's weights depend on."""
    return {name: version(name) for name in ("torch", "transformers")}


def cached(
    task: str, key: dict[str, Any], make: Callable[[], tuple[nn.Module, dict[str, Any]]]
) -> Path:
    """The transformers folder of ``key``, made where it is missing, whole or not at all.

    ``make`` gives the model and what is to be known about it, which :func:`facts` reads again.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder() / f"{task}-{key['part']}-{digest}"
    if folder.is_dir():
        return folder
    model, known = make()
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.with_name(f".{folder.name}.new-{os.getpid()}")
    try:
        with quiet():
            model.save_pretrained(fresh)  # type: ignore[operator]
        (fresh / "pretraining.json").write_text(json.dumps({**known, "key": key}, indent=2) + "\n")
        try:
            fresh.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def facts(folder: Path) -> dict[str, Any]:
    """What :func:`cached` was told about a model."""
    return json.loads((folder / "pretraining.json").read_text())


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and its word about a head that is new."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
