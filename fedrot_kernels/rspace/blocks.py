"""Gram blocks of a batch of layers, and the aggregation error as a function of rotations."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fedrot_kernels.checks import check, check_weight_values, check_weights

BYTES = 256 << 20  # of Gram blocks at a time


@dataclass(frozen=True)
class Blocks:
    """The Gram blocks of ``L`` layers of rank ``r``, ``N`` clients, and their weights.

    float32, or float64 where any factor is.
    """

    A: Tensor  # (L, S, S): A_i A_j^T
    B: Tensor  # (L, S, S): B_i^T B_j
    ref_A: Tensor  # (L, N, r, r): A_i A_ref^T
    ref_B: Tensor  # (L, N, r, r): B_i^T B_ref
    gram_A: Tensor  # (L, r, r): A_ref A_ref^T
    gram_B: Tensor  # (L, r, r): B_ref^T B_ref
    weights: Tensor  # (N,), sum 1

    @staticmethod
    def of(
        lora_A: Sequence[Tensor],
        lora_B: Sequence[Tensor],
        ref_A: Sequence[Tensor],
        ref_B: Sequence[Tensor],
        weights: Tensor | None = None,
    ) -> Blocks:
        """From factors, arguments as for :func:`fedrot_kernels.align_aggregate`; every layer has
        the same rank in the reference.

        Raises:
            ValueError, TypeError: as ``align_aggregate``, or layers differ in rank.
        """
        gram_A, gram_B = torch.ops.fedrot.gram(lora_A, lora_B, ref_A, ref_B)
        ranks = {A.shape[0] for A in ref_A}
        if len(ranks) > 1:
            raise ValueError(f"layers must have one rank, got {sorted(ranks)}")
        (r,) = ranks
        size = gram_A.shape[-1] - r
        check_weights(weights, size // r, gram_A.device)
        values = check_weight_values(weights, size // r)
        shape = (len(ref_A), size // r, r, r)
        return Blocks(
            gram_A[:, :size, :size],
            gram_B[:, :size, :size],
            gram_A[:, :size, size:].reshape(shape),
            gram_B[:, :size, size:].reshape(shape),
            gram_A[:, size:, size:],
            gram_B[:, size:, size:],
            torch.tensor(values, dtype=gram_A.dtype, device=gram_A.device),
        )

    def double(self) -> Blocks:
        """The same in float64."""
        return Blocks(*(getattr(self, name).double() for name in self.__dataclass_fields__))

    def of_size_one(self) -> Blocks:
        """The same layers with clients' ``A`` and ``B`` of about the length 1: the rotations of
        least error stay what they are, and its fourth powers of factors can be written. Scales are
        powers of two, which round nothing; where all factors are of moderate length already, this
        is ``self``."""
        moderate = 16

        def exponent(G: Tensor) -> Tensor:
            size = G.diagonal(dim1=1, dim2=2).mean(1)
            return torch.frexp(torch.where(size > 0, size, 1.0)).exponent

        exponents = torch.stack([exponent(self.A), exponent(self.B)])
        if bool((exponents.abs() <= moderate).all()):
            return self
        exponents = exponents.clamp(-126, 126)  # powers that float32 has
        s_A, s_B = torch.ldexp(self.A.new_ones(exponents.shape), -exponents)[..., None, None]
        return Blocks(
            s_A * self.A,
            s_B * self.B,
            s_A[..., None] * self.ref_A,
            s_B[..., None] * self.ref_B,
            s_A * self.gram_A,
            s_B * self.gram_B,
            self.weights,
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(L, N, r)``."""
        layers, clients, r, _ = self.ref_A.shape
        return layers, clients, r

    def stacked(self, R: Tensor) -> Tensor:
        """``U`` ``(L, S, r)`` of rotations ``(L, N, r, r)``: ``w_i R_i``, one below the other."""
        return (self.weights[:, None, None] * R).flatten(1, 2)

    def weighted(self, U: Tensor) -> Tensor:
        """``W U`` for ``U (L, S, ...)``."""
        layers, clients, _ = self.shape
        return (self.weights[:, None] * U.reshape(layers, clients, -1)).view(U.shape)

    def cross(self, align: str) -> Tensor:
        """``M`` ``(L, N, r, r)`` of every client with the reference."""
        if align == "joint":
            return self.ref_A + self.ref_B
        return self.ref_A if align == "A" else self.ref_B

    def pair_sum(self, t: Tensor) -> Tensor:
        """``sum_ij w_i w_j`` times the sum of block ``i, j`` of ``t`` ``(L, S, S)``."""
        w = self.weights.repeat_interleave(self.shape[2])
        return t @ w @ w

    def norm_square(self) -> Tensor:
        """``|D|^2`` ``(L,)`` of the exact average."""
        return self.pair_sum(self.A * self.B)

    def error_square(self, R: Tensor) -> Tensor:
        """``|D - B A|^2`` ``(L,)`` of the average with rotations ``R`` ``(L, N, r, r)``, in
        float64; small errors are off by the rounding of the blocks, ``eps |D|^2``."""
        wide = self.double()
        return (wide.norm_square() + Point.at(wide, R.double()).excess).clamp_min(0)

    def bound_square(self) -> Tensor:
        """The least ``|D - B A|^2`` ``(L,)`` that any ``A``, ``B`` of rank ``r`` can have: that of
        the exact truncation, in float64."""
        _, _, r = self.shape
        return spectrum(self)[0][:, r:].sum(1)


class Batch(NamedTuple):
    """Layers of one rank: their numbers, ``lora_A, lora_B, ref_A, ref_B`` of them, their blocks."""

    layers: list[int]
    factors: list[list[Tensor]]
    blocks: Blocks


def batches(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    ref_A: Sequence[Tensor],
    ref_B: Sequence[Tensor],
    weights: Tensor | None = None,
) -> Iterator[Batch]:
    """All layers, in batches whose Gram blocks take about ``BYTES``; arguments as for
    :func:`fedrot_kernels.align_aggregate`.

    Raises:
        ValueError, TypeError: as ``align_aggregate``.
    """
    total = len(ref_A)
    numbers = list(batched(ref_A, len(lora_A) // max(1, total)))
    if len(numbers) != 1:  # what follows sees a part, and would count the layers of that
        check(lora_A, lora_B, ref_A, ref_B, weights, 1.0, "joint")
    for layers in numbers:
        factors = [list(t) for t in (lora_A, lora_B, ref_A, ref_B)]
        if len(layers) < total:
            factors = [[t[i + n] for i in range(0, len(t), total) for n in layers] for t in factors]
        try:
            A, B, of_A, of_B = factors
            blocks = Blocks.of(A, B, of_A, of_B, weights)
        except ValueError as error:
            words = re.split(r"(?<=layer )(\d+)", str(error))
            words[1::2] = [str(layers[int(number)]) for number in words[1::2]]
            raise ValueError("".join(words)) from error
        yield Batch(layers, factors, blocks)


def batched(ref_A: Sequence[Tensor], clients: int) -> Iterator[list[int]]:
    """The numbers of the layers in each of :func:`batches`."""
    by_rank: dict[int, list[int]] = {}
    for layer, A in enumerate(ref_A):
        by_rank.setdefault(A.shape[0] if A.dim() == 2 else 0, []).append(layer)
    for r, chosen in by_rank.items():
        size = max(1, BYTES // (2 * 4 * max(1, (clients + 1) * r) ** 2))
        for first in range(0, len(chosen), size):
            yield chosen[first : first + size]


@dataclass(frozen=True)
class Point:
    """Rotations of every layer, what follows from them, and the error there."""

    blocks: Blocks
    R: Tensor  # (L, N, r, r)
    U: Tensor  # (L, S, r), stacked
    X: Tensor  # (L, S, r): G_A U
    Y: Tensor  # (L, S, r): G_B U
    P: Tensor  # (L, r, r): U^T Y = B^T B
    Q: Tensor  # (L, r, r): U^T X = A A^T
    excess: Tensor  # (L,): |D - B A|^2 - |D|^2

    @staticmethod
    def at(blocks: Blocks, R: Tensor) -> Point:
        """The point of rotations ``(L, N, r, r)``."""
        return Point.best(blocks, R[:, None])

    @staticmethod
    def best(blocks: Blocks, candidates: Tensor) -> Point:
        """In each layer that of the candidates ``(L, C, N, r, r)`` of least error."""
        all_of_them = _measured(blocks, candidates)
        best = all_of_them[-1].argmin(1)
        at = (torch.arange(len(best), device=best.device), best)
        return Point(blocks, candidates[at], *(t[at] for t in all_of_them))

    def first_step(self) -> Tensor:
        """To about the minimum of a parabola that is as steep as ``|B A|^2`` ``(L,)``."""
        layers, clients, r = self.blocks.shape
        curve = torch.zeros_like(self.excess)
        for GU, other in ((self.X, self.P), (self.Y, self.Q)):
            squares = GU.view(layers, clients, -1).square().sum(2) @ self.blocks.weights
            curve += (squares / r).sqrt() * torch.linalg.matrix_norm(other)
        return 1 / curve.clamp_min(torch.finfo(curve.dtype).tiny)

    def slope(self) -> Tensor:
        """Gradient of half the error along the rotations, ``R_i`` times a skew matrix each, for the
        inner product ``sum_i w_i <X_i, Y_i>``, in which light clients turn as fast as heavy."""
        blocks = self.blocks
        pull = times(blocks.B, blocks.weighted(self.X)) + times(blocks.A, blocks.weighted(self.Y))
        G = (self.Y @ self.Q + self.X @ self.P - pull).view(self.R.shape)
        inner = self.R.mT @ G
        return self.R @ (inner - inner.mT) / 2


def least(blocks: Blocks, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Which ``(L,)`` of the candidates ``(L, C, N, r, r)`` has the least error in each layer, the
    first of equals, and :class:`Point`'s ``excess`` of it."""
    excess = _measured(blocks, candidates)[-1]
    best = excess.argmin(1, keepdim=True)
    return best.squeeze(1), excess.gather(1, best).squeeze(1)


def _measured(blocks: Blocks, candidates: Tensor) -> tuple[Tensor, ...]:
    """``U, X, Y, P, Q, excess`` of :class:`Point`, each ``(L, C, ...)``. The blocks are read once
    for all candidates."""
    layers, count, clients, r, _ = candidates.shape
    weighted = blocks.weights[:, None, None] * candidates
    U = weighted.permute(0, 2, 3, 1, 4).reshape(layers, clients * r, count * r)
    X, Y = times(blocks.A, U), times(blocks.B, U)
    split = (layers, clients * r, count, r)
    pull = (Y * blocks.weighted(X)).view(split).sum((1, 3))
    U, X, Y = (t.view(split).transpose(1, 2) for t in (U, X, Y))
    P, Q = U.mT @ Y, U.mT @ X
    return U, X, Y, P, Q, (P * Q).sum((2, 3)) - 2 * pull


def times(G: Tensor, U: Tensor) -> Tensor:
    """``G U`` for symmetric ``G`` ``(L, S, S)``; where ``U`` is narrow in the form that some
    versions of BLAS are several times as fast in."""
    narrow = 16
    return G @ U if U.shape[-1] > narrow else (U.mT @ G).mT.contiguous()


def spectrum(blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """Squared singular values of ``D`` ``(L, S)``, descending; ``F`` ``(L, S, S)`` with
    ``G_B = F F^T``; eigenvectors ``(L, S, S)`` of ``F^T W G_A W F``. In float64."""
    values, V = torch.linalg.eigh(blocks.B.double())
    F = V * values.clamp_min(0).sqrt()[:, None]
    w = blocks.weights.double().repeat_interleave(blocks.ref_A.shape[-1])
    squares, vectors = torch.linalg.eigh(F.mT @ (w[:, None] * blocks.A.double() * w) @ F)
    return squares.flip(1).clamp_min(0), F, vectors.flip(2)
