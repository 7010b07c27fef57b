"""Rotations from Gram blocks: each rule gives ``(L, N, r, r)``."""

from __future__ import annotations

import torch
from torch import Tensor

from fedrot_kernels.checks import ALIGN_MODES
from fedrot_kernels.rspace.blocks import Blocks, Point, times
from fedrot_kernels.rspace.softness import check_lam, found_lam, soften, turned

ALIGN = (*ALIGN_MODES, "gpa", "optimal")
"""What :func:`rotations` can fit rotations to."""


def procrustes(blocks: Blocks, align: str = "joint", *, proper: bool = True) -> Tensor:
    """``R*`` ``(L, N, r, r)`` of every client toward the reference: what
    :func:`fedrot_kernels.align` gives at ``lam = 1``."""
    return torch.ops.fedrot.polar(blocks.cross(align).contiguous(), proper=proper)


def gpa(
    blocks: Blocks,
    *,
    proper: bool = True,
    iterations: int = 10,
    tolerance: float = 1e-3,
    start: Tensor | None = None,
) -> Tensor:
    """Generalised Procrustes analysis: every client toward the weighted mean of the aligned ones.

    Maximises ``f = sum_ij w_i w_j <R_i, K_ij R_j>``, ``K_ij = B_i^T B_j + A_i A_j^T``, over
    ``i != j`` (the terms ``i = j`` are the same for all rotations), which is the mean agreement of
    all pairs. Starts from ``start``, by default the alignment to the reference, never decreases
    ``f``, and leaves a layer when it grows by less than ``tolerance`` of itself. The mean is then
    turned to the reference as a whole: that changes no product, and keeps the basis from round to
    round.

    A step aligns all clients at once to the mean of the *others*. Where that does not raise ``f``
    (two clients swap places), the layer steps to the mean of all instead, which cannot lower it,
    since the matrix of all ``K_ij`` is positive semi-definite.

    Source: Gower, Psychometrika 1975; ten Berge, Psychometrika 1977.
    """
    layers, clients, r = blocks.shape
    K = blocks.A + blocks.B
    diagonal = K.view(layers, clients, r, clients, r).diagonal(dim1=1, dim2=3)  # (L, r, r, N)
    own = diagonal.permute(0, 3, 1, 2).clone()
    diagonal.zero_()

    def toward(R: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of the others as every client sees it, and ``f``."""
        U = blocks.stacked(R)
        M = times(K, U)
        return M.view(R.shape), (U * M).sum((1, 2))

    R = _start(blocks, procrustes(blocks, proper=proper), proper) if start is None else start
    M, f = toward(R)
    active = torch.ones_like(f, dtype=torch.bool)
    for _ in range(iterations):
        new = R.clone()
        new[active] = torch.ops.fedrot.polar(M[active], proper=proper)
        new_M, new_f = toward(new)
        slow = active & ~(new_f - f > tolerance * f.abs())
        if bool(slow.any()):
            with_own = M[slow] + blocks.weights[:, None, None] * (own[slow] @ R[slow])
            new[slow] = torch.ops.fedrot.polar(with_own, proper=proper)
            new_M, new_f = toward(new)
        better = active & (new_f > f)  # not where rounding alone has moved it
        R, M = torch.where(_each(better), new, R), torch.where(_each(better), new_M, M)
        active = better & (new_f - f > tolerance * f.abs())
        f = torch.where(better, new_f, f)
        if not bool(active.any()):
            break
    return to_reference(blocks, R, proper=proper)


def _start(blocks: Blocks, joint: Tensor, proper: bool) -> Tensor:
    """``joint``, the alignment to the reference, but toward the client of most weight where that is
    zero."""
    _, _, r = blocks.shape
    empty = (blocks.gram_A + blocks.gram_B).abs().amax((1, 2)) == 0
    if not bool(empty.any()):
        return joint
    first = int(blocks.weights.argmax())
    of_first = slice(first * r, (first + 1) * r)
    to_first = (blocks.A[:, :, of_first] + blocks.B[:, :, of_first]).reshape(joint.shape)
    return torch.where(_each(empty), torch.ops.fedrot.polar(to_first, proper=proper), joint)


def _each(mask: Tensor) -> Tensor:
    """``(L,)`` against ``(L, N, r, r)``."""
    return mask[:, None, None, None]


def optimal(
    blocks: Blocks,
    *,
    proper: bool = True,
    iterations: int = 10,
    tolerance: float = 3e-3,
    start: Tensor | None = None,
) -> Tensor:
    """Rotations that minimise the aggregation error ``|D - B A|`` itself, a local minimum.

    Riemannian gradient descent with the polar factor as retraction and the step lengths of
    Barzilai and Borwein (IMA J. Numer. Anal. 1988), shortened until the error falls: it falls in
    every step, so the result is never worse than ``start``, by default in each layer the best of
    :func:`gpa`, the alignment to the reference (:func:`procrustes`) and none. Leaves a layer when
    its squared error falls by less than ``tolerance`` of itself. Turned to the reference as a
    whole, as in :func:`gpa`.
    """
    given = blocks
    blocks = given.of_size_one()
    at = _best_start(given, blocks, proper) if start is None else Point.at(blocks, start)
    norm, slope = blocks.norm_square(), at.slope()
    step = at.first_step()
    active = torch.ones_like(step, dtype=torch.bool)
    # No step is worth while that promises less than this.
    least = 16 * torch.finfo(norm.dtype).eps * norm
    for count in range(iterations):
        promised = 2 * step * (slope.square().sum((2, 3)) @ blocks.weights)
        active = active & (promised > least + tolerance * (norm + at.excess))
        if not bool(active.any()):
            break
        new, step = _descend(at, slope, step, active, proper)
        new_slope = new.slope()
        change, turn = new.R - at.R, new_slope - slope
        pairs = ((change, change), (change, turn), (turn, turn))
        cc, ct, tt = ((a * b).sum((2, 3)) @ blocks.weights for a, b in pairs)
        ratio = cc / ct.abs() if count % 2 else ct.abs() / tt
        step = torch.where(ratio.isfinite() & (ratio > 0), ratio, step)
        active = active & (at.excess - new.excess > least + tolerance * (norm + at.excess))
        at, slope = new, new_slope
    return to_reference(given, at.R, proper=proper)


def _best_start(given: Blocks, blocks: Blocks, proper: bool) -> Point:
    """Of rotations by ``given``, those of least error by ``blocks``, which are of size one."""
    joint = procrustes(given, proper=proper)
    eye = torch.eye(joint.shape[-1], dtype=joint.dtype, device=joint.device)
    means = gpa(given, proper=proper, start=_start(given, joint, proper))
    return Point.best(blocks, torch.stack([means, joint, eye.expand_as(joint)], 1))


def _descend(
    at: Point, slope: Tensor, step: Tensor, active: Tensor, proper: bool
) -> tuple[Point, Tensor]:
    """The next point, of less error in the active layers and the same in the others, and the
    steps that led there."""
    for _ in range(6):  # below a 4000th of a step it is rounding that decides
        moved = torch.ops.fedrot.polar(at.R - _each(step) * slope, proper=proper)
        new = Point.at(at.blocks, torch.where(_each(active), moved, at.R))
        worse = active & ~(new.excess <= at.excess)
        if not bool(worse.any()):
            return new, step
        step = torch.where(worse, step / 4, step)
    return Point.at(at.blocks, torch.where(_each(active & ~worse), moved, at.R)), step


def to_reference(blocks: Blocks, R: Tensor, *, proper: bool = True) -> Tensor:
    """``R_i Q`` with the one ``Q`` per layer that turns the average toward the reference."""
    mean = (blocks.weights[:, None, None] * (R.mT @ blocks.cross("joint"))).sum(1)
    return R @ torch.ops.fedrot.polar(mean, proper=proper)[:, None]


def shifted(blocks: Blocks, eps: float, align: str = "joint", *, proper: bool = True) -> Tensor:
    """``polar(M + eps |M| I)`` with Frobenius' norm: turns where the evidence is strong, and stays
    where it is weak; no soft rotation, and ``eps`` in its place."""
    M = blocks.cross(align)
    largest = M.abs().amax((-2, -1), keepdim=True)
    M = M / torch.where(largest > 0, largest, 1.0)  # the square of a length may overflow
    eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    moved = M + eps * torch.linalg.matrix_norm(M)[..., None, None] * eye
    return torch.ops.fedrot.polar(moved, proper=proper)


def rotations(
    blocks: Blocks, *, align: str = "optimal", lam: float | str = 1.0, proper: bool = True
) -> Tensor:
    """The rotations ``(L, N, r, r)`` to average with: ``R*`` of ``align``, softened by ``lam``.

    Raises:
        ValueError: ``align`` is not of ``ALIGN``, or ``lam`` neither in [0, 1] nor of ``AUTO``.
    """
    return rotations_with_lam(blocks, align=align, lam=lam, proper=proper)[0]


def rotations_with_lam(
    blocks: Blocks, *, align: str = "optimal", lam: float | str = 1.0, proper: bool = True
) -> tuple[Tensor, Tensor]:
    """:func:`rotations`, and the ``lam`` that softened them: ``(L, 1)``, or with ``"auto-client"``
    ``(L, N)``."""
    check_options(align, lam)
    if align in ALIGN_MODES:
        R = procrustes(blocks, align, proper=proper)
    else:
        R = (gpa if align == "gpa" else optimal)(blocks, proper=proper)
    if isinstance(lam, str):
        values = found_lam(blocks, R, lam, proper=proper)
        return turned(R, values, proper=proper), values
    return soften(R, float(lam), proper=proper), R.new_full((len(R), 1), lam)


def check_options(align: str, lam: float | str) -> None:
    """Raise ValueError unless ``align`` is of ``ALIGN`` and ``lam`` as :func:`check_lam` wants."""
    if align not in ALIGN:
        raise ValueError(f"align must be one of {', '.join(ALIGN)}, got {align!r}")
    check_lam(lam)
