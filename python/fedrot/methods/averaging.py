"""Methods that average factors: FedIT, FFA-LoRA, RoLoRA, HetLoRA, FedSA-LoRA.

A client of smaller rank starts from the first rows of ``A`` and columns of ``B``, and enters the
average padded with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedrot.factors import Factors, rank_of, truncate
from fedrot.methods.base import Method, Server, average, normalised, wide


@dataclass(frozen=True)
class FedIT(Method):
    """``A = sum_i w_i A_i``, ``B = sum_i w_i B_i`` (arXiv 2305.05644)."""

    name: ClassVar[str] = "FedIT"

    def aggregate(
        self,
        uploads: Sequence[Factors],
        reference: Factors,
        weights: Tensor | None = None,
        *,
        round: int = 1,
        generator: torch.Generator | None = None,
    ) -> Factors:
        return average(uploads, reference, weights)


@dataclass(frozen=True)
class FFALoRA(Method):
    """``A`` stays as it was drawn; clients train and send ``B`` (arXiv 2403.12313).

    With one ``A``, the mean of ``B`` is exact: ``mean(B_i) A = mean(B_i A)``.
    """

    name: ClassVar[str] = "FFA-LoRA"
    same_A: ClassVar[bool] = True

    def parts(self, round: int) -> str:
        return "B"

    def aggregate(
        self,
        uploads: Sequence[Factors],
        reference: Factors,
        weights: Tensor | None = None,
        *,
        round: int = 1,
        generator: torch.Generator | None = None,
    ) -> Factors:
        return Factors(reference.A, average(uploads, reference, weights).B)


@dataclass(frozen=True)
class RoLoRA(Method):
    """``B`` and ``A`` are trained and averaged in turn, ``B`` first: while ``B`` is zero, ``A``
    has no gradient (arXiv 2409.02346). Exact in every round, as FFA-LoRA."""

    name: ClassVar[str] = "RoLoRA"
    same_A: ClassVar[bool] = True

    def parts(self, round: int) -> str:
        return "A" if round % 2 else "B"

    def aggregate(
        self,
        uploads: Sequence[Factors],
        reference: Factors,
        weights: Tensor | None = None,
        *,
        round: int = 1,
        generator: torch.Generator | None = None,
    ) -> Factors:
        mean = average(uploads, reference, weights)
        if self.parts(round) == "A":
            return Factors(mean.A, reference.B)
        return Factors(reference.A, mean.B)


@dataclass(frozen=True)
class HetLoRA(Method):
    """Zero-padding average of mixed ranks, which clients prune themselves (arXiv 2401.06432).

    The *tail* of a client of rank ``r`` is what ``int(decay r)`` leaves of it, at least one
    direction being kept: ``sum_layers ||B_tail||_F ||A_tail||_F``. Clients add ``penalty`` times it
    to their losses, and one whose tail has become smaller in a round cuts it off for good;
    ``decay=1`` is without pruning. ``norm_weights``: a client counts in proportion to
    ``||B_i A_i||_F`` over all layers, on top of its weight, so that small or empty updates do not
    dilute the others.
    """

    name: ClassVar[str] = "HetLoRA"

    norm_weights: bool = True
    decay: float = 0.99
    penalty: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be above 0 and at most 1, got {self.decay}")
        if not 0 <= self.penalty < float("inf"):
            raise ValueError(f"penalty must be 0 or above, got {self.penalty}")

    @classmethod
    def takes(cls, given: Mapping[str, Any]) -> set[str]:
        return super().takes(given) - ({"penalty"} if given.get("decay") == 1 else set())

    @property
    def prunes(self) -> bool:
        return self.decay < 1

    def regularizer(
        self, A: Mapping[str, Tensor], B: Mapping[str, Tensor], ranks: Sequence[int]
    ) -> Tensor | None:
        if not (self.prunes and self.penalty):
            return None
        tails = [
            _tail([(A[m][i], B[m][i]) for m in A], self._kept(rank)) for i, rank in enumerate(ranks)
        ]
        return self.penalty * torch.stack(tails)

    def hand_in(self, start: Factors, trained: Factors) -> Factors:
        kept = self._kept(rank_of(trained))
        before, after = (_tail([(f.A[m], f.B[m]) for m in f.A], kept) for f in (start, trained))
        return truncate(trained, kept) if after < before else trained

    def _kept(self, rank: int) -> int:
        return max(1, int(self.decay * rank + 1e-9))  # .29 * 100 is a little less than 29

    def aggregate(
        self,
        uploads: Sequence[Factors],
        reference: Factors,
        weights: Tensor | None = None,
        *,
        round: int = 1,
        generator: torch.Generator | None = None,
    ) -> Factors:
        if self.norm_weights:
            norms = torch.tensor([_norm(u) for u in uploads], dtype=torch.float64)
            products = normalised(weights, len(uploads)) * norms
            if products.sum() > 0:
                weights = products.to(next(iter(reference.A.values())).device)
        return average(uploads, reference, weights)


@dataclass(frozen=True)
class FedSALoRA(Method):
    """``A`` is averaged, every client keeps its ``B`` over the rounds (arXiv 2410.01463).

    The global ``B``, the mean, only serves who wants one adapter; clients never start from it. A
    client that takes part for the first time starts from ``B = 0``.
    """

    name: ClassVar[str] = "FedSA-LoRA"
    personal: ClassVar[bool] = True

    def download(self, server: Server, client: int, rank: int | None = None) -> Factors:
        start = truncate(server.factors, rank)
        zero = {module: torch.zeros_like(B) for module, B in start.B.items()}
        return Factors(start.A, server.personal.get(client, zero))

    def aggregate(
        self,
        uploads: Sequence[Factors],
        reference: Factors,
        weights: Tensor | None = None,
        *,
        round: int = 1,
        generator: torch.Generator | None = None,
    ) -> Factors:
        return average(uploads, reference, weights)


def _tail(layers: Sequence[tuple[Tensor, Tensor]], kept: int) -> Tensor:
    """``sum_layers ||B_tail||_F ||A_tail||_F`` of one client's ``A`` ``(r, k)`` and ``B``
    ``(d, r)``: of its directions from ``kept`` on."""
    return torch.stack([B[:, kept:].norm() * A[kept:].norm() for A, B in layers]).sum()


def _norm(factors: Factors) -> float:
    """``||B A||_F`` over all layers, by ``<B^T B, A A^T>``."""
    squares = [
        (wide(B).mT @ wide(B) * (wide(factors.A[module]) @ wide(factors.A[module]).mT)).sum()
        for module, B in factors.B.items()
    ]
    return max(float(sum(squares)), 0.0) ** 0.5
