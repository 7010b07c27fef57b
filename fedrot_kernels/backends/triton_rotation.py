"""The r x r mathematics in Triton: from cross-covariances to rotations, one program a matrix.

``csrc/math`` holds the same methods for other compilers and argues for them. A matrix is one tile
of ``P x P`` values, ``P`` the power of two at or above ``n``, and zero outside of the block of
rows and columns ``lo <= i < hi`` that a function works on.

Two kernels a stage: the first takes every matrix through Newton's iteration and flags what is
singular to working precision, the second takes the flagged ones through the orthogonal
decomposition that is right for any rank.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fedrot_kernels.backends.triton_table import (
    CLIENT_ROW,
    FIRST_UNIT,
    LAYER_ROW,
    RANK,
    RANK_OF_LAYER,
    ROTATION,
    SLOT,
    UNIT_ROW,
    UNITS,
    client_weight,
)

# Beyond these sizes of a tile, in bytes, nothing passes through shared memory as a whole.
_SHARED_TILE = tl.constexpr(64 * 1024)
_DOT_TILE = tl.constexpr(16 * 1024)


@triton.jit
def _epsilon(X):
    return 1.1920928955078125e-07 if X.dtype == tl.float32 else 2.220446049250313e-16


@triton.jit
def _column(X, j, P: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, P)[None, :] == j, X, 0.0), 1)


@triton.jit
def _row(X, index, P: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, P)[:, None] == index, X, 0.0), 0)


@triton.jit
def _at(x, index, P: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, P) == index, x, tl.zeros_like(x)), 0)


@triton.jit
def _identity(like, lo, hi, P: tl.constexpr):
    index = tl.arange(0, P)
    inside = (index >= lo) & (index < hi)
    return ((index[:, None] == index[None, :]) & inside[:, None]).to(like.dtype)


@triton.jit
def _product(A, B, n, FORM: tl.constexpr, P: tl.constexpr):
    """``A B``, ``A^T B`` or ``A B^T`` for FORM "nn", "tn", "nt", over an inner dimension n."""
    if P >= 16 and A.dtype == tl.float32 and P * P * 4 <= _DOT_TILE:
        if FORM == "tn":
            A = tl.trans(A)
        if FORM == "nt":
            B = tl.trans(B)
        C = tl.dot(A, B, input_precision="ieee")
    else:
        C = tl.zeros((P, P), A.dtype)
        for p in range(n):
            a = _row(A, p, P) if FORM == "tn" else _column(A, p, P)
            b = _column(B, p, P) if FORM == "nt" else _row(B, p, P)
            C += a[:, None] * b[None, :]
    return C


@triton.jit
def _inverse_transposed(X, lo, hi, P: tl.constexpr):
    """``X^-T`` of the block by Gauss-Jordan with partial pivoting, and the sign of its
    determinant: 0 where a pivot is zero, the inverse is then meaningless.

    Rows stay where they are: ``order[c]`` is the pivot row of column ``c``, ``place`` the reverse.
    """
    index = tl.arange(0, P)
    i, j = index[:, None], index[None, :]
    order, place = index, index
    free = (index >= lo) & (index < hi)
    sign = 1
    for c in range(lo, hi):
        column = _column(X, c, P)
        size, p = tl.max(tl.where(free, tl.abs(column), -1.0), 0, return_indices=True)
        pivot = _at(column, p, P)
        row = tl.where(index == c, 1.0, _row(X, p, P)) / pivot
        column = tl.where(index == p, 0.0, column)
        # Column c has moved out of the way: what stands in its place is the inverse's.
        X = tl.where(j == c, 0.0, X) - column[:, None] * row[None, :]
        X = tl.where(i == p, row[None, :], X)
        free = free & (index != p)
        order = tl.where(index == c, p, order)
        place = tl.where(index == p, c, place)
        sign = tl.where(size > 0, tl.where(pivot < 0, -sign, sign), 0)
    inversions = tl.sum(((order[:, None] > order[None, :]) & (i < j)).to(tl.int32))
    sign = tl.where(inversions % 2 == 1, -sign, sign)
    # X[i, k] belongs at [order[k], place[i]].
    if P * P * X.dtype.primitive_bitwidth // 8 <= _SHARED_TILE:
        X = tl.gather(X, tl.broadcast_to(order[:, None], (P, P)), 0)
        X = tl.trans(tl.gather(X, tl.broadcast_to(place[None, :], (P, P)), 1))
    else:
        Y = X
        for k in range(lo, hi):
            Y = tl.where(i == _at(order, k, P), _column(X, k, P)[None, :], Y)
        X = Y
        for k in range(lo, hi):
            X = tl.where(j == _at(place, k, P), _column(Y, k, P)[:, None], X)
    return X, sign


@triton.jit
def _newton(X, lo, hi, limit, P: tl.constexpr):
    """The orthogonal polar factor of the block by scaled Newton iteration, and the sign of
    ``det X``: 0 where ``|X^-1|`` is not below ``limit``, the factor is then meaningless."""
    sign = 1
    step = 0
    going = True
    while going:
        Y, det = _inverse_transposed(X, lo, hi, P)
        norm_X, norm_Y = tl.sqrt(tl.sum(X * X)), tl.sqrt(tl.sum(Y * Y))
        if step == 0:
            sign = tl.where(norm_Y < limit, det, 0)
        sign = tl.where(det == 0, 0, sign)
        gain = tl.sqrt(norm_Y / norm_X)
        new = (0.5 * gain) * X + (0.5 / gain) * Y
        change = tl.sum((new - X) * (new - X))
        X = new
        step += 1
        # Quadratic: a step this small leaves an error of about its square.
        going = (sign != 0) & (change > _epsilon(X) * (hi - lo)) & (step < 40)
    return X, sign


@triton.jit
def _flip_smallest(R, M, lo, hi, P: tl.constexpr):
    """``R (I - 2 v v^T)``, ``v`` the direction of the smallest singular value of ``M``, whose
    polar factor is ``R``: ``M^-1 R = V S^-1 V^T``, and squaring doubles the gap."""
    index = tl.arange(0, P)
    W, _ = _inverse_transposed(M, lo, hi, P)
    W = _product(W, R, hi, "tn", P)
    squarings = 24 if R.dtype == tl.float32 else 53  # tells a gap of one rounding
    step = 0
    going = True
    while going:
        W = W / tl.sqrt(tl.sum(W * W))
        W = _product(W, W, hi, "tn", P)
        W = W / tl.sum(tl.where(index[:, None] == index[None, :], W, 0.0))
        step += 1
        # The squared norm is 1 for a matrix of rank one and trace 1.
        going = (tl.sum(W * W) < 1 - 4 * _epsilon(R)) & (step < squarings)
    diagonal = tl.sum(tl.where(index[:, None] == index[None, :], W, 0.0), 0)
    v = _row(W, tl.argmax(diagonal, 0), P)
    v = v / tl.sqrt(tl.sum(v * v, 0))
    image = tl.sum(R * v[None, :], 1)
    return R - 2.0 * image[:, None] * v[None, :]


@triton.jit
def _householder(x, k, P: tl.constexpr):
    """``v`` such that ``(I - 2 v v^T) x`` is a multiple of ``e_k``; ``x`` is zero before ``k``."""
    index = tl.arange(0, P)
    norm = tl.sqrt(tl.sum(x * x, 0))
    head = _at(x, k, P)
    length = tl.sqrt(2.0 * norm * (norm + tl.abs(head)))
    v = tl.where(index == k, head + tl.where(head < 0, -norm, norm), x) / length
    return tl.where(length > 0, v, (index == k).to(x.dtype))


@triton.jit
def _reflect_rows(X, v):
    return X - 2.0 * v[:, None] * tl.sum(v[:, None] * X, 0)[None, :]


@triton.jit
def _reflect_columns(X, v):
    return X - 2.0 * tl.sum(X * v[None, :], 1)[:, None] * v[None, :]


@triton.jit
def _decompose(X, U, V, lo, n, scale, tolerance, P: tl.constexpr):
    """The block ``lo <= i < n`` of ``X`` as ``U' [T 0; 0 0] V'^T``, ``T`` in ``lo <= i < hi``.

    Returns ``T``, ``U U'``, ``V V'`` and ``hi``. What is below ``tolerance`` times ``scale`` (the
    largest column where that is 0) counts as zero. ``det U' det V' = 1``: as many reflections.
    """
    index = tl.arange(0, P)
    i, j = index[:, None], index[None, :]
    free = (index >= lo) & (index < n)
    hi = lo
    going = lo < n
    while going:  # QR with column pivoting, columns stay where they are
        squares = tl.sum(tl.where(i >= hi, X * X, 0.0), 0)
        size, p = tl.max(tl.where(free, squares, -1.0), 0, return_indices=True)
        size = tl.sqrt(size)
        scale = tl.where(scale > 0, scale, size)
        going = size > tolerance * scale
        if going:
            v = _householder(tl.where(index >= hi, _column(X, p, P), 0.0), hi, P)
            X = tl.where((j == p) & (i > hi), 0.0, _reflect_rows(X, v))
            U = _reflect_columns(U, v)
            free = free & (index != p)
            hi += 1
            going = hi < n
    X = tl.where(i < hi, X, 0.0)
    for k in range(lo, hi):  # LQ
        v = _householder(tl.where(index >= k, _row(X, k, P), 0.0), k, P)
        X = tl.where((i == k) & (j > k), 0.0, _reflect_columns(X, v))
        V = _reflect_columns(V, v)
    return X, U, V, hi


@triton.jit
def _polar_of_any_rank(X, n, det, scale, tolerance, P: tl.constexpr):
    """``lim eps->0+ polar(X + eps I)``: ``U [polar(T) 0; 0 C] V^T`` with ``X = U [T 0; 0 0] V^T``,
    where ``C = polar(U_2^T V_2)`` joins the null spaces: the same problem in the block that is
    left. ``det`` is the determinant wanted, 0 for either."""
    index = tl.arange(0, P)
    i, j = index[:, None], index[None, :]
    U = _identity(X, 0, n, P)
    V = U
    middle = tl.zeros((P, P), X.dtype)
    lo = 0
    while lo < n:
        X, U, V, hi = _decompose(X, U, V, lo, n, scale, tolerance, P)
        if hi == lo:  # no evidence left: the identity, reflected where the determinant asks
            hi = n
            last = (i == n - 1) & (j == n - 1) & (det < 0)
            middle += tl.where(last, -1.0, _identity(X, lo, n, P))
        else:
            block, sign = _newton(X, lo, hi, float("inf"), P)
            if det != 0:
                if hi < n:
                    det = det * sign
                elif sign != det:
                    block = _flip_smallest(block, X, lo, hi, P)
            middle += block
        X = tl.where((i >= hi) & (j >= hi), _product(U, V, n, "tn", P), 0.0)
        scale = tl.full((), 1.0, X.dtype)
        lo = hi
    return _product(_product(U, middle, n, "nn", P), V, n, "nt", P)


@triton.jit
def _rotation(
    X, rank, n, lam, STAGES: tl.constexpr, PROPER: tl.constexpr, ANY: tl.constexpr, P: tl.constexpr
):
    """``R`` of ``X``, and whether it has to be done again, for ANY rank. STAGES of it: 0 the
    identity, 1 ``R* = polar(X)``, 2 ``polar((1 - lam) I + lam R*)``. NaN where ``X`` is not finite.
    """
    eye = _identity(X, 0, n, P)
    finite = tl.min((tl.abs(X) < float("inf")).to(tl.int32)) > 0
    X = tl.where(finite, X, eye)
    largest = tl.max(tl.abs(X))
    X = X / tl.where(largest > 0, largest, 1.0)
    tolerance = _epsilon(X) * n.to(X.dtype)
    scale = tl.full((), 0.0, X.dtype)
    det = tl.full((), 1 if PROPER else 0, tl.int32)
    done = True
    if not ANY:
        # Rows of zeros are singular, whatever the others are.
        done = (rank == n) | (finite == 0)
    for stage in range(STAGES):
        if stage == 1:
            X = lam * X + (1.0 - lam) * eye
            # At lam = 1/2 an eigenvalue -1 leaves a zero as small as R*'s own rounding.
            scale = tl.full((), 1.0, X.dtype)
            tolerance = 32.0 * tolerance
        if ANY:
            X = _polar_of_any_rank(X, n, det, scale, tolerance, P)
        elif done:
            M = X
            size = tl.where(scale > 0, scale, tl.sqrt(tl.max(tl.sum(X * X, 0), 0)))
            X, sign = _newton(X, 0, n, 1.0 / (size * tolerance), P)
            done = sign != 0
            if PROPER:  # noqa: SIM102 (known when compiling, the other is not)
                if sign < 0:
                    X = _flip_smallest(X, M, 0, n, P)
    if STAGES == 0:
        X = eye
    return tl.where(finite, X, float("nan")), done


@triton.jit(do_not_specialize=["m", "n"])
def polar_kernel(
    M,  # (matrices, m, n)
    out,  # the same
    flags,  # (matrices,) int32, zero before the first stage and after the second
    m,
    n,
    PROPER: tl.constexpr,
    ANY: tl.constexpr,
    P: tl.constexpr,
):
    matrix = tl.program_id(0).to(tl.int64)
    wanted = True
    if ANY:
        wanted = tl.load(flags + matrix) != 0
    if wanted:
        i, j = tl.arange(0, P)[:, None], tl.arange(0, P)[None, :]
        at = matrix * m * n + i * n + j
        inside = (i < m) & (j < n)
        X = tl.load(M + at, inside, 0.0)
        R, done = _rotation(X, m, n, 1.0, 1, PROPER, ANY, P)
        tl.store(out + at, R, inside)
        tl.store(flags + matrix, tl.where(done, 0, 1))


@triton.jit(
    do_not_specialize=[
        "layers_at",
        "clients_at",
        "units_at",
        "first_layer",
        "layers",
        "clients",
        "lam_bits",
    ]
)
def rotation_kernel(
    table,
    layers_at,  # offsets of the sections of the table
    clients_at,
    units_at,
    partials,
    weights,  # (clients,) float64 where WEIGHTS is "given"
    flags,  # (clients * layers,) int32, zero before the first stage and after the second
    first_layer,
    layers,
    clients,
    lam_bits,  # of a float64: as a number it would be rounded to float32
    WEIGHTS: tl.constexpr,  # times R: "given", normalised; "uniform"; "none"
    STAGES: tl.constexpr,
    PROPER: tl.constexpr,
    ANY: tl.constexpr,
    P: tl.constexpr,
):
    """R of one layer and client from its partial cross-covariances, times the client's weight."""
    layer, client = first_layer + tl.program_id(0), tl.program_id(1)
    flag = flags + client * layers + layer
    wanted = True
    if ANY:
        wanted = tl.load(flag) != 0
    if wanted:
        layer_row = table + layers_at + layer * LAYER_ROW
        client_row = table + clients_at + (client * layers + layer) * CLIENT_ROW
        n = tl.load(layer_row + RANK_OF_LAYER).to(tl.int32)
        rank = tl.load(client_row + RANK).to(tl.int32)
        i, j = tl.arange(0, P)[:, None], tl.arange(0, P)[None, :]
        inside = (i < rank) & (j < n)
        X = tl.zeros((P, P), partials.dtype.element_ty)
        unit_row = table + units_at + tl.load(layer_row + FIRST_UNIT) * UNIT_ROW
        for _ in range(tl.load(layer_row + UNITS).to(tl.int32)):
            slot = tl.load(unit_row + SLOT) + client.to(tl.int64) * n * n
            X += tl.load(partials + slot + i * n + j, inside, 0.0)
            unit_row += UNIT_ROW
        lam = lam_bits.to(tl.float64, bitcast=True).to(X.dtype)
        R, done = _rotation(X, rank, n, lam, STAGES, PROPER, ANY, P)
        if WEIGHTS == "given":
            R = R * client_weight(weights, client, clients).to(X.dtype)
        if WEIGHTS == "uniform":
            R = R / clients.to(X.dtype)
        out = tl.load(client_row + ROTATION).to(tl.pointer_type(X.dtype), bitcast=True)
        tl.store(out + i * n + j, R, inside)
        tl.store(flag, tl.where(done, 0, 1))
