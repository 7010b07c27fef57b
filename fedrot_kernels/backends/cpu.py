"""The native C++ kernels on the CPU (``csrc/cpu``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedrot_kernels.native import load
from fedrot_kernels.ops import (
    ALIGN_MODES,
    DTYPES,
    OVERFLOW,
    Problem,
    accumulate_dtype,
    check,
    check_finite,
    check_polar,
    check_weight_values,
    implement,
)

_cpu = load("_cpu")
instruction_set: str = _cpu.instruction_set


def _rows_contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous() for t in tensors]


def _call(problem: Problem, factors: list[list[Tensor]], weights, lam, align, proper):
    return _cpu.Call(
        problem.shapes,
        problem.ranks,
        [[t.data_ptr() for t in tensors] for tensors in factors],
        [[t.stride(0) for t in tensors] for tensors in factors],
        weights,
        DTYPES.index(problem.dtype),
        DTYPES.index(problem.out_dtype),
        lam,
        ALIGN_MODES.index(align),
        proper,
    )


def _check_values(
    problem: Problem,
    factors: list[list[Tensor]],
    lam: float,
    align: str,
    *,
    averaged: bool,
    fine: bool,
) -> None:
    """Non-finite input is an error. ``fine`` is the kernels' word on what they read, so only the
    rest is looked at here: of the client factors, where they are not averaged (``averaged``
    is False), and of the reference, what no covariance was made from."""
    names = {"lora_A", "lora_B", "ref_A", "ref_B"}
    if fine:
        for side in ("A", "B"):
            covariance = lam > 0 and align in (side, "joint")
            if covariance:
                names.discard(f"ref_{side}")
            if covariance or averaged:
                names.discard(f"lora_{side}")
    given = dict(zip(("lora_A", "lora_B", "ref_A", "ref_B"), factors, strict=True))
    check_finite(problem.layers, **{name: t for name, t in given.items() if name in names})
    if not fine:
        raise ValueError(OVERFLOW)


def align_aggregate(
    lora_A, lora_B, ref_A, ref_B, weights=None, *, lam=0.4, align="joint", proper=True
) -> tuple[list[Tensor], list[Tensor]]:
    problem = check(lora_A, lora_B, ref_A, ref_B, weights, lam, align)
    w = check_weight_values(weights, problem.clients)
    factors = [_rows_contiguous(t) for t in (lora_A, lora_B, ref_A, ref_B)]
    A = [
        torch.empty(r, k, dtype=problem.out_dtype, device=problem.device)
        for _, k, r in problem.shapes
    ]
    B = [
        torch.empty(d, r, dtype=problem.out_dtype, device=problem.device)
        for d, _, r in problem.shapes
    ]
    fine = _cpu.align_aggregate(
        _call(problem, factors, w, lam, align, proper),
        [t.data_ptr() for t in A],
        [t.stride(0) for t in A],
        [t.data_ptr() for t in B],
        [t.stride(0) for t in B],
        torch.get_num_threads(),
    )
    _check_values(problem, factors, lam, align, averaged=True, fine=fine)
    return A, B


def align(lora_A, lora_B, ref_A, ref_B, *, lam=0.4, align="joint", proper=True) -> list[Tensor]:
    problem = check(lora_A, lora_B, ref_A, ref_B, None, lam, align)
    w = check_weight_values(None, problem.clients)
    factors = [_rows_contiguous(t) for t in (lora_A, lora_B, ref_A, ref_B)]
    rotations = [
        torch.empty(
            r_i,
            problem.shapes[i % problem.layers][2],
            dtype=problem.compute_dtype,
            device=problem.device,
        )
        for i, r_i in enumerate(problem.ranks)
    ]
    call = _call(problem, factors, w, lam, align, proper)
    fine = _cpu.align(call, [R.data_ptr() for R in rotations], torch.get_num_threads())
    _check_values(problem, factors, lam, align, averaged=False, fine=fine)
    return rotations


def polar(M: Tensor, *, proper: bool = False) -> Tensor:
    check_polar(M)
    dtype = accumulate_dtype(M.dtype)
    m, n = M.shape[-2:]
    matrices = M.to(dtype).contiguous()
    out = torch.empty(M.shape, dtype=dtype, device=M.device)
    bad = _cpu.polar(
        matrices.data_ptr(),
        out.data_ptr(),
        matrices.numel() // (m * n),
        m,
        n,
        dtype == torch.float64,
        proper,
        torch.get_num_threads(),
    )
    if bad >= 0:
        raise ValueError(f"M holds a non-finite value in matrix {bad}")
    return out


def register() -> None:
    """Make this the implementation of every operator on CPU tensors."""
    for function in (align_aggregate, align, polar):
        implement(function.__name__, "CPU", function)
