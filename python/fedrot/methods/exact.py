"""Methods that start from the exact average ``sum_i w_i B_i A_i``: FlexLoRA, FedEx-LoRA, FLoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fedrot.factors import Factors, resized
from fedrot.methods.base import Method, average, checked_weights, drawing, in_rspace, stacked
from fedrot.methods.energy import check_energy, rank_for, singular_values
from fedrot_kernels import rspace


@dataclass(frozen=True)
class FlexLoRA(Method):
    """The best rank-r approximation of ``sum_i w_i B_i A_i`` (arXiv 2402.11505).

    ``gauge="singular"``, as published: ``A`` has orthonormal rows, ``B`` carries the singular
    values; they are sorted, so a client of smaller rank starts from the best approximation of its
    own rank. ``gauge="reference"``: the same product, rotated to the reference and with its
    difference of norms, so that momentum and factors of clients that sat out still fit.

    Clients may have any rank; r is the reference's, in each layer. With ``energy``, in (0, 1], r is
    the smallest rank of the layer that holds this share of the squared singular values, and the
    reference's is its bound. As clients add directions of their own, it can rise again.

    ``dense`` forms the average, ``(d, k)``, and decomposes that, as published: the same result, to
    see what it costs. Else it is a QR of the factors side by side and a small SVD.
    """

    name: ClassVar[str] = "FlexLoRA"
    truncates: ClassVar[bool] = True

    gauge: str = "singular"
    energy: float | None = None
    dense: bool = False

    def __post_init__(self) -> None:
        if self.gauge not in ("singular", "reference"):
            raise ValueError(f"gauge must be singular or reference, got {self.gauge!r}")
        if self.energy is not None:
            check_energy(self.energy)
        if self.dense and self.gauge != "singular":
            raise ValueError(f"dense=true is for gauge=singular, got gauge={self.gauge}")

    @classmethod
    def takes(cls, given: Mapping[str, Any]) -> set[str]:
        singular = given.get("gauge", cls.gauge) == "singular"
        return super().takes(given) - (set() if singular else {"dense"})

    @property
    def steady_basis(self) -> bool:
        # Singular vectors turn and swap from round to round; a rank may go and come.
        return self.gauge == "reference" and not self.chooses_ranks

    @property
    def chooses_ranks(self) -> bool:
        return self.energy is not None

    def aggregate(
        self,
        uploads: Sequence[Factors],
        reference: Factors,
        weights: Tensor | None = None,
        *,
        round: int = 1,
        generator: torch.Generator | None = None,
    ) -> Factors:
        checked_weights(uploads, reference, weights)  # and the layers
        _check(uploads, reference)
        if self.energy is not None:
            bounds = {module: A.shape[0] for module, A in reference.A.items()}
            values = singular_values(uploads, weights)
            ranks = {m: min(rank_for(values[m], self.energy), r) for m, r in bounds.items()}
            reference = resized(reference, ranks)
        if self.gauge == "singular":
            return _singular(uploads, reference, weights, self.dense)
        largest = {m: max(u.A[m].shape[0] for u in uploads) for m in reference.A}
        if all(A.shape[0] == largest[m] for m, A in reference.A.items()):
            return in_rspace(uploads, reference, weights, rspace.truncation)
        # Gram blocks have the rank of the reference. A larger client does not fit in, and many
        # smaller ones fill them with zeros: let the truncation stand for all clients as one. In
        # float64, as its B carries all of the size, and Gram blocks hold squares.
        like = Factors(*({m: t.double() for m, t in f.items()} for f in (reference.A, reference.B)))
        one = in_rspace([_singular(uploads, like, weights)], like, None, rspace.truncation)
        return Factors(
            {m: one.A[m].to(A.dtype) for m, A in reference.A.items()},
            {m: one.B[m].to(B.dtype) for m, B in reference.B.items()},
        )


@dataclass(frozen=True)
class FedExLoRA(Method):
    """Factors are averaged, and what the average misses, ``sum_i w_i B_i A_i - B A``, is folded
    into the frozen weight: the global model is the exact average (arXiv 2410.09432)."""

    name: ClassVar[str] = "FedEx-LoRA"
    folds: ClassVar[bool] = True

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
class FLoRA(Method):
    """Factors are stacked, which is exact, and folded into the frozen weight; the next round
    starts from a fresh adapter (arXiv 2409.05976): ``B = 0`` and an ``A`` that the server draws
    once a round for all clients, as PEFT does."""

    name: ClassVar[str] = "FLoRA"
    folds: ClassVar[bool] = True

    def aggregate(
        self,
        uploads: Sequence[Factors],
        reference: Factors,
        weights: Tensor | None = None,
        *,
        round: int = 1,
        generator: torch.Generator | None = None,
    ) -> Factors:
        checked_weights(uploads, reference, weights)
        _check(uploads, reference)
        generator, A = drawing(generator, round), {}
        for module, like in reference.A.items():
            drawn = torch.empty(like.shape, dtype=like.dtype, device=generator.device)
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
            A[module] = drawn.to(like.device)
        return Factors(A, {module: torch.zeros_like(B) for module, B in reference.B.items()})


def _check(uploads: Sequence[Factors], reference: Factors) -> None:
    """Raise ValueError where factors do not fit the reference's, whatever their rank, or are not
    finite."""
    for i, upload in enumerate(uploads):
        for module, A in upload.A.items():
            B, k, d = upload.B[module], reference.A[module].shape[1], reference.B[module].shape[0]
            if A.shape != (len(A), k) or B.shape != (d, len(A)):
                raise ValueError(
                    f"lora_A and lora_B must be (r, {k}) and ({d}, r) for client {i}, layer "
                    f"{module!r}, got {tuple(A.shape)} and {tuple(B.shape)}"
                )
            for side, t in (("A", A), ("B", B)):
                if not torch.isfinite(t).all():
                    raise ValueError(
                        f"lora_{side} holds a non-finite value for client {i}, layer {module!r}"
                    )


def _singular(
    uploads: Sequence[Factors], like: Factors, weights: Tensor | None, dense: bool = False
) -> Factors:
    """The truncation of every layer, of the rank and in the dtype of ``like``."""
    A, B = {}, {}
    for module, A_like in like.A.items():
        try:
            left, right = stacked(uploads, module, weights)
            A_r, B_r = truncation(left, right, rank=A_like.shape[0], dense=dense)
        except ValueError as error:
            raise ValueError(f"layer {module!r}: {error}") from error
        A[module], B[module] = A_r.to(A_like.dtype), B_r.to(A_like.dtype)
    return Factors(A, B)


def truncation(
    left: Tensor, right: Tensor, rank: int, *, dense: bool = False
) -> tuple[Tensor, Tensor]:
    """The best ``A (rank, k)``, ``B (d, rank)`` for ``left @ right``, which is formed for ``dense``
    alone.

    QR of both stacks, SVD of the small core. The sign of each singular pair is such that the
    largest entry of its row of ``A`` is positive.

    Raises:
        ValueError: the core overflows.
    """
    if dense:
        core = left @ right
    else:
        Q_left, R_left = torch.linalg.qr(left)
        Q_right, R_right = torch.linalg.qr(right.mT)
        core = R_left @ R_right.mT
    if not torch.isfinite(core).all():
        raise ValueError(
            "the exact average overflows its dtype; scale the factors down or use a wider dtype"
        )
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    A, B = Vh[:rank], U[:, :rank] * S[:rank]
    if not dense:
        A, B = A @ Q_right.mT, Q_left @ B
    sign = torch.where(A.gather(1, A.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0).to(A.dtype)
    missing = rank - A.shape[0]  # a layer narrower than the rank
    return pad(A * sign, (0, 0, 0, missing)), pad(B * sign.mT, (0, missing))
