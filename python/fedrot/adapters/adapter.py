"""An adapter, checked, wherever it comes from: a folder, a model, a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedrot.adapters.config import Config
from fedrot.adapters.kinds import FULL, Kind, kind_of
from fedrot.adapters.layers import StateKeys, sort_keys
from fedrot.errors import FedrotError

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Mapped:
    """A file that is read when its tensors are used, and how it was when it was mapped."""

    file: Path
    stamp: tuple[int, ...]

    @staticmethod
    def of(file: Path) -> Mapped:
        found = file.stat()
        return Mapped(file, (found.st_ino, found.st_size, found.st_mtime_ns))

    def check(self) -> None:
        """Raise `FedrotError` where the file is no longer what it was."""
        if not self.file.exists() or Mapped.of(self.file) != self:
            raise FedrotError(f"{self.file}: changed while it was read")


@dataclass(frozen=True, repr=False)
class Adapter:
    """One adapter: where it comes from, its configuration, its tensors on the CPU."""

    source: str  # how errors call it: its folder, or its place among the arguments
    config: Config
    tensors: dict[str, Tensor]
    keys: StateKeys
    path: Path | None = None  # its folder, if it was read from one
    kind: Kind | None = None  # None: LoRA
    sha256: dict[str, str] | None = None  # of its files when they were read
    mapped: tuple[Mapped, ...] = ()  # files that tensors are in, as they were then

    def __repr__(self) -> str:
        """Without the values, which are many."""
        kind = self.kind.title if self.kind else "LoRA"
        return f"Adapter({self.source}: {kind}, {len(self.tensors)} tensors)"


def checked(
    source: str,
    config: Config | None,
    tensors: dict[str, Tensor],
    *,
    parameters: Mapping[str, str] | None = None,
    path: Path | None = None,
) -> Adapter:
    """The adapter, if it is of a kind that can be merged. No configuration: whole parameters.

    Raises:
        FedrotError: naming the source and what is wrong: the configuration cannot be merged, a key
            is unknown, a factor has another shape than it says, or a value is not finite.
    """
    kind = FULL if config is None else kind_of(config, source)
    config = config or {}
    if kind is None:
        keys = sort_keys(tensors, config, source, parameters)
    else:
        keys = kind.sort(tensors, config, source)
    _check_values(tensors, keys, source)
    return Adapter(source, config, tensors, keys, path, kind)


def _check_values(tensors: Mapping[str, Tensor], keys: StateKeys, source: str) -> None:
    for key, tensor in tensors.items():
        whole = key in keys.plain and not (tensor.is_floating_point() or tensor.is_complex())
        if tensor.dtype not in FLOATS and (not whole or tensor.dtype == torch.bool):
            raise FedrotError(
                f"{source}: {key!r} has dtype {tensor.dtype}, which cannot be averaged"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise FedrotError(f"{source}: {key!r} has non-finite values (NaN or infinity)")
