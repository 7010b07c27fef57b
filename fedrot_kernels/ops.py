"""The operators ``torch.ops.fedrot.*``: schema, fake and documentation, each once.

Backends (``fedrot_kernels.backends``) validate by ``fedrot_kernels.checks`` and register an
implementation per dispatch key with :func:`implement`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fedrot_kernels.checks import accumulate_dtype, check, check_mix, check_polar

_library = torch.library.Library("fedrot", "DEF")

_library.define(
    "align_aggregate(Tensor[] lora_A, Tensor[] lora_B, Tensor[] ref_A, Tensor[] ref_B,"
    ' Tensor? weights=None, *, float lam=0.4, str align="joint", bool proper=True)'
    " -> (Tensor[] A, Tensor[] B)"
)
_library.define(
    "align(Tensor[] lora_A, Tensor[] lora_B, Tensor[] ref_A, Tensor[] ref_B,"
    ' *, float lam=0.4, str align="joint", bool proper=True) -> Tensor[]'
)
_library.define("polar(Tensor M, *, bool proper=False) -> Tensor")
_library.define(
    "gram(Tensor[] lora_A, Tensor[] lora_B, Tensor[] ref_A, Tensor[] ref_B)"
    " -> (Tensor gram_A, Tensor gram_B)"
)
_library.define(
    "combine(Tensor[] lora_A, Tensor[] lora_B, Tensor[] ref_A, Tensor[] ref_B,"
    " Tensor mix_A, Tensor mix_B) -> (Tensor[] A, Tensor[] B)"
)
for _name in ("align_aggregate", "align", "polar", "gram", "combine"):
    # Not differentiable: autograd passes by, and outputs never require a gradient.
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")


def align_aggregate(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    ref_A: Sequence[Tensor],
    ref_B: Sequence[Tensor],
    weights: Tensor | None = None,
    *,
    lam: float = 0.4,
    align: str = "joint",
    proper: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    """Rotate every client's LoRA factors toward the reference and average them (FedRot-LoRA).

    Per layer, with ``R_i`` as returned by :func:`align`:
    ``B = sum_i w_i B_i R_i`` and ``A = sum_i w_i R_i^T A_i``, accumulated in float32 (float64
    for float64 inputs) and rounded once. A client of rank ``r_i < r`` is a client zero-padded
    to ``r``. ``lam=0`` is plain factor averaging (FedIT). Factors are used as they are: bring
    clients of different scaling ``lora_alpha / r`` to one scale first.

    Args:
        lora_A: ``N * L`` tensors ``(r_i, k)``, client-major: ``lora_A[i * L + l]``.
        lora_B: ``N * L`` tensors ``(d, r_i)``.
        ref_A: ``L`` tensors ``(r, k)``, the factors from which the clients started the round.
        ref_B: ``L`` tensors ``(d, r)``.
        weights: ``(N,)``, finite, non-negative, normalised to sum 1; ``None`` is uniform.
        lam: soft rotation in [0, 1]; 0 leaves the clients as they are, 1 rotates fully.
        align: ``"joint"``, ``"A"`` or ``"B"``: which factors the rotation is fitted to.
        proper: rotations only (``det R = +1``), no reflections.

    Returns:
        ``(A, B)``: ``L`` tensors ``(r, k)`` and ``L`` tensors ``(d, r)`` in the dtype of the
        reference. Never aliases an input; carries no gradient.

    dtypes are float64, float32, bfloat16, float16, one for all clients and one for the
    reference. A tensor whose last dimension is not contiguous is copied.

    Raises:
        ValueError: a length, shape, rank, device, weight or option is wrong, or (on CPU) a
            value is not finite; the message names argument, client and layer.
        TypeError: a dtype is unsupported or mixed.

    Source: arXiv 2602.23638; the alignment is orthogonal Procrustes (Schoenemann 1966).
    """
    return torch.ops.fedrot.align_aggregate(
        lora_A, lora_B, ref_A, ref_B, weights, lam=lam, align=align, proper=proper
    )


def align(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    ref_A: Sequence[Tensor],
    ref_B: Sequence[Tensor],
    *,
    lam: float = 0.4,
    align: str = "joint",
    proper: bool = True,
) -> list[Tensor]:
    """The rotation of every client and layer that :func:`align_aggregate` applies.

    ``R* = U V^T`` for ``M = U S V^T`` with ``M = A_i A_ref^T`` (``align="A"``),
    ``B_i^T B_ref`` (``"B"``) or their sum (``"joint"``); with ``proper`` the direction of the
    smallest singular value is flipped where ``det`` would be -1. Where ``M`` is rank-deficient
    ``R*`` is the minimal-rotation completion ``lim eps->0+ polar(M + eps I)``. Then
    ``R = polar((1 - lam) I + lam R*)``.

    Arguments and errors as for :func:`align_aggregate`.

    Returns:
        ``N * L`` tensors ``(r_i, r)``, client-major, float32 (float64 for float64 inputs), with
        orthonormal rows.
    """
    return torch.ops.fedrot.align(lora_A, lora_B, ref_A, ref_B, lam=lam, align=align, proper=proper)


def polar(M: Tensor, *, proper: bool = False) -> Tensor:
    """The (semi-)orthogonal polar factor ``U V^T`` of each ``M = U S V^T``.

    Args:
        M: ``(..., m, n)`` with ``m <= n``; float64, float32, bfloat16 or float16.
        proper: the best rotation (``det = +1``) instead of the best orthogonal matrix.

    Returns:
        ``(..., m, n)``, float32 (float64 for float64): orthonormal rows, maximising
        ``trace(R^T M)``. Rank-deficient ``M`` gives ``lim eps->0+ polar(M + eps I)`` for ``M``
        zero-padded to ``(n, n)``, of which the first ``m`` rows are returned; ``M = 0`` gives
        ``I``.

    Raises:
        ValueError: ``M`` is no such matrix, or (on CPU) holds a non-finite value.
        TypeError: the dtype is unsupported.
    """
    return torch.ops.fedrot.polar(M, proper=proper)


def gram(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    ref_A: Sequence[Tensor],
    ref_B: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Gram blocks of every layer: all that r-space methods need to know of the factors.

    With the clients' factors and then the reference's one behind the other, each padded with zeros
    to ``r``, the largest rank of the call, ``gram_A[l] = stack(A_i) stack(A_i)^T`` and
    ``gram_B[l] = stack(B_i)^T stack(B_i)``: rows ``i r`` to ``(i + 1) r`` belong to client ``i``,
    the last ``r`` to the reference.

    Arguments and errors as for :func:`align_aggregate`.

    Returns:
        ``(gram_A, gram_B)``, ``(L, S, S)`` each with ``S = (N + 1) r``, symmetric to the bit,
        float32 (float64 for float64 inputs).
    """
    return torch.ops.fedrot.gram(lora_A, lora_B, ref_A, ref_B)


def combine(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    ref_A: Sequence[Tensor],
    ref_B: Sequence[Tensor],
    mix_A: Tensor,
    mix_B: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """Average the factors with given matrices: what :func:`align_aggregate` does with its
    rotations.

    ``A[l] = sum_i mix_A[l, i]^T A_i`` and ``B[l] = sum_i B_i mix_B[l, i]``, accumulated in float32
    (float64 for float64 inputs) and rounded once. With ``mix_A = mix_B = w_i R_i`` that is the
    weighted average of rotated clients.

    Args:
        lora_A, lora_B: as for :func:`align_aggregate`.
        ref_A, ref_B: give the results their shapes and dtype; their values are not used.
        mix_A, mix_B: ``(L, N, r, r)`` with ``r`` the largest rank of the call, float32 (float64 for
            float64 inputs). Of a client of rank ``r_i`` in a layer of rank ``r_l`` only the first
            ``r_i`` rows and ``r_l`` columns are read.

    Returns:
        ``(A, B)`` as :func:`align_aggregate`.

    Raises:
        ValueError, TypeError: as :func:`align_aggregate`; on CPU only values that reach the result
            need to be finite.
    """
    return torch.ops.fedrot.combine(lora_A, lora_B, ref_A, ref_B, mix_A, mix_B)


@torch.library.register_fake("fedrot::align_aggregate", lib=_library)
def _align_aggregate_fake(
    lora_A, lora_B, ref_A, ref_B, weights=None, *, lam=0.4, align="joint", proper=True
):
    problem = check(lora_A, lora_B, ref_A, ref_B, weights, lam, align)
    A = [ref_A[0].new_empty((r, k)) for _, k, r in problem.shapes]
    B = [ref_B[0].new_empty((d, r)) for d, _, r in problem.shapes]
    return A, B


@torch.library.register_fake("fedrot::align", lib=_library)
def _align_fake(lora_A, lora_B, ref_A, ref_B, *, lam=0.4, align="joint", proper=True):
    problem = check(lora_A, lora_B, ref_A, ref_B, None, lam, align)
    return [
        lora_A[0].new_empty(
            (r_i, problem.shapes[i % problem.layers][2]), dtype=problem.compute_dtype
        )
        for i, r_i in enumerate(problem.ranks)
    ]


@torch.library.register_fake("fedrot::polar", lib=_library)
def _polar_fake(M, *, proper=False):
    check_polar(M)
    return M.new_empty(M.shape, dtype=accumulate_dtype(M.dtype))


@torch.library.register_fake("fedrot::gram", lib=_library)
def _gram_fake(lora_A, lora_B, ref_A, ref_B):
    problem = check(lora_A, lora_B, ref_A, ref_B, None, 0.0, "joint")
    size = (problem.clients + 1) * problem.rank
    shape, dtype = (problem.layers, size, size), problem.compute_dtype
    return lora_A[0].new_empty(shape, dtype=dtype), lora_A[0].new_empty(shape, dtype=dtype)


@torch.library.register_fake("fedrot::combine", lib=_library)
def _combine_fake(lora_A, lora_B, ref_A, ref_B, mix_A, mix_B):
    problem = check(lora_A, lora_B, ref_A, ref_B, None, 0.0, "joint")
    shape = (problem.layers, problem.clients, problem.rank, problem.rank)
    check_mix(shape, problem.compute_dtype, problem.device, mix_A, mix_B)
    A = [ref_A[0].new_empty((r, k)) for _, k, r in problem.shapes]
    B = [ref_B[0].new_empty((d, r)) for d, _, r in problem.shapes]
    return A, B


def implement(name: str, dispatch_key: str, function: Callable[..., Any]) -> None:
    """Register ``function`` as the kernel of ``fedrot::name`` for one dispatch key.

    It runs under ``no_grad``, since the operators are not differentiable.
    """
    _library.impl(name, torch.no_grad()(function), dispatch_key)
