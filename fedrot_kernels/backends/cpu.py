"""The native C++ kernels on the CPU (``csrc/cpu``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from fedrot_kernels.checks import (
    ALIGN_MODES,
    NOT_COMBINED,
    accumulate_dtype,
    check_finite,
    check_mix,
    check_polar,
    check_weight_values,
    overflow,
)
from fedrot_kernels.native import load
from fedrot_kernels.ops import implement
from fedrot_kernels.plan import Flat
from fedrot_kernels.plan import implement as implement_plan
from fedrot_kernels.tables import Factors, empty_outputs, empty_rotations, outputs, read

_cpu = load("_cpu")
instruction_set: str = _cpu.instruction_set


def _explain(factors: Factors, *results: Sequence[Tensor] | Tensor) -> NoReturn:
    """Say which value was not finite; the kernels only say that one was."""
    names = ("lora_A", "lora_B", "ref_A", "ref_B")
    check_finite(len(factors[2]), **dict(zip(names, factors, strict=True)))
    raise overflow(*factors[:2], len(factors[2]), *results)


class Runner:
    """``align_aggregate`` with everything checked but the values."""

    def __init__(
        self,
        factors: Factors,
        weights: Tensor | None,
        A: list[Tensor],
        B: list[Tensor],
        lam: float,
        align: str,
        proper: bool,
        flat: Flat | None = None,
    ) -> None:
        self._tables, self._factors = read(factors, weights, lam, align)
        if flat is not None:
            self._factors = ([], [], *self._factors[2:])
        self._weights, self._outputs = weights, outputs(A, B)
        self._kept = A, B  # the table holds addresses alone
        self._options = lam, ALIGN_MODES.index(align), proper
        self._flat = flat
        self._addresses = self._bases()

    def run(self) -> None:
        tables = self._tables
        w = check_weight_values(self._weights, tables.clients)
        threads = torch.get_num_threads()
        if not _cpu.align_aggregate(tables, w, *self._options, self._outputs, threads):
            lora = self._flat.factors() if self._flat else self._factors[:2]
            _explain((*lora, *self._factors[2:]), *self._kept)

    def rebind(self) -> None:
        bases = self._bases()
        self._tables.move([new - old for old, new in zip(self._addresses, bases, strict=True)])
        self._addresses = bases

    def _bases(self) -> list[int]:
        return [buffer.data_ptr() for buffer in self._flat.buffers] if self._flat else []


def align_aggregate(
    lora_A, lora_B, ref_A, ref_B, weights=None, *, lam=0.4, align="joint", proper=True
) -> tuple[list[Tensor], list[Tensor]]:
    A, B = empty_outputs(ref_A, ref_B)
    Runner((lora_A, lora_B, ref_A, ref_B), weights, A, B, lam, align, proper).run()
    return A, B


def align(lora_A, lora_B, ref_A, ref_B, *, lam=0.4, align="joint", proper=True) -> list[Tensor]:
    tables, factors = read((lora_A, lora_B, ref_A, ref_B), None, lam, align)
    rotations = empty_rotations(factors)
    fine = _cpu.align(
        tables,
        lam,
        ALIGN_MODES.index(align),
        proper,
        [R.data_ptr() for R in rotations],
        torch.get_num_threads(),
    )
    if not fine:
        _explain(factors, rotations)
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


def gram(lora_A, lora_B, ref_A, ref_B) -> tuple[Tensor, Tensor]:
    tables, factors = read((lora_A, lora_B, ref_A, ref_B), None, 0.0, "joint")
    r = max(r for _, _, r in tables.shapes)
    size = (tables.clients + 1) * r
    dtype = accumulate_dtype(lora_A[0].dtype, ref_A[0].dtype)
    gram_A, gram_B = (torch.empty(len(ref_A), size, size, dtype=dtype) for _ in range(2))
    threads = torch.get_num_threads()
    if not _cpu.gram(tables, r, gram_A.data_ptr(), gram_B.data_ptr(), threads):
        _explain(factors, gram_A, gram_B)
    return gram_A, gram_B


def combine(lora_A, lora_B, ref_A, ref_B, mix_A, mix_B) -> tuple[list[Tensor], list[Tensor]]:
    tables, factors = read((lora_A, lora_B, ref_A, ref_B), None, 0.0, "joint")
    r = max(r for _, _, r in tables.shapes)
    dtype = accumulate_dtype(lora_A[0].dtype, ref_A[0].dtype)
    check_mix((len(ref_A), tables.clients, r, r), dtype, ref_A[0].device, mix_A, mix_B)
    A, B = empty_outputs(ref_A, ref_B)
    mix_A, mix_B = mix_A.contiguous(), mix_B.contiguous()
    table, threads = outputs(A, B), torch.get_num_threads()
    if not _cpu.combine(tables, r, mix_A.data_ptr(), mix_B.data_ptr(), table, threads):
        check_finite(len(ref_A), lora_A=factors[0], lora_B=factors[1])
        raise ValueError(NOT_COMBINED)
    return A, B


def register() -> None:
    """Make this the implementation of every operator on CPU tensors."""
    for function in (align_aggregate, align, polar, gram, combine):
        implement(function.__name__, "CPU", function)
    implement_plan("cpu", Runner)
