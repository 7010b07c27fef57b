"""The LoRA factors of one adapter."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, repr=False)
class Factors:
    """LoRA factors by module name: ``A[name]`` ``(r, k)`` and ``B[name]`` ``(d, r)``.

    Both dictionaries have the same keys in the same order. All factors that meet in one call
    must be on one scaling (``lora_alpha / r`` or ``lora_alpha / sqrt(r)``).
    """

    A: dict[str, Tensor]
    B: dict[str, Tensor]

    def __post_init__(self) -> None:
        if list(self.A) != list(self.B):
            raise ValueError(f"A and B must name the same layers: {list(self.A)}, {list(self.B)}")
        for side, factors in (("A", self.A), ("B", self.B)):
            for module, t in factors.items():
                if not isinstance(t, Tensor):
                    raise TypeError(f"{side}[{module!r}] must be a tensor, got {type(t).__name__}")

    def __repr__(self) -> str:
        """Without the values, which are many."""
        ranks = sorted({A.shape[0] for A in self.A.values() if A.dim()})
        of = f" of rank {', '.join(map(str, ranks))}" if ranks else ""
        return f"Factors({len(self.A)} layers{of})"


def check_factors(value: object, name: str) -> Factors:
    """``value``, if it is such; a state dict, which people have at hand, is not.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, Factors):
        raise TypeError(f"{name} must be fedrot.factors.Factors, got {type(value).__name__}")
    return value


def by_name(error: Exception, layers: Sequence[str]) -> Exception:
    """An operator's error, which counts layers, with their names; another as it is."""

    def layer(match: re.Match[str]) -> str:
        return f"layer {layers[int(match[1])]}"

    text, found = re.subn(r"\blayer (\d+)\b", layer, str(error))
    return type(error)(text) if found else error


@contextmanager
def naming_layers(like: Factors) -> Iterator[None]:
    """Errors of the operators, with the layers' names."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if (named := by_name(error, list(like.A))) is error:
            raise
        raise named from error


def client_major(clients: Sequence[Factors]) -> tuple[list[Tensor], list[Tensor]]:
    """The ``N * L`` tensors ``lora_A`` and ``lora_B`` that ``torch.ops.fedrot`` takes.

    Raises:
        ValueError: a client's layers differ from the first client's.
    """
    if not clients:
        raise ValueError("uploads must hold at least one client")
    layers = list(clients[0].A)
    for i, client in enumerate(clients):
        if list(client.A) != layers:
            raise ValueError(f"client {i} has layers {list(client.A)}, client 0 has {layers}")
    return (
        list(chain.from_iterable(c.A.values() for c in clients)),
        list(chain.from_iterable(c.B.values() for c in clients)),
    )


HUGE = 2.0**50  # float32 has squares of this, and sums of them


def largest(factors: Factors) -> float:
    """The largest magnitude of any value; 0 where there is none."""
    sizes = [
        t.abs().amax().double() for t in (*factors.A.values(), *factors.B.values()) if t.numel()
    ]
    return float(torch.stack(sizes).amax()) if sizes else 0.0


def within_range(factors: Factors) -> Factors:
    """The factors, scaled down as a whole where values lie beyond ``HUGE``: directions, and so
    rotations, stay what they are."""
    size = largest(factors)
    if not HUGE < size < math.inf:
        return factors
    scale = 2.0 ** (math.frexp(HUGE)[1] - math.frexp(size)[1])  # which rounds nothing
    return Factors(
        {module: (t * scale).to(t.dtype) for module, t in factors.A.items()},
        {module: (t * scale).to(t.dtype) for module, t in factors.B.items()},
    )


def rank_of(factors: Factors) -> int:
    """The largest rank of a layer."""
    return max(A.shape[0] for A in factors.A.values())


def truncate(factors: Factors, rank: int | None) -> Factors:
    """The first ``rank`` rows of every ``A`` and columns of every ``B``; all for ``None``."""
    if rank is None:
        return factors
    return Factors(
        {module: A[:rank] for module, A in factors.A.items()},
        {module: B[:, :rank] for module, B in factors.B.items()},
    )


def padded(factors: Factors, rank: int) -> Factors:
    """Zero rows of ``A`` and columns of ``B`` up to ``rank``: the product stays."""
    return resized(factors, dict.fromkeys(factors.A, rank))


def resized(factors: Factors, ranks: Mapping[str, int]) -> Factors:
    """Every layer of its own of these ranks: padded with zeros, or cut to the first rows of ``A``
    and columns of ``B``."""
    return Factors(
        {module: pad(A, (0, 0, 0, ranks[module] - A.shape[0])) for module, A in factors.A.items()},
        {module: pad(B, (0, ranks[module] - B.shape[1])) for module, B in factors.B.items()},
    )
