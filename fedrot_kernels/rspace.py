"""Aggregation rules that iterate, on Gram blocks alone: no pass over the factors but one to make
the blocks (``fedrot::gram``) and one to average with what was found (``fedrot::combine``).

With all clients side by side, ``stack(B) = [B_1 .. B_N]`` ``(d, S)`` and ``stack(A)`` ``(S, k)``,
``S = N r``, every average is ``B = stack(B) U_B`` and ``A = U_A^T stack(A)`` for some ``U (S, r)``;
rotations are ``U_A = U_B = [w_1 R_1; ..; w_N R_N]``. The exact average is
``D = stack(B) W stack(A)``, ``W = diag(w_i)``, and the squared aggregation error

    |D - B A|^2 = |D|^2 - 2 <U_B, G_B W G_A U_A> + <U_B^T G_B U_B, U_A^T G_A U_A>

needs ``G_A = stack(A) stack(A)^T`` and ``G_B = stack(B)^T stack(B)`` only. Layers of one rank are
worked on as one batch. A client of smaller rank is one padded with zeros: rows of its ``R`` beyond
its rank mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedrot_kernels.ops import ALIGN_MODES, check, check_weight_values, check_weights

ALIGN = (*ALIGN_MODES, "gpa", "optimal")
"""What :func:`rotations` can fit rotations to."""

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
        ranks = {A.shape[0] for A in ref_A}
        if len(ranks) > 1:
            raise ValueError(f"layers must have one rank, got {sorted(ranks)}")
        gram_A, gram_B = torch.ops.fedrot.gram(lora_A, lora_B, ref_A, ref_B)
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
        layers, clients, r = self.shape
        blocks = t.reshape(layers, clients, r, clients, r).sum((2, 4))
        return ((blocks @ self.weights) * self.weights).sum(1)

    def norm_square(self) -> Tensor:
        """``|D|^2`` ``(L,)`` of the exact average."""
        return self.pair_sum(self.A * self.B)

    def error_square(self, R: Tensor) -> Tensor:
        """``|D - B A|^2`` ``(L,)`` of the average with rotations ``R`` ``(L, N, r, r)``, in
        float64; small errors are off by the rounding of the blocks, ``eps |D|^2``."""
        wide = self.double()
        return (wide.norm_square() + _Point(wide, R.double()).excess).clamp_min(0)

    def bound_square(self) -> Tensor:
        """The least ``|D - B A|^2`` ``(L,)`` that any ``A``, ``B`` of rank ``r`` can have: that of
        the exact truncation, in float64."""
        _, _, r = self.shape
        return _spectrum(self)[0][:, r:].sum(1)


class _Point:
    """Rotations, and the error there: ``excess`` is ``|D - B A|^2 - |D|^2``."""

    def __init__(self, blocks: Blocks, R: Tensor) -> None:
        self.blocks, self.R = blocks, R
        self.U = blocks.stacked(R)
        self.X, self.Y = _times(blocks.A, self.U), _times(blocks.B, self.U)
        self.P, self.Q = self.U.mT @ self.Y, self.U.mT @ self.X  # B^T B, A A^T
        self.excess = (self.P * self.Q).sum((1, 2)) - 2 * (self.Y * blocks.weighted(self.X)).sum(
            (1, 2)
        )

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
        pull = _times(blocks.B, blocks.weighted(self.X)) + _times(blocks.A, blocks.weighted(self.Y))
        G = (self.Y @ self.Q + self.X @ self.P - pull).view(self.R.shape)
        inner = self.R.mT @ G
        return self.R @ (inner - inner.mT) / 2


def _times(G: Tensor, U: Tensor) -> Tensor:
    """``G U`` for symmetric ``G`` ``(L, S, S)``, in the form that BLAS is several times as fast
    in."""
    return (U.mT @ G).mT.contiguous()


def procrustes(blocks: Blocks, align: str = "joint", *, proper: bool = True) -> Tensor:
    """``R*`` ``(L, N, r, r)`` of every client toward the reference: what
    :func:`fedrot_kernels.align` gives at ``lam = 1``."""
    return torch.ops.fedrot.polar(blocks.cross(align).contiguous(), proper=proper)


def gpa(
    blocks: Blocks, *, proper: bool = True, iterations: int = 10, tolerance: float = 1e-3
) -> Tensor:
    """Generalised Procrustes analysis: every client toward the weighted mean of the aligned ones.

    Maximises ``f = sum_ij w_i w_j <R_i, K_ij R_j>``, ``K_ij = B_i^T B_j + A_i A_j^T``, over
    ``i != j`` (the terms ``i = j`` are the same for all rotations), which is the mean agreement of
    all pairs. Starts from the alignment to the reference, never decreases ``f``, and leaves a layer
    when it grows by less than ``tolerance`` of itself. The mean is then turned to the reference as
    a whole: that changes no product, and keeps the basis from round to round.

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
        M = _times(K, U)
        return M.view(R.shape), (U * M).sum((1, 2))

    R = _start(blocks, K, own, proper)
    M, f = toward(R)
    active = torch.ones_like(f, dtype=torch.bool)
    for _ in range(iterations):
        new = torch.ops.fedrot.polar(M, proper=proper)
        new_M, new_f = toward(new)
        slow = active & ~(new_f - f > tolerance * f.abs())
        if bool(slow.any()):
            with_own = M + blocks.weights[:, None, None] * (own @ R)
            safe = torch.ops.fedrot.polar(with_own, proper=proper)
            new = torch.where(_each(slow), safe, new)
            new_M, new_f = toward(new)
        better = active & (new_f > f)  # not where rounding alone has moved it
        R, M = torch.where(_each(better), new, R), torch.where(_each(better), new_M, M)
        active = better & (new_f - f > tolerance * f.abs())
        f = torch.where(better, new_f, f)
        if not bool(active.any()):
            break
    return to_reference(blocks, R, proper=proper)


def _start(blocks: Blocks, K: Tensor, own: Tensor, proper: bool) -> Tensor:
    """Toward the reference; where that is zero, toward the client of most weight."""
    _, _, r = blocks.shape
    M = blocks.cross("joint")
    empty = (blocks.gram_A + blocks.gram_B).abs().amax((1, 2)) == 0
    if bool(empty.any()):
        first = int(blocks.weights.argmax())
        to_first = K[:, :, first * r : (first + 1) * r].reshape(M.shape).clone()
        to_first[:, first] = own[:, first]
        M = torch.where(_each(empty), to_first, M)
    return torch.ops.fedrot.polar(M.contiguous(), proper=proper)


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
    every step, so the result is never worse than ``start``, by default :func:`gpa`. Leaves a layer
    when its squared error falls by less than ``tolerance`` of itself. Turned to the reference as a
    whole, as in :func:`gpa`.
    """
    at = _Point(blocks, gpa(blocks, proper=proper) if start is None else start)
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
    return to_reference(blocks, at.R, proper=proper)


def _descend(
    at: _Point, slope: Tensor, step: Tensor, active: Tensor, proper: bool
) -> tuple[_Point, Tensor]:
    """The next point, of less error in the active layers and the same in the others, and the
    steps that led there."""
    for _ in range(6):  # below a 4000th of a step it is rounding that decides
        moved = torch.ops.fedrot.polar(at.R - _each(step) * slope, proper=proper)
        new = _Point(at.blocks, torch.where(_each(active), moved, at.R))
        worse = active & ~(new.excess <= at.excess)
        if not bool(worse.any()):
            return new, step
        step = torch.where(worse, step / 4, step)
    return _Point(at.blocks, torch.where(_each(active & ~worse), moved, at.R)), step


def to_reference(blocks: Blocks, R: Tensor, *, proper: bool = True) -> Tensor:
    """``R_i Q`` with the one ``Q`` per layer that turns the average toward the reference."""
    mean = (blocks.weights[:, None, None] * (R.mT @ blocks.cross("joint"))).sum(1)
    return R @ torch.ops.fedrot.polar(mean, proper=proper)[:, None]


def soften(R: Tensor, lam: float | Tensor, *, proper: bool = True) -> Tensor:
    """``polar((1 - lam) I + lam R)`` of rotations ``(..., r, r)``; ``lam`` broadcasts against
    them."""
    if isinstance(lam, float) and lam == 1.0:
        return R
    eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    return torch.ops.fedrot.polar((1 - lam) * eye + lam * R, proper=proper)


def auto_lam(blocks: Blocks, R: Tensor, *, proper: bool = True) -> Tensor:
    """``lam`` ``(L,)`` in [0, 1], to about 0.01, that minimises the aggregation error of
    ``soften(R, lam)`` in each layer: the best of six, and of its neighbours at half the distance,
    four times. 0 and 1 are among them, so neither is better."""
    grid = torch.linspace(0, 1, 6, dtype=R.dtype, device=R.device)
    best = _best_lam(blocks, R, grid.expand(len(R), -1), proper)
    for halving in range(1, 5):
        around = torch.tensor([0.0, -0.2, 0.2], dtype=R.dtype, device=R.device) / 2**halving
        best = _best_lam(blocks, R, (best[:, None] + around).clamp(0, 1), proper)
    return best


def _best_lam(blocks: Blocks, R: Tensor, grid: Tensor, proper: bool) -> Tensor:
    """Of ``grid`` ``(L, C)`` the one of least error in each layer, the first of equals."""
    candidates = soften(R[:, None], grid[:, :, None, None, None], proper=proper)
    # Exactly the ends: polar() would round them.
    ends = grid[:, :, None, None, None]
    eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    candidates = torch.where(ends == 1, R[:, None], torch.where(ends == 0, eye, candidates))
    layers, clients, r = blocks.shape
    # Candidates side by side: two products for all of them.
    U = (
        (blocks.weights[:, None, None] * candidates)
        .permute(0, 2, 3, 1, 4)
        .reshape(layers, clients * r, -1)
    )
    X, Y = blocks.A @ U, blocks.B @ U
    split = (layers, clients * r, grid.shape[1], r)
    pull = (Y * blocks.weighted(X)).view(split).sum((1, 3))
    U, X, Y = (t.view(split).transpose(1, 2) for t in (U, X, Y))
    excess = ((U.mT @ Y) * (U.mT @ X)).sum((2, 3)) - 2 * pull
    return grid.gather(1, excess.argmin(1, keepdim=True)).squeeze(1)


def shifted(blocks: Blocks, eps: float, align: str = "joint", *, proper: bool = True) -> Tensor:
    """``polar(M + eps |M| I)`` with Frobenius' norm: turns where the evidence is strong, and stays
    where it is weak; no soft rotation, and ``eps`` in its place."""
    M = blocks.cross(align)
    eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    moved = M + eps * torch.linalg.matrix_norm(M)[..., None, None] * eye
    return torch.ops.fedrot.polar(moved, proper=proper)


def rotations(
    blocks: Blocks, *, align: str = "optimal", lam: float | str = 1.0, proper: bool = True
) -> Tensor:
    """The rotations ``(L, N, r, r)`` to average with: ``R*`` of ``align``, softened by ``lam``.

    Raises:
        ValueError: ``align`` is not of ``ALIGN``, or ``lam`` neither in [0, 1] nor ``"auto"``.
    """
    check_options(align, lam)
    if align in ALIGN_MODES:
        R = procrustes(blocks, align, proper=proper)
    else:
        R = (gpa if align == "gpa" else optimal)(blocks, proper=proper)
    if isinstance(lam, str):
        chosen = auto_lam(blocks, R, proper=proper)[:, None, None, None]
        soft = soften(R, chosen, proper=proper)
        return torch.where(chosen == 1, R, soft)
    return soften(R, float(lam), proper=proper)


def check_options(align: str, lam: float | str) -> None:
    """Raise ValueError unless ``align`` is of ``ALIGN`` and ``lam`` as :func:`check_lam` wants."""
    if align not in ALIGN:
        raise ValueError(f"align must be one of {', '.join(ALIGN)}, got {align!r}")
    check_lam(lam)


def check_lam(lam: float | str) -> None:
    """Raise ValueError unless ``lam`` is in [0, 1] or ``"auto"``."""
    if isinstance(lam, str):
        if lam != "auto":
            raise ValueError(f"lam must be a number or auto, got {lam!r}")
    elif not 0.0 <= lam <= 1.0:
        raise ValueError(f"lam must lie in [0, 1], got {lam}")


def truncation(blocks: Blocks) -> tuple[Tensor, Tensor]:
    """``(U_A, U_B)`` ``(L, S, r)`` of the best rank-r approximation ``U S V^T`` of ``D`` (FlexLoRA,
    arXiv 2402.11505) in the gauge of the reference: ``A = Q^T a V^T``, ``B = U b Q`` with

    - diagonal ``a b = S`` for which ``B^T B - A A^T = delta I``, as in the mean over the directions
      of the reference, ``delta = (|B_ref|^2 - |A_ref|^2) / r``. Gradient flow conserves this
      difference (Arora et al., ICML 2018), so local training left it nearly as it was;
    - the orthogonal ``Q`` that brings ``A``, ``B`` nearest to the reference.

    With a Gram matrix of ``A`` that is kept, ``B`` grows round by round instead (docs/findings.md).
    """
    _, _, r = blocks.shape
    wide = blocks.double()
    squares, F, vectors = _spectrum(wide)
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


def _spectrum(blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """Squared singular values of ``D`` ``(L, S)``, descending; ``F`` ``(L, S, S)`` with
    ``G_B = F F^T``; eigenvectors ``(L, S, S)`` of ``F^T W G_A W F``. In float64."""
    values, V = torch.linalg.eigh(blocks.B.double())
    F = V * values.clamp_min(0).sqrt()[:, None]
    w = blocks.weights.double().repeat_interleave(blocks.ref_A.shape[-1])
    squares, vectors = torch.linalg.eigh(F.mT @ (w[:, None] * blocks.A.double() * w) @ F)
    return squares.flip(1).clamp_min(0), F, vectors.flip(2)


def _inverse(t: Tensor) -> Tensor:
    """``1 / t``, zero where ``t`` is lost in rounding against the first."""
    kept = t > torch.finfo(t.dtype).eps ** 0.5 * t[:, :1]
    return torch.where(kept, 1 / t, 0.0)


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
        lam: in [0, 1], or ``"auto"``: in each layer the one of least aggregation error.

    Returns:
        ``(A, B)`` as ``align_aggregate``.

    Raises:
        ValueError, TypeError: as ``align_aggregate``.
    """
    check_options(align, lam)

    def solve(blocks: Blocks) -> tuple[Tensor, Tensor]:
        U = blocks.stacked(rotations(blocks, align=align, lam=lam, proper=proper))
        return U, U

    return combined(lora_A, lora_B, ref_A, ref_B, weights, solve)


def combined(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    ref_A: Sequence[Tensor],
    ref_B: Sequence[Tensor],
    weights: Tensor | None,
    solve: Solver,
) -> tuple[list[Tensor], list[Tensor]]:
    """``A = U_A^T stack(A)``, ``B = stack(B) U_B`` of every layer with what ``solve`` finds."""
    layers = len(ref_A)
    if layers == 0 or len(ref_B) != layers or len(lora_A) % layers or len(lora_A) != len(lora_B):
        check(lora_A, lora_B, ref_A, ref_B, weights, 1.0, "joint")
    A, B = list(ref_A), list(ref_B)  # replaced below
    clients = len(lora_A) // layers
    for batch in _batches(ref_A, clients):
        part = [list(t) for t in (lora_A, lora_B, ref_A, ref_B)]
        if len(batch) < layers:
            part = [
                [t[i + layer] for i in range(0, len(t), layers) for layer in batch] for t in part
            ]
        blocks = Blocks.of(part[0], part[1], part[2], part[3], weights)
        _, _, r = blocks.shape
        mixes = (U.reshape(len(batch), clients, r, r) for U in solve(blocks))
        some_A, some_B = torch.ops.fedrot.combine(*part, *mixes)
        for layer, layer_A, layer_B in zip(batch, some_A, some_B, strict=True):
            A[layer], B[layer] = layer_A, layer_B
    return A, B


def _batches(ref_A: Sequence[Tensor], clients: int) -> Iterator[list[int]]:
    """Layers of one rank, so many that their blocks take ``BYTES``."""
    by_rank: dict[int, list[int]] = {}
    for layer, A in enumerate(ref_A):
        by_rank.setdefault(A.shape[0] if A.dim() == 2 else 0, []).append(layer)
    for r, chosen in by_rank.items():
        size = max(1, BYTES // (2 * 4 * max(1, (clients + 1) * r) ** 2))
        for first in range(0, len(chosen), size):
            yield chosen[first : first + size]
