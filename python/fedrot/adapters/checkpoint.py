"""Whole models on disk, in the layout of transformers: read the weights of one, write one."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from fedrot.adapters.adapter import Adapter, checked
from fedrot.adapters.folder import PROVENANCE
from fedrot.errors import FedrotError
from fedrot.files import new_folder

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
# Of a model's folder, what is not copied beside its merged weights: those of other formats.
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".index.json", ".gguf")


def is_checkpoint(path: Path) -> bool:
    """Whether a folder holds a model's configuration; its weights may be missing."""
    return (path / CONFIG).is_file()


def read_checkpoint(path: Path) -> Adapter:
    """The parameters of a model, from `model.safetensors` or the shards that its index names.

    Raises:
        FedrotError: naming the folder where a file is missing or corrupt, or as `checked`.
    """
    tensors: dict[str, Tensor] = {}
    digests = {}
    for name in _weight_files(path):
        file = path / name
        if not file.is_file():
            raise FedrotError(
                f"{path}: adapter_config.json and {name} are missing, so this is neither a PEFT "
                "adapter folder nor a model's"
            )
        data = file.read_bytes()
        digests[name] = hashlib.sha256(data).hexdigest()
        try:
            tensors.update(load(data))
        except SafetensorError as error:
            raise FedrotError(f"{file}: corrupt or not a safetensors file ({error})") from error
    return replace(checked(str(path), None, tensors, path=path), sha256=digests)


def write_checkpoint(
    output: Path, like: Path, tensors: Mapping[str, Tensor], provenance: Mapping[str, Any]
) -> None:
    """Write a model whole or not at all: these weights beside the other files of the folder `like`,
    its configuration and tokenizer among them."""
    with new_folder(output) as fresh:
        for file in sorted(like.iterdir()):
            if file.is_file() and not file.name.endswith(WEIGHT_FILES):
                shutil.copyfile(file, fresh / file.name)
        save_file(dict(tensors), fresh / WEIGHTS, metadata={"format": "pt"})
        (fresh / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n")


def _weight_files(path: Path) -> list[str]:
    if (path / WEIGHTS).is_file() or not (path / INDEX).is_file():
        return [WEIGHTS]
    try:
        index = json.loads((path / INDEX).read_text())
        return sorted(set(index["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise FedrotError(f"{path / INDEX}: not the index of a model's shards ({error})") from error
