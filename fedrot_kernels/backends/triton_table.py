"""The device table of a call (``csrc/device.h``) as Triton kernels read it."""

from __future__ import annotations

import triton
import triton.language as tl

# Integers a row, and the columns.
LAYER_ROW = tl.constexpr(13)
D, K, RANK_OF_LAYER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Of each matrix the address; its stride follows.
REF_A, REF_B = tl.constexpr(3), tl.constexpr(5)
OUT_A, OUT_B = tl.constexpr(7), tl.constexpr(9)
FIRST_UNIT, UNITS = tl.constexpr(11), tl.constexpr(12)

CLIENT_ROW = tl.constexpr(6)
LORA_A, LORA_B = tl.constexpr(0), tl.constexpr(2)
RANK, ROTATION = tl.constexpr(4), tl.constexpr(5)

UNIT_ROW = tl.constexpr(5)
LAYER, SIDE, BEGIN, END, SLOT = (tl.constexpr(column) for column in range(5))


@triton.jit
def client_weight(weights, client, clients):
    """The weight of a client, normalised to sum 1, in float64; NaN where any weight is invalid."""
    BLOCK: tl.constexpr = 128
    largest = tl.zeros((BLOCK,), tl.float64)
    valid = tl.full((BLOCK,), 1, tl.int32)
    for first in range(0, clients, BLOCK):
        at = first + tl.arange(0, BLOCK)
        w = tl.load(weights + at, at < clients, 0.0)
        valid = valid & ((w >= 0) & (w < float("inf"))).to(tl.int32)
        largest = tl.maximum(largest, w)
    scale = tl.max(largest, 0)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, clients, BLOCK):
        at = first + tl.arange(0, BLOCK)
        # Divided by the largest first: the sum of finite weights may overflow.
        total += tl.load(weights + at, at < clients, 0.0) / scale
    weight = tl.load(weights + client) / scale / tl.sum(total, 0)
    return tl.where((tl.min(valid, 0) > 0) & (scale > 0), weight, float("nan"))
