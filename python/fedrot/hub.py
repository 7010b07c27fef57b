"""Models and data sets of the Hugging Face hub: a folder, then the cache, then the hub itself.

What is missing is one line within two seconds of the start: transformers alone retries for half a
minute where there is no network. So nothing here imports torch, and :func:`look_for` comes before
what does.
"""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedrot.errors import FedrotError, first_line

PATIENCE = 1.0  # seconds for the hub to answer anything at all
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")


@dataclass(frozen=True)
class Source:
    """Repositories of a task: its model, its data, and which files of the data."""

    model: str = ""
    data: str = ""
    files: tuple[str, ...] = ("*",)


ROBERTA, LLAMA, GLUE = "FacebookAI/roberta-large", "meta-llama/Meta-Llama-3-8B", "nyu-mll/glue"
SOURCES = {
    **{
        name: Source(ROBERTA, GLUE, (f"{name}/*",))
        for name in ("sst2", "qnli", "qqp", "rte", "mnli")
    },
    "gsm8k": Source(LLAMA, "openai/gsm8k", ("main/*",)),
    "codesearchnet": Source(LLAMA, "code-search-net/code_search_net"),
    "text": Source(),  # the user names both
}


def look_for(task: Any) -> None:
    """Whether the model and data of a task's options (a mapping, as given) are here or could be
    downloaded; nothing is downloaded yet. What is wrong otherwise is found later.

    Raises:
        FedrotError: they are neither here nor within reach; the message says how to get them.
    """
    if not isinstance(task, Mapping) or task.get("name") not in SOURCES:
        return
    source = SOURCES[task["name"]]
    for key, kind, default, files in (
        ("model", "model", source.model, MODEL_FILES),
        ("data", "dataset", source.data, source.files),
    ):
        name = task.get(key, default)
        if not isinstance(name, str) or not name or Path(name).expanduser().is_file():
            continue
        if _here(name, f"task.{key}", kind, files) is None:
            _check_reach(name, f"task.{key}", kind, files)


def model_folder(name: str) -> Path:
    """The transformers folder of a model: a path, or a repository of the hub.

    Raises:
        FedrotError: it is neither here nor within reach; the message says how to get it.
    """
    return _find(name, "task.model", "model", MODEL_FILES)


def data_folder(name: str, key: str = "task.data", files: Sequence[str] = ("*",)) -> Path:
    """The folder of a data set, likewise; of a repository only ``files`` (glob patterns)."""
    return _find(name, key, "dataset", files)


def _find(name: str, key: str, kind: str, files: Sequence[str]) -> Path:
    return _here(name, key, kind, files) or _download(name, key, kind, files)


def _here(name: str, key: str, kind: str, files: Sequence[str]) -> Path | None:
    """The folder, or the snapshot in the cache."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if kind == "model" and not _complete(folder, kind, files):
            raise FedrotError(f"{key}: {folder} must hold config.json and the model's weights")
        return folder
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        wanted = "folder" if kind == "model" else "file or folder"
        raise FedrotError(f"{key}: there is no {wanted} {name}")
    return _cached(name, kind, files)


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

    _check_reach(name, key, kind, files)
    try:
        return Path(snapshot_download(name, repo_type=kind, allow_patterns=list(files)))
    except Exception as error:  # of the hub, of the network, of the disk: as varied as their causes
        reason = first_line(error)
        advice = _advice(name, key, kind, files)
        raise FedrotError(f"{name} cannot be downloaded ({reason}); {advice}") from error


def _check_reach(name: str, key: str, kind: str, files: Sequence[str]) -> None:
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    advice = _advice(name, key, kind, files)
    if HF_HUB_OFFLINE:
        raise FedrotError(f"{name} is not in the cache and HF_HUB_OFFLINE is set; {advice}")
    if not _answers(ENDPOINT):
        raise FedrotError(f"{name} is not in the cache and {ENDPOINT} does not answer; {advice}")


def _advice(name: str, key: str, kind: str, files: Sequence[str]) -> str:
    option = f" --repo-type dataset{_include(files)}" if kind == "dataset" else ""
    return (
        f"fetch it with `hf download {name}{option}`, give a folder as {key}=PATH, or train "
        "--task digits or --task strings, which need none"
    )


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
