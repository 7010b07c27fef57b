"""Two passes over the factors in Triton: cross-covariances, and averages with matrices.

A step of either multiplies ``STACK`` stacked rows of A (columns of B): those of several clients
where a rank is below the 16 that matrix units want, else of one client or a part of it.
Row ``m`` of a stack is row ``m % P`` of client ``m // P`` for rank tiles ``P`` below ``STACK``.
"""

from __future__ import annotations

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
from fedrot_kernels.backends.triton_tiles import mask, multiply, pointers, tile, widen


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
def _multiply_split(factor, matrix, acc, MATRIX_FIRST: tl.constexpr):
    """``acc`` plus the product of a 16-bit factor and a matrix, which is a sum of two 16-bit
    values: a rotation rounded to one would no longer be orthogonal."""
    high = matrix.to(factor.dtype)
    low = (matrix - high.to(tl.float32)).to(factor.dtype)
    if MATRIX_FIRST:
        acc = multiply(high, factor, multiply(low, factor, acc))
    else:
        acc = multiply(factor, high, multiply(factor, low, acc))
    return acc


@triton.jit
def _multiply_exactly(factor, matrix, acc, MATRIX_FIRST: tl.constexpr, MIX: tl.constexpr):
    """``acc`` plus the product; with MIX of a matrix of any size, else of a rotation."""
    if factor.dtype.primitive_bitwidth == 16 and acc.dtype == tl.float32:
        if MIX and factor.dtype.is_fp16():
            # Only a bfloat16 has room for the matrix, and only two for the factor.
            wide = factor.to(tl.float32)
            high = wide.to(tl.bfloat16)
            low = (wide - high.to(tl.float32)).to(tl.bfloat16)
            acc = _multiply_split(low, matrix, acc, MATRIX_FIRST)
            acc = _multiply_split(high, matrix, acc, MATRIX_FIRST)
        else:
            acc = _multiply_split(factor, matrix, acc, MATRIX_FIRST)
    elif MATRIX_FIRST:
        acc = multiply(matrix, widen(factor, acc), acc)
    else:
        acc = multiply(widen(factor, acc), matrix, acc)
    return acc


_SIZES = ["layers_at", "clients_at", "units_at", "first_unit", "layers", "clients", "rank"]


@triton.jit(do_not_specialize=_SIZES[:-1])
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
            a = tl.load(tile(own, position, CLIENT, VECTOR_A), mask(exists, inside, VECTOR_A), 0.0)
            b = tl.load(
                tile(ref_A, position, REFERENCE, VECTOR_A),
                mask(wanted, inside, VECTOR_A),
                0.0,
            )
            acc = multiply(a, tl.trans(b), acc)
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
                pointers(at, CLIENT, VECTOR_B),
                mask(inside, exists, VECTOR_B),
                0.0,
            )
            rows_of_ref = ref_B + position * stride_of_ref * REFERENCE_BYTES
            a = tl.load(
                tile(rows_of_ref, column, REFERENCE, VECTOR_B),
                mask(inside, wanted, VECTOR_B),
                0.0,
            )
            acc = multiply(tl.trans(b), a, acc)

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
    mix_A,  # with MIX (layers, clients, rank, rank), else not read
    mix_B,
    rank,
    MIX: tl.constexpr,
    ACCUMULATE: tl.constexpr,  # dtypes
    CLIENT: tl.constexpr,
    OUT: tl.constexpr,
    VECTOR_A: tl.constexpr,  # elements that a row of A, of B is always a multiple of
    VECTOR_B: tl.constexpr,
    P: tl.constexpr,  # power of two at or above every rank
    STACK: tl.constexpr,
    BLOCK: tl.constexpr,  # positions at a time
):
    """``sum_i R_i^T A_i`` or ``sum_i B_i R_i`` at the positions of one unit. ``R_i`` is with MIX
    the client's of ``mix_A`` or ``mix_B``, else its rotation, multiplied by its weight already."""
    COLUMNS: tl.constexpr = P if P > 16 else 16
    CLIENT_BYTES: tl.constexpr = CLIENT.primitive_bitwidth // 8
    ACCUMULATE_BYTES: tl.constexpr = ACCUMULATE.primitive_bitwidth // 8
    OUT_BYTES: tl.constexpr = OUT.primitive_bitwidth // 8
    # float16 ends at 6e-8: small weights are kept above by a power of two.
    HALF: tl.constexpr = CLIENT.is_fp16() and ACCUMULATE.is_fp32() and not MIX
    SCALE: tl.constexpr = 16384.0 if HALF else 1.0
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
    length = rank if MIX else r  # of a row of R
    mix = tl.where(on_A, mix_A.to(tl.int64), mix_B.to(tl.int64))
    mix += layer.to(tl.int64) * clients * rank * rank * ACCUMULATE_BYTES

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
                    tile(own, position, CLIENT, VECTOR_A), mask(exists, inside, VECTOR_A), 0.0
                )
                if MIX:
                    R = mix + client.to(tl.int64) * rank * rank * ACCUMULATE_BYTES
                else:
                    R = tl.load(client_row + ROTATION, exists, 0)
                R += row * length * ACCUMULATE_BYTES
                R = tl.load(
                    tile(R, column, ACCUMULATE, VECTOR_B), mask(exists, wanted, VECTOR_B), 0.0
                )
                acc = _multiply_exactly(a, tl.trans(R * SCALE), acc, True, MIX)
            tl.store(
                tile(out, position, OUT, VECTOR_A),
                (acc / SCALE).to(OUT),
                mask(wanted, inside, VECTOR_A),
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
                    pointers(at, CLIENT, VECTOR_B),
                    mask(inside, exists, VECTOR_B),
                    0.0,
                )
                if MIX:
                    R = mix + client.to(tl.int64) * rank * rank * ACCUMULATE_BYTES
                else:
                    R = tl.load(client_row + ROTATION, exists, 0)
                R += row * length * ACCUMULATE_BYTES
                R = tl.load(
                    tile(R, column, ACCUMULATE, VECTOR_B), mask(exists, wanted, VECTOR_B), 0.0
                )
                acc = _multiply_exactly(b, R * SCALE, acc, False, MIX)
            out = tl.load(layer_row + OUT_B) + position * stride_out * OUT_BYTES
            tl.store(
                tile(out, column, OUT, VECTOR_B),
                (acc / SCALE).to(OUT),
                mask(inside, wanted, VECTOR_B),
            )
