"""Models and data sets of the Hugging Face hub: a folder, then the cache, then the hub itself.

What is missing is one line within two seconds: transformers alone retries for half a minute where
there is no network. Data files are read where the hub keeps them (Parquet, JSONL, CSV), so that
a folder copied by hand, the cache and a download are one case; `datasets` is not needed.
"""

from __future__ import annotations

import csv
import gzip
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedrot.errors import FedrotError

PATIENCE = 1.2  # seconds for the hub to answer anything at all
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
DATA_SUFFIXES = (".parquet", ".jsonl", ".json", ".jsonl.gz", ".csv")

Columns = dict[str, list[Any]]


def model_folder(name: str, key: str = "task.model") -> Path:
    """The transformers folder of a model: a path, or a repository of the hub.

    Raises:
        FedrotError: it is neither here nor within reach; the message says how to get it.
    """
    return _find(name, key, "model", MODEL_FILES)


def data_folder(name: str, key: str = "task.data", files: Sequence[str] = ("*",)) -> Path:
    """The folder of a data set, likewise; of a repository only ``files`` (glob patterns)."""
    return _find(name, key, "dataset", files)


def _find(name: str, key: str, kind: str, files: Sequence[str]) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        if kind == "model" and not _complete(folder, kind, files):
            raise FedrotError(f"{key}: {folder} must hold config.json and the model's weights")
        return folder
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise FedrotError(f"{key}: there is no folder {name}")
    return _cached(name, kind, files) or _download(name, key, kind, files)


def _cached(name: str, kind: str, files: Sequence[str]) -> Path | None:
    """The snapshot in the cache, if all of it is there; never asks the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, repo_type=kind, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return folder if _complete(folder, kind, files) else None


def _complete(folder: Path, kind: str, files: Sequence[str]) -> bool:
    """Whether a folder holds a model's weights, or each kind of data file; a snapshot of the cache
    may hold the configuration alone."""
    if kind == "dataset":
        return all(any(folder.glob(pattern)) for pattern in files)
    if not (folder / "config.json").is_file():
        return False
    for weights in WEIGHTS:
        index = folder / f"{weights}.index.json"
        if index.is_file():
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return all((folder / shard).is_file() for shard in shards)
    return any((folder / weights).is_file() for weights in WEIGHTS)


def _download(name: str, key: str, kind: str, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    option = f" --repo-type dataset{_include(files)}" if kind == "dataset" else ""
    advice = (
        f"fetch it with `hf download {name}{option}`, give a folder as {key}=PATH, or train "
        "--task digits or --task strings, which need none"
    )
    if HF_HUB_OFFLINE:
        raise FedrotError(f"{name} is not in the cache and HF_HUB_OFFLINE is set; {advice}")
    if not _answers(ENDPOINT):
        raise FedrotError(f"{name} is not in the cache and {ENDPOINT} does not answer; {advice}")
    try:
        return Path(snapshot_download(name, repo_type=kind, allow_patterns=list(files)))
    except Exception as error:  # of the hub, of the network, of the disk: as varied as their causes
        reason = str(error).strip().splitlines()[0]
        raise FedrotError(f"{name} cannot be downloaded ({reason}); {advice}") from error


def _include(files: Sequence[str]) -> str:
    return "".join(f" --include '{pattern}'" for pattern in files if pattern != "*")


def _answers(endpoint: str) -> bool:
    """Whether the hub says anything, through the proxy that the environment names."""
    found: list[bool] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(endpoint, method="HEAD")
            urllib.request.urlopen(request, timeout=PATIENCE).close()
        except urllib.error.HTTPError:
            pass  # an answer too
        except (OSError, ValueError):
            return
        found.append(True)

    # A thread, as no time limit reaches a name server that does not answer.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE)
    return bool(found)


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
