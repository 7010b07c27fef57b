"""Federated LoRA aggregation methods: small frozen objects, from uploads to global factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

import fedrot_kernels  # noqa: F401  (registers torch.ops.fedrot)
from fedrot.factors import Factors, client_major


class Method(Protocol):
    """What the server does with one round's uploads."""

    name: ClassVar[str]

    def aggregate(
        self,
        uploads: Sequence[Factors],
        reference: Factors,
        weights: Tensor | None = None,
        *,
        round: int = 1,
    ) -> Factors:
        """The new global factors.

        Args:
            uploads: one :class:`Factors` per client, the layers of ``reference``.
            reference: the global factors from which the clients started the round.
            weights: ``(N,)``, non-negative; ``None`` is uniform.
            round: number of the round, from 0.
        """
        ...


@dataclass(frozen=True)
class FedIT:
    """Factor-wise averaging: ``A = sum_i w_i A_i``, ``B = sum_i w_i B_i`` (arXiv 2305.05644)."""

    name: ClassVar[str] = "FedIT"

    def aggregate(
        self,
        uploads: Sequence[Factors],
        reference: Factors,
        weights: Tensor | None = None,
        *,
        round: int = 1,
    ) -> Factors:
        return _align_aggregate(uploads, reference, weights, 0.0, "joint", True)


@dataclass(frozen=True)
class FedRot:
    """Rotate each client toward the reference, then average (FedRot-LoRA, arXiv 2602.23638).

    ``align``: what the rotation is fitted to, ``"joint"``, ``"A"``, ``"B"``, or the paper's
    ``"alternate"``: round 0 unaligned, then A in odd and B in even rounds.
    """

    name: ClassVar[str] = "FedRot-LoRA"

    lam: float = 0.4
    align: str = "joint"
    proper: bool = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.lam <= 1.0:
            raise ValueError(f"lam must lie in [0, 1], got {self.lam}")
        if self.align not in ("joint", "A", "B", "alternate"):
            raise ValueError(f"align must be joint, A, B or alternate, got {self.align!r}")

    def aggregate(
        self,
        uploads: Sequence[Factors],
        reference: Factors,
        weights: Tensor | None = None,
        *,
        round: int = 1,
    ) -> Factors:
        lam, align = self.lam, self.align
        if align == "alternate":
            lam = 0.0 if round == 0 else lam
            align = "A" if round % 2 else "B"
        return _align_aggregate(uploads, reference, weights, lam, align, self.proper)


METHODS: dict[str, type[FedIT] | type[FedRot]] = {"fedit": FedIT, "fedrot": FedRot}


def _align_aggregate(
    uploads: Sequence[Factors],
    reference: Factors,
    weights: Tensor | None,
    lam: float,
    align: str,
    proper: bool,
) -> Factors:
    lora_A, lora_B = client_major(uploads)
    if list(uploads[0].A) != list(reference.A):
        raise ValueError(
            f"clients have layers {list(uploads[0].A)}, the reference has {list(reference.A)}"
        )
    A, B = torch.ops.fedrot.align_aggregate(
        lora_A,
        lora_B,
        list(reference.A.values()),
        list(reference.B.values()),
        weights,
        lam=lam,
        align=align,
        proper=proper,
    )
    return Factors(dict(zip(reference.A, A, strict=True)), dict(zip(reference.B, B, strict=True)))
