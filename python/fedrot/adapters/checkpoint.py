"""Whole models on disk, in the layout of transformers: read the weights of one, write one."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from fedrot.adapters.adapter import Adapter, checked
from fedrot.adapters.folder import PROVENANCE, map_safetensors, read_json
from fedrot.errors import FedrotError
from fedrot.files import new_folder

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
# Of a model's folder, what is not copied beside its merged weights: those of other formats.
WEIGHT_FILES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".index.json"),
    *(".gguf", ".onnx", ".ot", ".tflite"),
)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder holds a model's configuration; its weights may be missing."""
    return (path / CONFIG).is_file()


def read_checkpoint(path: Path) -> Adapter:
    """The parameters of a model, mapped from `model.safetensors` or the shards that its index
    names, and its configuration.

    Raises:
        FedrotError: naming the folder where a file is missing or corrupt, the weights are
            quantised, or as `checked`.
    """
    config, digest = read_json(path / CONFIG)
    if "quantization_config" in config:
        raise FedrotError(
            f"{path}: {CONFIG} has a quantization_config, and packed weights have no mean; "
            "dequantize and save the model first"
        )
    tensors: dict[str, Tensor] = {}
    digests = {CONFIG: digest}
    mapped = []
    for name in _weight_files(path):
        file = path / name
        if not file.is_file():
            raise FedrotError(_missing(path, name))
        found, digests[name], file_as_it_was = map_safetensors(file)
        mapped.append(file_as_it_was)
        tensors.update(found)
    adapter = checked(str(path), None, tensors, path=path)
    return replace(adapter, config=config, sha256=digests, mapped=tuple(mapped))


def write_checkpoint(
    output: Path, like: Path, tensors: Mapping[str, Tensor], provenance: Mapping[str, Any]
) -> None:
    """Write a model whole or not at all: these weights beside the other files (not folders) of the
    folder `like`, its configuration and tokenizer among them."""
    with new_folder(output) as fresh:
        for file in sorted(like.iterdir()):
            if file.is_file() and not file.name.endswith(WEIGHT_FILES):
                shutil.copyfile(file, fresh / file.name)
        save_file(dict(tensors), fresh / WEIGHTS, metadata={"format": "pt"})
        (fresh / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n")


def _weight_files(path: Path) -> list[str]:
    if (path / WEIGHTS).is_file() or not (path / INDEX).is_file():
        return [WEIGHTS]
    shards = read_json(path / INDEX)[0].get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise FedrotError(f"{path / INDEX}: not the index of a model's shards")
    return sorted(set(shards.values()))


def _missing(path: Path, name: str) -> str:
    if (path / "pytorch_model.bin").is_file():
        return (
            f"{path}: only pytorch_model.bin, a pickle that could run code when read; load the "
            f"model and save_pretrained() it again to get {WEIGHTS}"
        )
    return (
        f"{path}: adapter_config.json and {name} are missing, so this is neither a PEFT adapter "
        "folder nor a model's"
    )
