"""Gram blocks in Triton: the directions of all clients and of the reference against each other.

Direction ``s`` of a factor is row ``s % rank`` of A, column of B, of client ``s // rank``, where
``rank`` is the largest of the call and the reference is the client behind the last. A program
multiplies two stacks of ``TILE`` directions over a part of the positions; stacks above the diagonal
are the transposes of those below.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fedrot_kernels.backends.triton_table import (
    CLIENT_ROW,
    LAYER_ROW,
    LORA_A,
    LORA_B,
    RANK,
    RANK_OF_LAYER,
    REF_A,
    REF_B,
    D,
    K,
)
from fedrot_kernels.backends.triton_tiles import mask, multiply, pointers, tile, widen


@triton.jit
def _load(
    own,  # (directions,) addresses of their first elements
    stride,
    exists,
    position,
    inside,
    ON_A: tl.constexpr,
    DTYPE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Directions x positions."""
    if ON_A:
        x = tl.load(tile(own, position, DTYPE, VECTOR), mask(exists, inside, VECTOR), 0.0)
    else:
        stride *= DTYPE.primitive_bitwidth // 8
        at = own[None, :] + position[:, None] * stride[None, :]
        x = tl.load(pointers(at, DTYPE, VECTOR), mask(inside, exists, VECTOR), 0.0)
        x = tl.trans(x)
    return x


@triton.jit
def _stack(
    table,
    layer_row,
    client_rows,
    direction,
    layers,
    clients,
    rank,
    ON_A: tl.constexpr,
    CLIENT: tl.constexpr,
    REFERENCE: tl.constexpr,
):
    """Address, stride and existence of directions: those of the clients, and those of the
    reference, which are among the clients' where all dtypes are the same."""
    LORA: tl.constexpr = LORA_A if ON_A else LORA_B
    REF: tl.constexpr = REF_A if ON_A else REF_B
    client, row = direction // rank, direction % rank
    own, of_ref = client < clients, client == clients
    client_row = client_rows + client * layers * CLIENT_ROW
    base = tl.load(table + client, own, 0) + tl.load(client_row + LORA, own, 0)
    stride = tl.load(client_row + LORA + 1, own, 0)
    own = own & (row < tl.load(client_row + RANK, own, 0))

    of_ref = of_ref & (row < tl.load(layer_row + RANK_OF_LAYER))
    base_of_ref = tl.where(of_ref, tl.load(layer_row + REF), 0)
    stride_of_ref = tl.where(of_ref, tl.load(layer_row + REF + 1), 0)
    if CLIENT == REFERENCE:
        base, stride = base + base_of_ref, stride + stride_of_ref
        own = own | of_ref
    apart = row * stride if ON_A else row
    apart_of_ref = row * stride_of_ref if ON_A else row
    return (
        base + apart * (CLIENT.primitive_bitwidth // 8),
        stride,
        own,
        base_of_ref + apart_of_ref * (REFERENCE.primitive_bitwidth // 8),
        stride_of_ref,
        of_ref,
    )


@triton.jit
def _load_stack(
    stack,
    position,
    inside,
    ON_A: tl.constexpr,
    CLIENT: tl.constexpr,
    REFERENCE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Directions x positions; zero where there are none."""
    base, stride, own, base_of_ref, stride_of_ref, of_ref = stack
    x = _load(base, stride, own, position, inside, ON_A, CLIENT, VECTOR)
    if CLIENT != REFERENCE:
        ref = _load(base_of_ref, stride_of_ref, of_ref, position, inside, ON_A, REFERENCE, VECTOR)
        zero = tl.zeros((1, 1), ACCUMULATE)
        x = widen(x, zero) + widen(ref, zero)
    return x


@triton.jit
def _place(gram, i, j, size):
    """Pointers to the elements ``i x j`` of a matrix, and which of them there are."""
    return gram + i[:, None].to(tl.int64) * size + j[None, :], (i < size)[:, None] & (j < size)


@triton.jit
def _store_both(gram, G, i, j, size):
    """The products of the directions ``i`` and ``j`` to both sides of the diagonal: to the bit the
    same, which those within a stack are to rounding only."""
    G = tl.where(i[:, None] >= j[None, :], G, tl.trans(G))
    at, there = _place(gram, i, j, size)
    tl.store(at, G, there)
    at, there = _place(gram, j, i, size)
    tl.store(at, tl.trans(G), there)


@triton.jit(do_not_specialize=["layers_at", "clients_at", "layers", "clients", "rank"])
def gram_kernel(
    table,
    layers_at,  # offsets of the sections of the table
    clients_at,
    gram,  # (layers, size, size), size = (clients + 1) * rank
    partials,  # (layers, parts, size, size), read by gram_sum_kernel; not used for one part
    layers,
    clients,
    rank,
    ON_A: tl.constexpr,
    CLIENT: tl.constexpr,  # dtypes
    REFERENCE: tl.constexpr,
    VECTOR: tl.constexpr,  # elements that a row of the factors is always a multiple of
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,  # positions a step
):
    """``A A^T`` or ``B^T B`` of two stacks over one part of the positions of a layer."""
    size = (clients + 1) * rank
    stacks = tl.cdiv(size, TILE)
    row, column = tl.program_id(0) // stacks, tl.program_id(0) % stacks
    if row >= column:
        layer, part, parts = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
        layer_row = table + layers_at + layer * LAYER_ROW
        client_rows = table + clients_at + layer * CLIENT_ROW
        i, j = row * TILE + tl.arange(0, TILE), column * TILE + tl.arange(0, TILE)
        x = _stack(table, layer_row, client_rows, i, layers, clients, rank, ON_A, CLIENT, REFERENCE)
        y = _stack(table, layer_row, client_rows, j, layers, clients, rank, ON_A, CLIENT, REFERENCE)
        ACCUMULATE: tl.constexpr = gram.dtype.element_ty
        positions = tl.load(layer_row + (K if ON_A else D))
        length = tl.cdiv(tl.cdiv(positions, parts), BLOCK) * BLOCK
        begin = part * length
        end = tl.minimum(begin + length, positions)
        acc = tl.zeros((TILE, TILE), ACCUMULATE)
        for first in range(begin, end, BLOCK):
            position = first + tl.arange(0, BLOCK)
            inside = position < end
            a = _load_stack(x, position, inside, ON_A, CLIENT, REFERENCE, ACCUMULATE, VECTOR)
            b = _load_stack(y, position, inside, ON_A, CLIENT, REFERENCE, ACCUMULATE, VECTOR)
            acc = multiply(a, tl.trans(b), acc)

        square = size.to(tl.int64) * size
        if parts == 1:
            _store_both(gram + layer * square, acc, i, j, size)
        else:
            at, there = _place(partials + (layer * parts + part) * square, i, j, size)
            tl.store(at, acc, there)


@triton.jit(do_not_specialize=["size", "parts"])
def gram_sum_kernel(partials, gram, size, parts, TILE: tl.constexpr):
    """The partial products of two stacks of a layer, added in their order."""
    stacks = tl.cdiv(size, TILE)
    row, column = tl.program_id(0) // stacks, tl.program_id(0) % stacks
    if row >= column:
        layer = tl.program_id(1)
        i, j = row * TILE + tl.arange(0, TILE), column * TILE + tl.arange(0, TILE)
        square = size.to(tl.int64) * size
        acc = tl.zeros((TILE, TILE), gram.dtype.element_ty)
        for part in range(parts):
            at, there = _place(partials + (layer * parts + part) * square, i, j, size)
            acc += tl.load(at, there, 0.0)
        _store_both(gram + layer * square, acc, i, j, size)
