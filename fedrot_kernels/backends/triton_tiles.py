"""Tiles of factors in Triton: where their elements lie, and their products."""

from __future__ import annotations

import os

import triton
import triton.language as tl

# The interpreter would multiply the bit patterns of bfloat16.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def pointers(addresses, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Addresses (rows, columns) as pointers that come in runs of VECTOR along a row, each run at a
    multiple of its size: what a load needs to know to move up to 16 bytes at once."""
    BYTES: tl.constexpr = DTYPE.primitive_bitwidth // 8
    at = addresses.to(tl.pointer_type(DTYPE), bitcast=True)
    return tl.max_contiguous(tl.multiple_of(at, [1, VECTOR * BYTES]), [1, VECTOR])


@triton.jit
def tile(rows, columns, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Pointers to the elements ``columns`` of the rows at the addresses ``rows``."""
    BYTES: tl.constexpr = DTYPE.primitive_bitwidth // 8
    return pointers(rows[:, None] + columns[None, :] * BYTES, DTYPE, VECTOR)


@triton.jit
def mask(rows, columns, VECTOR: tl.constexpr):
    """Rows and columns that are there; columns come in whole runs."""
    return tl.max_constancy(rows[:, None] & columns[None, :], [1, VECTOR])


@triton.jit
def widen(x, acc):
    """A matrix in the type of ``acc``."""
    wide = x.to(acc.dtype)
    if acc.dtype == tl.float64 and x.dtype.primitive_bitwidth == 16:
        # Triton lays operands of a product out by the type that they were loaded in, and has no
        # product of float64 for the layout of 16 bits; a sum over nothing makes it forget that.
        wide = tl.sum(wide[:, :, None], 2)
    return wide


@triton.jit
def multiply(a, b, acc):
    """``acc + a b``: products of 16-bit values are exact, wider ones are of the wider type."""
    if a.dtype != b.dtype or _INTERPRETED:
        a, b = widen(a, acc), widen(b, acc)
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)
