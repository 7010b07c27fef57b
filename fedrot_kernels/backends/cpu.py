"""The native C++ kernels on the CPU (``csrc/cpu``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter

from fedrot_kernels.native import load
from fedrot_kernels.ops import (
    ALIGN_MODES,
    DTYPES,
    OVERFLOW,
    accumulate_dtype,
    check,
    check_finite,
    check_options,
    check_polar,
    check_weight_values,
    check_weights,
    implement,
)
from fedrot_kernels.plan import implement as implement_plan

_cpu = load("_cpu")
instruction_set: str = _cpu.instruction_set

# lora_A, lora_B, ref_A, ref_B
Factors = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def _reader() -> Any:
    """Reads plain tensors natively (torch >= 2.10), about ten times as fast as from Python."""
    try:
        return _cpu.Reader(Tensor.__dlpack_c_exchange_api__, (Tensor, Parameter))
    except (AttributeError, TypeError, ValueError):
        return None


_native = _reader()


def _tables(factors: Factors, weights: Tensor | None, lam: float, align: str) -> Any:
    """Check a call; its native tables, and the factors that they point into."""
    tables = _native and _native.read(*factors)
    if tables is None:
        return _checked_tables(factors, weights, lam, align)
    check_options(lam, align)
    check_weights(weights, tables.clients, factors[0][0].device)
    return tables, factors


def _checked_tables(factors: Factors, weights: Tensor | None, lam: float, align: str) -> Any:
    """``_tables`` where ``check`` has to find what is wrong, or a tensor has to be copied."""
    problem = check(*factors, weights, lam, align)
    lora_A, lora_B, ref_A, ref_B = map(_rows_contiguous, factors)
    factors = (lora_A, lora_B, ref_A, ref_B)
    tables = _cpu.Tables(
        problem.shapes,
        problem.ranks,
        [[t.data_ptr() for t in tensors] for tensors in factors],
        [[t.stride(0) for t in tensors] for tensors in factors],
        DTYPES.index(problem.dtype),
        DTYPES.index(problem.out_dtype),
    )
    return tables, factors


def _rows_contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous() for t in tensors]


def _explain(factors: Factors) -> NoReturn:
    """Say which value was not finite; the kernels only say that one was."""
    names = ("lora_A", "lora_B", "ref_A", "ref_B")
    check_finite(len(factors[2]), **dict(zip(names, factors, strict=True)))
    raise ValueError(OVERFLOW)


def plan(
    factors: Factors,
    weights: Tensor | None,
    A: list[Tensor],
    B: list[Tensor],
    lam: float,
    align: str,
    proper: bool,
) -> Callable[[], None]:
    """Check everything but the values of ``align_aggregate``; each call of the result reads the
    values and fills ``A`` and ``B``."""
    tables, factors = _tables(factors, weights, lam, align)
    outputs = _cpu.Outputs(
        [t.data_ptr() for t in A],
        [t.stride(0) for t in A],
        [t.data_ptr() for t in B],
        [t.stride(0) for t in B],
    )
    clients, mode = tables.clients, ALIGN_MODES.index(align)

    def run() -> None:
        w = check_weight_values(weights, clients)
        threads = torch.get_num_threads()
        if not _cpu.align_aggregate(tables, w, lam, mode, proper, outputs, threads):
            _explain(factors)

    return run


def align_aggregate(
    lora_A, lora_B, ref_A, ref_B, weights=None, *, lam=0.4, align="joint", proper=True
) -> tuple[list[Tensor], list[Tensor]]:
    A = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in ref_A]
    B = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in ref_B]
    plan((lora_A, lora_B, ref_A, ref_B), weights, A, B, lam, align, proper)()
    return A, B


def align(lora_A, lora_B, ref_A, ref_B, *, lam=0.4, align="joint", proper=True) -> list[Tensor]:
    tables, factors = _tables((lora_A, lora_B, ref_A, ref_B), None, lam, align)
    dtype = accumulate_dtype(lora_A[0].dtype, ref_A[0].dtype)
    ranks = [t.shape[0] for t in ref_A] * tables.clients
    rotations = [
        torch.empty(A.shape[0], r, dtype=dtype, device=A.device)
        for A, r in zip(lora_A, ranks, strict=True)
    ]
    fine = _cpu.align(
        tables,
        lam,
        ALIGN_MODES.index(align),
        proper,
        [R.data_ptr() for R in rotations],
        torch.get_num_threads(),
    )
    if not fine:
        _explain(factors)
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
    implement_plan("cpu", plan)
