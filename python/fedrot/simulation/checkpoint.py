"""Where an interrupted run goes on: the finished rounds and the global factors, in one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedrot.errors import FedrotError
from fedrot.factors import Factors
from fedrot.files import new_file


@dataclass(frozen=True)
class Checkpoint:
    """State after ``rounds`` finished rounds."""

    rounds: int
    factors: Factors


def save(path: Path, state: Checkpoint) -> None:
    tensors: dict[str, Tensor] = {}
    for module, A in state.factors.A.items():
        tensors[f"A/{module}"] = A.contiguous()
        tensors[f"B/{module}"] = state.factors.B[module].contiguous()
    with new_file(path) as fresh:
        save_file(tensors, fresh, metadata={"rounds": str(state.rounds)})


def load(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        FedrotError: the file is corrupt.
    """
    try:
        with safe_open(path, "pt") as file:
            rounds = int(file.metadata()["rounds"])
            A = {k[2:]: file.get_tensor(k) for k in file.keys() if k.startswith("A/")}  # noqa: SIM118
            return Checkpoint(rounds, Factors(A, {m: file.get_tensor(f"B/{m}") for m in A}))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise FedrotError(f"{path}: corrupt checkpoint ({error}); --force starts again") from error
