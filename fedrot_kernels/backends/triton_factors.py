"""The two passes over the factors in Triton: cross-covariances, and rotated averages.

A step of either multiplies ``STACK`` stacked rows of A (columns of B): those of several clients
where a rank is below the 16 that matrix units want, else of one client or a part of it.
Row ``m`` of a stack is row ``m % P`` of client ``m // P`` for rank tiles ``P`` below ``STACK``.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from fedrot_kernels.backends.triton_table import (
    BEGIN,
    CLIENT_ROW,
    END,
    LAYER,
    LAYER_ROW,
    LORA_A,
    LORA_B,
    OUT_A,
    OUT_B,
    RANK,
    RANK_OF_LAYER,
    REF_A,
    REF_B,
    ROTATION,
    SIDE,
    SLOT,
    UNIT_ROW,
)

# The interpreter would multiply the bit patterns of bfloat16.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _pointers(addresses, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Addresses (rows, columns) as pointers that come in runs of VECTOR along a row, each run at a
    multiple of its size: what a load needs to know to move up to 16 bytes at once."""
    BYTES: tl.constexpr = DTYPE.primitive_bitwidth // 8
    pointers = addresses.to(tl.pointer_type(DTYPE), bitcast=True)
    return tl.max_contiguous(tl.multiple_of(pointers, [1, VECTOR * BYTES]), [1, VECTOR])


@triton.jit
def _tile(rows, columns, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Pointers to the elements ``columns`` of the rows at the addresses ``rows``."""
    BYTES: tl.constexpr = DTYPE.primitive_bitwidth // 8
    return _pointers(rows[:, None] + columns[None, :] * BYTES, DTYPE, VECTOR)


@triton.jit
def _mask(rows, columns, VECTOR: tl.constexpr):
    """Rows and columns that are there; columns come in whole runs."""
    return tl.max_constancy(rows[:, None] & columns[None, :], [1, VECTOR])


@triton.jit
def _stacked(step, clients, P: tl.constexpr, STACK: tl.constexpr):
    """Client and row of every row of a stack, and whether there is such a client."""
    m = tl.arange(0, STACK)
    if P < STACK:
        client = step * (STACK // P) + m // P
        row = m % P
    else:
        client = tl.zeros_like(m) + step // (P // STACK)
        row = step % (P // STACK) * STACK + m
    return client, row, client < clients


@triton.jit
def _multiply(a, b, acc):
    """``acc + a b``: products of 16-bit values are exact, wider ones are of the wider type."""
    if a.dtype != b.dtype or _INTERPRETED:
        a, b = a.to(acc.dtype), b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def _multiply_exactly(factor, rotation, acc, ROTATION_FIRST: tl.constexpr):
    """``acc`` plus the product. For 16-bit factors the rotation is a sum of two 16-bit values:
    rounded to one it would no longer be orthogonal."""
    if factor.dtype.primitive_bitwidth == 16 and acc.dtype == tl.float32:
        high = rotation.to(factor.dtype)
        low = (rotation - high.to(tl.float32)).to(factor.dtype)
        if ROTATION_FIRST:
            acc = _multiply(high, factor, _multiply(low, factor, acc))
        else:
            acc = _multiply(factor, high, _multiply(factor, low, acc))
    elif ROTATION_FIRST:
        acc = _multiply(rotation, factor.to(acc.dtype), acc)
    else:
        acc = _multiply(factor.to(acc.dtype), rotation, acc)
    return acc


_SIZES = ["layers_at", "clients_at", "units_at", "first_unit", "layers", "clients"]


@triton.jit(do_not_specialize=_SIZES)
def covariance_kernel(
    table,
    layers_at,  # offsets of the sections of the table
    clients_at,
    units_at,
    partials,
    first_unit,
    layers,
    clients,
    CLIENT: tl.constexpr,  # dtypes
    REFERENCE: tl.constexpr,
    VECTOR_A: tl.constexpr,  # elements that a row of A, of B is always a multiple of
    VECTOR_B: tl.constexpr,
    P: tl.constexpr,  # power of two at or above every rank
    STACK: tl.constexpr,
    BLOCK: tl.constexpr,  # positions a step
):
    """The partial M of one unit and stack: ``A_i A_ref^T`` or ``B_i^T B_ref`` of its positions."""
    COLUMNS: tl.constexpr = P if P > 16 else 16
    CLIENT_BYTES: tl.constexpr = CLIENT.primitive_bitwidth // 8
    REFERENCE_BYTES: tl.constexpr = REFERENCE.primitive_bitwidth // 8
    unit_row = table + units_at + (first_unit + tl.program_id(0)) * UNIT_ROW
    layer = tl.load(unit_row + LAYER).to(tl.int32)
    begin, end = tl.load(unit_row + BEGIN), tl.load(unit_row + END)
    layer_row = table + layers_at + layer * LAYER_ROW
    r = tl.load(layer_row + RANK_OF_LAYER).to(tl.int32)

    client, row, exists = _stacked(tl.program_id(1), clients, P, STACK)
    client_row = table + clients_at + (client * layers + layer) * CLIENT_ROW
    base = tl.load(table + client, exists, 0)
    exists = exists & (row < tl.load(client_row + RANK, exists, 0))
    column = tl.arange(0, COLUMNS)
    wanted = column < r
    acc = tl.zeros((STACK, COLUMNS), partials.dtype.element_ty)

    if tl.load(unit_row + SIDE) == 0:
        stride = tl.load(client_row + LORA_A + 1, exists, 0)
        own = base + tl.load(client_row + LORA_A, exists, 0) + row * stride * CLIENT_BYTES
        stride_of_ref = tl.load(layer_row + REF_A + 1)
        ref_A = tl.load(layer_row + REF_A) + column * stride_of_ref * REFERENCE_BYTES
        for first in range(begin, end, BLOCK):
            position = first + tl.arange(0, BLOCK)
            inside = position < end
            a = tl.load(
                _tile(own, position, CLIENT, VECTOR_A), _mask(exists, inside, VECTOR_A), 0.0
            )
            b = tl.load(
                _tile(ref_A, position, REFERENCE, VECTOR_A),
                _mask(wanted, inside, VECTOR_A),
                0.0,
            )
            acc = _multiply(a, tl.trans(b), acc)
    else:
        stride = tl.load(client_row + LORA_B + 1, exists, 0)
        own = base + tl.load(client_row + LORA_B, exists, 0) + row * CLIENT_BYTES
        stride_of_ref = tl.load(layer_row + REF_B + 1)
        ref_B = tl.load(layer_row + REF_B)
        for first in range(begin, end, BLOCK):
            position = first + tl.arange(0, BLOCK)
            inside = position < end
            at = own[None, :] + position[:, None] * (stride * CLIENT_BYTES)[None, :]
            b = tl.load(
                _pointers(at, CLIENT, VECTOR_B),
                _mask(inside, exists, VECTOR_B),
                0.0,
            )
            rows_of_ref = ref_B + position * stride_of_ref * REFERENCE_BYTES
            a = tl.load(
                _tile(rows_of_ref, column, REFERENCE, VECTOR_B),
                _mask(inside, wanted, VECTOR_B),
                0.0,
            )
            acc = _multiply(tl.trans(b), a, acc)

    slot = tl.load(unit_row + SLOT) + client.to(tl.int64) * r * r + row * r
    tl.store(partials + slot[:, None] + column[None, :], acc, exists[:, None] & wanted[None, :])


@triton.jit(do_not_specialize=_SIZES)
def apply_kernel(
    table,
    layers_at,  # offsets of the sections of the table
    clients_at,
    units_at,
    first_unit,
    layers,
    clients,
    ACCUMULATE: tl.constexpr,  # dtypes
    CLIENT: tl.constexpr,
    OUT: tl.constexpr,
    VECTOR_A: tl.constexpr,  # elements that a row of A, of B is always a multiple of
    VECTOR_B: tl.constexpr,
    P: tl.constexpr,  # power of two at or above every rank
    STACK: tl.constexpr,
    BLOCK: tl.constexpr,  # positions at a time
):
    """``sum_i R_i^T A_i`` or ``sum_i B_i R_i`` at the positions of one unit; ``R_i`` comes
    multiplied by the weight of its client."""
    COLUMNS: tl.constexpr = P if P > 16 else 16
    CLIENT_BYTES: tl.constexpr = CLIENT.primitive_bitwidth // 8
    ACCUMULATE_BYTES: tl.constexpr = ACCUMULATE.primitive_bitwidth // 8
    OUT_BYTES: tl.constexpr = OUT.primitive_bitwidth // 8
    # float16 ends at 6e-8: small weights are kept above by a power of two.
    SCALE: tl.constexpr = 16384.0 if CLIENT.is_fp16() and ACCUMULATE.is_fp32() else 1.0
    unit_row = table + units_at + (first_unit + tl.program_id(0)) * UNIT_ROW
    layer = tl.load(unit_row + LAYER).to(tl.int32)
    begin, end = tl.load(unit_row + BEGIN), tl.load(unit_row + END)
    on_A = tl.load(unit_row + SIDE) == 0
    layer_row = table + layers_at + layer * LAYER_ROW
    clients_of_layer = table + clients_at + layer * CLIENT_ROW
    r = tl.load(layer_row + RANK_OF_LAYER).to(tl.int32)
    column = tl.arange(0, COLUMNS)
    wanted = column < r
    steps = tl.cdiv(clients * P, STACK)

    if on_A:
        stride_out = tl.load(layer_row + OUT_A + 1)
        out = tl.load(layer_row + OUT_A) + column * stride_out * OUT_BYTES
        for first in range(begin, end, BLOCK):
            position = first + tl.arange(0, BLOCK)
            inside = position < end
            acc = tl.zeros((COLUMNS, BLOCK), ACCUMULATE)
            for step in range(steps):
                client, row, exists = _stacked(step, clients, P, STACK)
                client_row = clients_of_layer + client * layers * CLIENT_ROW
                exists = exists & (row < tl.load(client_row + RANK, exists, 0))
                stride = tl.load(client_row + LORA_A + 1, exists, 0)
                own = tl.load(table + client, exists, 0) + tl.load(client_row + LORA_A, exists, 0)
                own += row * stride * CLIENT_BYTES
                a = tl.load(
                    _tile(own, position, CLIENT, VECTOR_A), _mask(exists, inside, VECTOR_A), 0.0
                )
                R = tl.load(client_row + ROTATION, exists, 0) + row * r * ACCUMULATE_BYTES
                R = tl.load(
                    _tile(R, column, ACCUMULATE, VECTOR_B), _mask(exists, wanted, VECTOR_B), 0.0
                )
                acc = _multiply_exactly(a, tl.trans(R * SCALE), acc, True)
            tl.store(
                _tile(out, position, OUT, VECTOR_A),
                (acc / SCALE).to(OUT),
                _mask(wanted, inside, VECTOR_A),
            )
    else:
        stride_out = tl.load(layer_row + OUT_B + 1)
        for first in range(begin, end, BLOCK):
            position = first + tl.arange(0, BLOCK)
            inside = position < end
            acc = tl.zeros((BLOCK, COLUMNS), ACCUMULATE)
            for step in range(steps):
                client, row, exists = _stacked(step, clients, P, STACK)
                client_row = clients_of_layer + client * layers * CLIENT_ROW
                exists = exists & (row < tl.load(client_row + RANK, exists, 0))
                stride = tl.load(client_row + LORA_B + 1, exists, 0)
                own = tl.load(table + client, exists, 0) + tl.load(client_row + LORA_B, exists, 0)
                own += row * CLIENT_BYTES
                at = own[None, :] + position[:, None] * (stride * CLIENT_BYTES)[None, :]
                b = tl.load(
                    _pointers(at, CLIENT, VECTOR_B),
                    _mask(inside, exists, VECTOR_B),
                    0.0,
                )
                R = tl.load(client_row + ROTATION, exists, 0) + row * r * ACCUMULATE_BYTES
                R = tl.load(
                    _tile(R, column, ACCUMULATE, VECTOR_B), _mask(exists, wanted, VECTOR_B), 0.0
                )
                acc = _multiply_exactly(b, R * SCALE, acc, False)
            out = tl.load(layer_row + OUT_B) + position * stride_out * OUT_BYTES
            tl.store(
                _tile(out, column, OUT, VECTOR_B),
                (acc / SCALE).to(OUT),
                _mask(inside, wanted, VECTOR_B),
            )
