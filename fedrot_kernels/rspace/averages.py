"""Averages with what was found from the Gram blocks of their layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedrot_kernels.rspace.blocks import Blocks, batched, batches, spectrum
from fedrot_kernels.rspace.rotations import check_options, rotations_with_lam

Solver = Callable[[Blocks], tuple[Tensor, Tensor]]


def aggregate(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    ref_A: Sequence[Tensor],
    ref_B: Sequence[Tensor],
    weights: Tensor | None = None,
    *,
    align: str = "optimal",
    lam: float | str = 1.0,
    proper: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    """:func:`fedrot_kernels.align_aggregate` with rotations found in r-space.

    Args:
        lora_A, lora_B, ref_A, ref_B, weights, proper: as for ``align_aggregate``.
        align: ``"gpa"`` (:func:`gpa`) and ``"optimal"`` (:func:`optimal`), which the reference
            gives a start and a gauge only; or ``"joint"``, ``"A"``, ``"B"``.
        lam: in [0, 1], or ``"auto"``: in each layer the one of least aggregation error; or
            ``"auto-client"``: in each layer one for every client.

    Returns:
        ``(A, B)`` as ``align_aggregate``.

    Raises:
        ValueError, TypeError: as ``align_aggregate``.
    """
    A, B, _ = aggregate_with_lam(
        lora_A, lora_B, ref_A, ref_B, weights, align=align, lam=lam, proper=proper
    )
    return A, B


def aggregate_with_lam(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    ref_A: Sequence[Tensor],
    ref_B: Sequence[Tensor],
    weights: Tensor | None = None,
    *,
    align: str = "optimal",
    lam: float | str = 1.0,
    proper: bool = True,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """:func:`aggregate`, and the ``lam`` of every layer ``(L, 1)``, with ``"auto-client"`` that of
    every client there, ``(L, N)``.

    Raises:
        ValueError, TypeError: as ``aggregate``.
    """
    check_options(align, lam)
    found: list[Tensor] = []

    def solve(blocks: Blocks) -> tuple[Tensor, Tensor]:
        R, values = rotations_with_lam(blocks, align=align, lam=lam, proper=proper)
        found.append(values)
        U = blocks.stacked(R)
        return U, U

    A, B = combined(lora_A, lora_B, ref_A, ref_B, weights, solve)
    order = [layer for batch in batched(ref_A, len(lora_A) // len(ref_A)) for layer in batch]
    return A, B, torch.cat(found)[torch.tensor(order).argsort()]


def combined(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    ref_A: Sequence[Tensor],
    ref_B: Sequence[Tensor],
    weights: Tensor | None,
    solve: Solver,
) -> tuple[list[Tensor], list[Tensor]]:
    """``A = U_A^T stack(A)``, ``B = stack(B) U_B`` of every layer with what ``solve`` finds."""
    A, B = list(ref_A), list(ref_B)  # replaced below
    for layers, factors, blocks in batches(lora_A, lora_B, ref_A, ref_B, weights):
        mixes = (U.reshape(blocks.ref_A.shape) for U in solve(blocks))
        some_A, some_B = torch.ops.fedrot.combine(*factors, *mixes)
        for layer, layer_A, layer_B in zip(layers, some_A, some_B, strict=True):
            A[layer], B[layer] = layer_A, layer_B
    return A, B


def truncation(blocks: Blocks) -> tuple[Tensor, Tensor]:
    """``(U_A, U_B)`` ``(L, S, r)`` of the best rank-r approximation ``U S V^T`` of ``D`` (FlexLoRA,
    arXiv 2402.11505) in the gauge of the reference: ``A = Q^T a V^T``, ``B = U b Q`` with

    - diagonal ``a b = S`` for which ``B^T B - A A^T = delta I``, as in the mean over the directions
      of the reference, ``delta = (|B_ref|^2 - |A_ref|^2) / r``. Gradient flow conserves this
      difference (Arora et al., ICML 2018), so local training left it nearly as it was;
    - the orthogonal ``Q`` that brings ``A``, ``B`` nearest to the reference.

    A direction that no client has is zero in both. With a Gram matrix of ``A`` that is kept, ``B``
    grows round by round instead (docs/findings.md).
    """
    _, _, r = blocks.shape
    wide = blocks.double()
    squares, F, vectors = spectrum(wide)
    S = squares[:, :r].sqrt()
    traces = [G.diagonal(dim1=1, dim2=2).sum(1, keepdim=True) for G in (wide.gram_A, wide.gram_B)]
    delta = (traces[1] - traces[0]) / r
    longer = (delta.abs() + (delta.square() + 4 * squares[:, :r]).sqrt()) / 2
    longer = longer.sqrt()
    shorter = S / torch.where(longer > 0, longer, 1.0)
    a = torch.where(delta > 0, shorter, longer)
    # u^T F^T W stack(A) = S V^T for the eigenvectors u.
    scale = a * _inverse(S)
    U_A = wide.weighted(F @ (vectors[:, :, :r] * scale[:, None]))
    # Least squares for this A: no error of A's is made larger.
    G = U_A.mT @ wide.A @ U_A
    U_B = wide.weighted(wide.A @ U_A) @ torch.linalg.pinv(G, hermitian=True)
    M = U_A.mT @ wide.ref_A.flatten(1, 2) + U_B.mT @ wide.ref_B.flatten(1, 2)
    Q = torch.ops.fedrot.polar(M)
    return (U_A @ Q).to(blocks.A.dtype), (U_B @ Q).to(blocks.A.dtype)


def _inverse(t: Tensor) -> Tensor:
    """``1 / t``, zero where ``t`` is lost in rounding against the first."""
    kept = t > torch.finfo(t.dtype).eps ** 0.5 * t[:, :1]
    return torch.where(kept, 1 / t, 0.0)
