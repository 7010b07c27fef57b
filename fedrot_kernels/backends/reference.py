"""The ground truth: float64 on the CPU, a full SVD per client and layer, written for reading.

Every other backend is compared with this one, and it runs on devices that have no kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedrot_kernels.checks import (
    NOT_COMBINED,
    accumulate_dtype,
    check,
    check_finite,
    check_mix,
    check_polar,
    check_weight_values,
    overflow,
)
from fedrot_kernels.ops import implement


def covariance(A: Tensor, B: Tensor, ref_A: Tensor, ref_B: Tensor, align: str) -> Tensor:
    """``M`` ``(r_i, r)`` of one client and layer."""
    M_A = A @ ref_A.T
    M_B = B.T @ ref_B
    return {"A": M_A, "B": M_B, "joint": M_A + M_B}[align]


def procrustes(M: Tensor, proper: bool, eps: float) -> Tensor:
    """``lim e->0+ polar(M + e I)`` of ``M`` ``(m, n)``, ``m <= n``, zero-padded to ``(n, n)``.

    Returns the first ``m`` rows; with ``proper`` the padded square matrix has ``det = +1``.
    Singular values below ``n * eps`` times the largest count as zero.
    """
    m, n = M.shape
    square = torch.zeros(n, n, dtype=M.dtype)
    square[:m] = M
    return _polar(square, None, 1 if proper else 0, eps)[:m]


def _polar(M: Tensor, scale: float | None, det: int, eps: float) -> Tensor:
    """Polar factor of square ``M`` with determinant ``det`` (0: either).

    ``scale`` is what a singular value must be compared with to count as zero; ``None``: the
    largest one.
    """
    n = M.shape[0]
    U, S, Vh = torch.linalg.svd(M)
    scale = float(S[0]) if scale is None else scale
    rank = int((n * eps * scale < S).sum())
    if rank == 0:
        middle = torch.eye(n, dtype=M.dtype)
        if det == -1:
            middle[-1, -1] = -1.0
        return middle
    middle = torch.eye(n, dtype=M.dtype)
    det *= round(float(torch.linalg.det(U) * torch.linalg.det(Vh)))
    if rank == n:
        if det == -1:
            middle[-1, -1] = -1.0  # the direction of the smallest singular value costs least
    else:
        # M says nothing about the null spaces: rotate one into the other as little as possible.
        middle[rank:, rank:] = _polar(U[:, rank:].T @ Vh[rank:].T, 1.0, det, eps)
    return U @ middle @ Vh


def soften(R: Tensor, lam: float, proper: bool, eps: float) -> Tensor:
    """``polar((1 - lam) I + lam R)`` of square ``R``; an eigenvalue -1 at ``lam = 1/2`` -> +1.

    A rotation (``proper``) has such eigenvalues in pairs, and stays a rotation.
    """
    if lam == 1.0:
        return R
    n = R.shape[0]
    mixed = (1.0 - lam) * torch.eye(n, dtype=R.dtype) + lam * R
    return _polar(mixed, 1.0, 1 if proper else 0, 32 * eps)


def rotation(M: Tensor, lam: float, proper: bool, eps: float) -> Tensor:
    """The soft rotation ``R`` ``(r_i, r)`` of one client and layer from its ``M``."""
    r_i, r = M.shape
    square = torch.zeros(r, r, dtype=M.dtype)
    square[:r_i] = M
    return soften(procrustes(square, proper, eps), lam, proper, eps)[:r_i]


def _float64(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().to("cpu", torch.float64) for t in tensors]


def _rotations(
    factors: list[list[Tensor]], lam: float, align: str, proper: bool, eps: float
) -> list[Tensor]:
    lora_A, lora_B, ref_A, ref_B = factors
    layers = len(ref_A)
    rotations = []
    for index, (A, B) in enumerate(zip(lora_A, lora_B, strict=True)):
        layer = index % layers
        M = covariance(A, B, ref_A[layer], ref_B[layer], align)
        rotations.append(rotation(M, lam, proper, eps))
    return rotations


def align(lora_A, lora_B, ref_A, ref_B, *, lam=0.4, align="joint", proper=True) -> list[Tensor]:
    problem = check(lora_A, lora_B, ref_A, ref_B, None, lam, align)
    check_finite(problem.layers, lora_A=lora_A, lora_B=lora_B, ref_A=ref_A, ref_B=ref_B)
    eps = torch.finfo(problem.compute_dtype).eps
    factors = [_float64(t) for t in (lora_A, lora_B, ref_A, ref_B)]
    rotations = _rotations(factors, lam, align, proper, eps)
    return [R.to(problem.device, problem.compute_dtype, copy=True) for R in rotations]


def align_aggregate(
    lora_A, lora_B, ref_A, ref_B, weights=None, *, lam=0.4, align="joint", proper=True
) -> tuple[list[Tensor], list[Tensor]]:
    problem = check(lora_A, lora_B, ref_A, ref_B, weights, lam, align)
    w = check_weight_values(weights, problem.clients)
    check_finite(problem.layers, lora_A=lora_A, lora_B=lora_B, ref_A=ref_A, ref_B=ref_B)
    eps = torch.finfo(problem.compute_dtype).eps
    factors = [_float64(t) for t in (lora_A, lora_B, ref_A, ref_B)]
    client_A, client_B = factors[:2]
    rotations = _rotations(factors, lam, align, proper, eps)

    out_A = [torch.zeros(r, k, dtype=torch.float64) for _, k, r in problem.shapes]
    out_B = [torch.zeros(d, r, dtype=torch.float64) for d, _, r in problem.shapes]
    for index, R in enumerate(rotations):
        client, layer = divmod(index, problem.layers)
        out_A[layer] += w[client] * (R.T @ client_A[index])
        out_B[layer] += w[client] * (client_B[index] @ R)
    A = [t.to(problem.out_dtype) for t in out_A]
    B = [t.to(problem.out_dtype) for t in out_B]
    if not all(bool(torch.isfinite(t).all()) for t in [*A, *B]):
        raise overflow(lora_A, lora_B, problem.layers, A, B)
    return [t.to(problem.device) for t in A], [t.to(problem.device) for t in B]


def polar(M: Tensor, *, proper: bool = False) -> Tensor:
    check_polar(M)
    dtype = accumulate_dtype(M.dtype)
    m, n = M.shape[-2:]
    matrices = M.detach().to("cpu", torch.float64).reshape(-1, m, n)
    finite = torch.isfinite(matrices).all(dim=(1, 2))
    if not bool(finite.all()):
        raise ValueError(f"M holds a non-finite value in matrix {int(finite.int().argmin())}")
    eps = torch.finfo(dtype).eps
    factors = [procrustes(matrix, proper, eps) for matrix in matrices]
    stacked = torch.stack(factors) if factors else matrices
    return stacked.reshape(M.shape).to(M.device, dtype, copy=True)


def gram(lora_A, lora_B, ref_A, ref_B) -> tuple[Tensor, Tensor]:
    problem = check(lora_A, lora_B, ref_A, ref_B, None, 0.0, "joint")
    check_finite(problem.layers, lora_A=lora_A, lora_B=lora_B, ref_A=ref_A, ref_B=ref_B)
    r = problem.rank
    blocks_A, blocks_B = [], []
    for layer in range(problem.layers):
        A = _float64([*lora_A[layer :: problem.layers], ref_A[layer]])
        B = _float64([*lora_B[layer :: problem.layers], ref_B[layer]])
        stacked_A = torch.cat([pad(t, (0, 0, 0, r - t.shape[0])) for t in A])
        stacked_B = torch.cat([pad(t, (0, r - t.shape[1])) for t in B], 1)
        blocks_A.append(stacked_A @ stacked_A.T)
        blocks_B.append(stacked_B.T @ stacked_B)
    both = [torch.stack(t).to(problem.compute_dtype) for t in (blocks_A, blocks_B)]
    if not all(bool(torch.isfinite(t).all()) for t in both):
        raise overflow(lora_A, lora_B, problem.layers, *both)
    gram_A, gram_B = (t / 2 + t.mT / 2 for t in both)  # symmetric to the bit
    return gram_A.to(problem.device), gram_B.to(problem.device)


def combine(lora_A, lora_B, ref_A, ref_B, mix_A, mix_B) -> tuple[list[Tensor], list[Tensor]]:
    problem = check(lora_A, lora_B, ref_A, ref_B, None, 0.0, "joint")
    shape = (problem.layers, problem.clients, problem.rank, problem.rank)
    check_mix(shape, problem.compute_dtype, problem.device, mix_A, mix_B)
    client_A, client_B, left, right = (_float64(t) for t in (lora_A, lora_B, mix_A, mix_B))
    out_A = [torch.zeros(r, k, dtype=torch.float64) for _, k, r in problem.shapes]
    out_B = [torch.zeros(d, r, dtype=torch.float64) for d, _, r in problem.shapes]
    for index, r_i in enumerate(problem.ranks):
        client, layer = divmod(index, problem.layers)
        r = problem.shapes[layer][2]
        out_A[layer] += left[layer][client, :r_i, :r].T @ client_A[index]
        out_B[layer] += client_B[index] @ right[layer][client, :r_i, :r]
    A = [t.to(problem.out_dtype) for t in out_A]
    B = [t.to(problem.out_dtype) for t in out_B]
    if not all(bool(torch.isfinite(t).all()) for t in [*A, *B]):
        check_finite(problem.layers, lora_A=lora_A, lora_B=lora_B)
        raise ValueError(NOT_COMBINED)
    return [t.to(problem.device) for t in A], [t.to(problem.device) for t in B]


def register(dispatch_key: str) -> None:
    """Make this the implementation of every operator for one dispatch key."""
    for function in (align_aggregate, align, polar, gram, combine):
        implement(function.__name__, dispatch_key, function)
