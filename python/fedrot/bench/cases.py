"""Problems of the sizes that people have, and their inputs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedrot.bench.baselines import det_sign

Factors = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Case:
    """One call of ``align_aggregate``; ``shapes`` are ``(d, k)`` of each adapted layer."""

    name: str
    clients: int
    rank: int
    shapes: tuple[tuple[int, int], ...]
    dtype: torch.dtype = torch.float32
    align: str = "A"  # as in the odd rounds of the paper; "joint" is the operator's default
    lam: float = 0.4

    @property
    def options(self) -> dict[str, Any]:
        return {"lam": self.lam, "align": self.align}

    @property
    def elements(self) -> int:
        """``N r (d + k)`` summed over the layers: every client factor once."""
        return self.clients * self.rank * sum(d + k for d, k in self.shapes)

    @property
    def bytes(self) -> int:
        """Read once: the least that any form must move."""
        return self.elements * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """``2 r`` per element for each term of ``M``, and ``2 r`` per element for the apply."""
        per_layer = self.clients * self.rank * 2 * self.rank
        term_A = per_layer * sum(k for _, k in self.shapes)
        term_B = per_layer * sum(d for d, _ in self.shapes)
        covariance = {"A": term_A, "B": term_B, "joint": term_A + term_B}[self.align]
        return term_A + term_B + (covariance if self.lam > 0 else 0)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def of(self, dtype: torch.dtype) -> Case:
        return replace(self, dtype=dtype)


ROBERTA_LARGE = ((1024, 1024),) * 48  # query and value of 24 layers
LLAMA_8B_QV = ((4096, 4096), (1024, 4096)) * 32
LLAMA_8B_LINEAR = (  # query, key, value, output, gate, up, down
    *((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)),
    *((14336, 4096), (14336, 4096), (4096, 14336)),
) * 32

CASES = (
    Case("roberta-large-r4-n10", 10, 4, ROBERTA_LARGE),
    Case("roberta-large-r4-n50", 50, 4, ROBERTA_LARGE),
    Case("llama-8b-qv-r8-n6", 6, 8, LLAMA_8B_QV),
    Case("llama-8b-qv-r16-n10", 10, 16, LLAMA_8B_QV),
    Case("llama-8b-qv-r32-n4", 4, 32, LLAMA_8B_QV),
    Case("llama-8b-qv-r64-n4", 4, 64, LLAMA_8B_QV),
)
SHORT = ("roberta-large-r4-n10", "llama-8b-qv-r8-n6", "llama-8b-qv-r16-n10", "llama-8b-qv-r64-n4")


def select(names: Sequence[str] | None) -> list[Case]:
    """The cases whose name contains one of ``names``; all for ``None``.

    Raises:
        ValueError: a name is in no case.
    """
    if names is None:
        return list(CASES)
    for name in names:
        if not any(name in case.name for case in CASES):
            known = ", ".join(case.name for case in CASES)
            raise ValueError(f"cases must name some of {known}; got {name!r}")
    return [case for case in CASES if any(name in case.name for name in names)]


def sweeps(short: bool = False) -> dict[str, list[tuple[str, Case]]]:
    """One size at a time, the others fixed: ``{sweep: [(value, case)]}``. Odd sizes stand
    between their neighbours, so that a cliff shows."""

    def case(clients: int = 10, rank: int = 8, layers: int = 8, d: int = 1024, k: int = 1024):
        return Case("sweep", clients, rank, ((d, k),) * layers)

    if short:
        return {
            "clients": [(str(n), case(clients=n, layers=2)) for n in (1, 10, 100, 500)],
            "rank": [(str(r), case(rank=r, clients=4, layers=4)) for r in (2, 4, 5, 16, 33, 64)],
        }
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    shapes = ((1024, 1024), (1024, 1023), (1023, 1024), (4096, 4096), (4097, 4096), (4097, 1023))
    ranks = (2, 3, 4, 5, 8, 16, 32, 33, 64, 128, 256)
    return {
        "clients": [(str(n), case(clients=n, layers=2)) for n in (1, 2, 3, 10, 30, 100, 300, 1000)],
        "rank": [(str(r), case(rank=r, clients=4, layers=4)) for r in ranks],
        "layers": [(str(n), case(layers=n)) for n in (1, 2, 8, 32, 128)],
        "width": [(str(n), case(d=n, k=n)) for n in (16, 64, 256, 1024, 4096, 8192)],
        "shape": [(f"{d}x{k}", case(d=d, k=k)) for d, k in shapes],
        "dtype": [
            (str(dtype).removeprefix("torch."), replace(case(), dtype=dtype)) for dtype in dtypes
        ],
    }


def factors(case: Case, device: str = "cpu", seed: int = 0) -> Factors:
    """``lora_A, lora_B, ref_A, ref_B``: each client is the reference in a basis of its own (a
    random rotation) plus noise. The reference's latent directions fall from 1 to 0.1 in size,
    which gives ``M`` a condition of about 100."""
    g = torch.Generator(device).manual_seed(seed)
    r = case.rank
    sizes = torch.logspace(0, -1, r, device=device)

    def to(t: Tensor) -> Tensor:
        return t.to(case.dtype)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=device)

    ref_A = [sizes[:, None] * normal(r, k) for _, k in case.shapes]
    ref_B = [normal(d, r) * sizes for d, _ in case.shapes]
    lora_A, lora_B = [], []
    for _ in range(case.clients):
        turns = torch.linalg.qr(normal(len(case.shapes), r, r)).Q
        turns[..., 0] *= det_sign(turns)[:, None]
        for Q, A, B in zip(turns, ref_A, ref_B, strict=True):
            lora_A.append(to((Q @ A).add_(normal(*A.shape), alpha=0.1)))
            lora_B.append(to((B @ Q.T).add_(normal(*B.shape), alpha=0.1)))
    return lora_A, lora_B, [to(A) for A in ref_A], [to(B) for B in ref_B]


def copies(inputs: Factors, size: int, total: int) -> list[Factors]:
    """``inputs`` of ``size`` bytes several times over, ``total`` bytes in all: called in turn,
    they are cold in cache each time. At least two; at most 64, enough for tiny ones."""
    count = min(64, max(2, math.ceil(total / size)))

    def clone(tensors: list[Tensor]) -> list[Tensor]:
        return [t.clone() for t in tensors]

    lora_A, lora_B, ref_A, ref_B = inputs
    clones = ((clone(lora_A), clone(lora_B), clone(ref_A), clone(ref_B)) for _ in itertools.count())
    return [inputs, *itertools.islice(clones, count - 1)]
