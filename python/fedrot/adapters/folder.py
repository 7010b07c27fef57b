"""PEFT adapter folders: read one, write one; never a base model."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from fedrot.adapters.adapter import Adapter, Mapped, checked
from fedrot.adapters.config import Config
from fedrot.adapters.kinds import kind_of
from fedrot.errors import FedrotError
from fedrot.files import new_folder

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
PROVENANCE = "fedrot_provenance.json"


def read_adapter(path: Path) -> Adapter:
    """Read and check a PEFT folder (`adapter_config.json`, `adapter_model.safetensors`).

    Raises `FedrotError` naming the folder where a file is missing or corrupt, the adapter
    cannot be merged, a key is unknown, or a tensor holds a non-finite value.
    """
    path = Path(path)
    if not path.is_dir():
        raise FedrotError(f"{path}: no such folder")
    config, of_config = _read_config(path)
    kind_of(config, str(path))  # checks it, before its weights are read
    tensors, of_weights = _read_weights(path)
    adapter = checked(str(path), config, tensors, path=path)
    return replace(adapter, sha256={CONFIG: of_config, WEIGHTS: of_weights})


def check_output(output: Path, inputs: Iterable[Path], force: bool) -> None:
    """Raise `FedrotError` where writing `output` could destroy an input or a foreign folder."""
    target = output.resolve()
    for path in inputs:
        source = path.resolve()
        if target == source or target in source.parents:
            raise FedrotError(f"{output}: the output would replace the input {path}")
    if not os.path.lexists(output):
        return
    if not force:
        raise FedrotError(f"{output} exists; --force replaces it")
    replaceable = any((output / name).is_file() for name in (CONFIG, PROVENANCE))
    if output.is_symlink() or not replaceable:
        raise FedrotError(f"{output} is not an adapter folder; --force replaces only those")


def write_adapter(
    output: Path, config: Config, tensors: Mapping[str, Tensor], provenance: Mapping[str, Any]
) -> None:
    """Write a PEFT folder whole or not at all.

    It is written next to `output` and renamed; an old `output` goes once the new one is there.
    """
    with new_folder(output) as fresh:
        save_file(dict(tensors), fresh / WEIGHTS, metadata={"format": "pt"})
        (fresh / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (fresh / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n")


def _read_config(path: Path) -> tuple[Config, str]:
    """The configuration, and the SHA-256 of its file."""
    file = path / CONFIG
    if not file.is_file():
        raise FedrotError(f"{path}: {CONFIG} is missing, so this is not a PEFT adapter folder")
    return read_json(file)


def _read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors, and the SHA-256 of their file."""
    file = path / WEIGHTS
    if not file.is_file():
        if (path / PICKLED_WEIGHTS).is_file():
            raise FedrotError(
                f"{path}: only {PICKLED_WEIGHTS}, a pickle that could run code when read; "
                f"load it with PEFT and save_pretrained() it again to get {WEIGHTS}"
            )
        raise FedrotError(f"{path}: {WEIGHTS} is missing")
    return read_safetensors(file)


def read_json(file: Path) -> tuple[dict[str, Any], str]:
    """A JSON object, and the SHA-256 of the file; `FedrotError` naming it where it holds none."""
    data = file.read_bytes()
    try:
        content = json.loads(data.decode("utf-8"))
    except ValueError as error:
        raise FedrotError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise FedrotError(f"{file}: must hold a JSON object, got {type(content).__name__}")
    return content, hashlib.sha256(data).hexdigest()


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors, and the SHA-256 of the file."""
    data = file.read_bytes()
    with _corrupt_is_named(file):
        return load(data), hashlib.sha256(data).hexdigest()


def map_safetensors(file: Path) -> tuple[dict[str, Tensor], str, Mapped]:
    """The same of a file that may not fit into memory: its tensors are read when they are used,
    after which `Mapped.check` says whether the file is still what its SHA-256 is of."""
    mapped = Mapped.of(file)
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while data := opened.read(1 << 24):
            digest.update(data)
    with _corrupt_is_named(file):
        tensors = load_file(file)
    return tensors, digest.hexdigest(), mapped


@contextmanager
def _corrupt_is_named(file: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise FedrotError(f"{file}: corrupt or not a safetensors file ({error})") from error
