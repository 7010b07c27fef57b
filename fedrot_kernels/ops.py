"""The operators ``torch.ops.fedrot.*``: schema, check, fake and documentation, each once.

Backends (``fedrot_kernels.backends``) call :func:`check` / :func:`check_polar` and register an
implementation per dispatch key with :func:`implement`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

ALIGN_MODES = ("joint", "A", "B")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_library = torch.library.Library("fedrot", "DEF")


# --------------------------------------------------------------------------------------------
# check: one validation for the fake kernels and every backend


@dataclass(frozen=True)
class Problem:
    """The shape of one call, as :func:`check` found it.

    ``shapes[l] = (d, k, r)``; ``ranks[i * L + l]`` is the rank of client ``i`` in layer ``l``.
    """

    clients: int
    layers: int
    shapes: list[tuple[int, int, int]]
    ranks: list[int]
    dtype: torch.dtype  # of the clients
    out_dtype: torch.dtype  # of the reference
    device: torch.device

    @property
    def rank(self) -> int:
        """The largest of the reference: what ``gram`` and ``combine`` pad to."""
        return max(r for _, _, r in self.shapes)

    @property
    def compute_dtype(self) -> torch.dtype:
        """What everything is accumulated in: float64 where any input is float64, else float32."""
        return accumulate_dtype(self.dtype, self.out_dtype)


def accumulate_dtype(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def check(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    ref_A: Sequence[Tensor],
    ref_B: Sequence[Tensor],
    weights: Tensor | None,
    lam: float,
    align: str,
) -> Problem:
    """Validate the arguments of ``align`` and ``align_aggregate``; reads no tensor data.

    Raises:
        ValueError: a length, shape, rank, device or option is wrong; the message names it.
        TypeError: a dtype is wrong.
    """
    check_options(lam, align)
    layers = len(ref_A)
    if len(ref_B) != layers:
        raise ValueError(f"ref_B must hold as many layers as ref_A: {len(ref_B)} != {layers}")
    if len(lora_B) != len(lora_A):
        raise ValueError(
            f"lora_B must hold as many tensors as lora_A: {len(lora_B)} != {len(lora_A)}"
        )
    if layers == 0 or len(lora_A) == 0 or len(lora_A) % layers:
        raise ValueError(
            f"lora_A must hold clients x layers tensors with at least one of each, "
            f"got {len(lora_A)} tensors for {layers} layers"
        )
    clients = len(lora_A) // layers
    first, first_ref = lora_A[0], ref_A[0]
    dtype, out_dtype, device = first.dtype, first_ref.dtype, first.device

    shapes = []
    for layer, (A, B) in enumerate(zip(ref_A, ref_B, strict=True)):
        for name, t in (("ref_A", A), ("ref_B", B)):
            if t.dim() != 2 or t.dtype != out_dtype or t.device != device or 0 in t.shape:
                _explain(name, f"layer {layer}", t, out_dtype, device)
        r, k = A.shape
        d, r_b = B.shape
        if r_b != r:
            raise ValueError(
                f"ref_B[{layer}] must be (d, {r}) to fit ref_A[{layer}] {tuple(A.shape)}, "
                f"got {tuple(B.shape)}"
            )
        shapes.append((d, k, r))
    if out_dtype not in DTYPES:
        raise TypeError(f"ref_A must be {_dtype_names()}, got {out_dtype}")
    if dtype not in DTYPES:
        raise TypeError(f"lora_A must be {_dtype_names()}, got {dtype}")

    ranks = []
    layer = 0
    for index, (A, B) in enumerate(zip(lora_A, lora_B, strict=True)):
        d, k, r = shapes[layer]
        if A.dtype != dtype or B.dtype != dtype or A.device != device or B.device != device:
            where = f"client {index // layers}, layer {layer}"
            _explain("lora_A", where, A, dtype, device)
            _explain("lora_B", where, B, dtype, device)
        shape_a, shape_b = A.shape, B.shape
        r_i = shape_a[0] if len(shape_a) == 2 else 0
        if not 1 <= r_i <= r or shape_a[1] != k or shape_b != (d, r_i):
            _explain_client(index // layers, layer, A, B, d, k, r)
        ranks.append(r_i)
        layer = layer + 1 if layer + 1 < layers else 0

    check_weights(weights, clients, device)
    return Problem(clients, layers, shapes, ranks, dtype, out_dtype, device)


def check_options(lam: float, align: str) -> None:
    """The part of :func:`check` that concerns no tensor."""
    if align not in ALIGN_MODES:
        raise ValueError(f"align must be one of {', '.join(ALIGN_MODES)}, got {align!r}")
    if not 0.0 <= lam <= 1.0:
        raise ValueError(f"lam must lie in [0, 1], got {lam}")


def check_weights(weights: Tensor | None, clients: int, device: torch.device) -> None:
    """The part of :func:`check` that concerns ``weights``; reads no values."""
    if weights is None:
        return
    if weights.dim() != 1 or weights.shape[0] != clients:
        raise ValueError(
            f"weights must be ({clients},), one per client, got {tuple(weights.shape)}"
        )
    if weights.is_complex() or weights.dtype == torch.bool:
        raise TypeError(f"weights must be real numbers, got {weights.dtype}")
    if weights.device != device:
        raise ValueError(f"weights must be on {device} like the factors, got {weights.device}")


def check_polar(M: Tensor) -> None:
    """Validate the argument of ``polar``.

    Raises:
        ValueError: ``M`` is not ``(..., m, n)`` with ``1 <= m <= n``.
        TypeError: ``M`` has an unsupported dtype.
    """
    if M.dtype not in DTYPES:
        raise TypeError(f"M must be {_dtype_names()}, got {M.dtype}")
    if M.dim() < 2 or not 1 <= M.shape[-2] <= M.shape[-1]:
        raise ValueError(f"M must be (..., m, n) with 1 <= m <= n, got {tuple(M.shape)}")


def check_mix(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    mix_A: Tensor,
    mix_B: Tensor,
) -> None:
    """Validate the matrices of ``combine``, all that its other arguments say of them; reads no
    values.

    Raises:
        ValueError: a shape or device is wrong.
        TypeError: the dtype is not that of the accumulation.
    """
    for name, t in (("mix_A", mix_A), ("mix_B", mix_B)):
        if tuple(t.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(t.shape)}")
        if t.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {t.dtype}")
        if t.device != device:
            raise ValueError(f"{name} must be on {device}, got {t.device}")


def check_weight_values(weights: Tensor | None, clients: int) -> list[float]:
    """The weights as floats that sum to 1 (uniform for ``None``); reads the tensor.

    Raises:
        ValueError: a weight is negative or not finite, or all are zero.
    """
    if weights is None:
        return [1.0 / clients] * clients
    values = weights.to(torch.float64).tolist()
    largest = max(values)
    if not (min(values) >= 0.0 and largest > 0.0):
        _explain_weights(values)
    # Divided by the largest first: the sum of finite weights may overflow.
    scaled = [v / largest for v in values]
    total = math.fsum(scaled)
    if math.isnan(total):  # infinity / infinity, or a NaN that min and max passed over
        _explain_weights(values)
    return [v / total for v in scaled]


def check_finite(layers: int, **arguments: Sequence[Tensor]) -> None:
    """Name the first tensor that holds a non-finite value; reads every tensor given.

    ``arguments`` are any of ``lora_A``, ``lora_B`` (client-major) and ``ref_A``, ``ref_B``.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    for name, tensors in arguments.items():
        for index, t in enumerate(tensors):
            if not bool(torch.isfinite(t).all()):
                raise ValueError(
                    f"{name} holds a non-finite value for {place(name, index, layers)}"
                )


def place(name: str, index: int, layers: int) -> str:
    """How messages name the tensor ``index`` of the argument ``name``."""
    client, layer = divmod(index, layers)
    return f"client {client}, layer {layer}" if name.startswith("lora") else f"layer {layer}"


OVERFLOW = (
    "the cross-covariance or the result overflows its dtype; "
    "scale the factors down or use a wider dtype"
)
NOT_COMBINED = "mix_A or mix_B holds a non-finite value, or the result overflows its dtype"


def _explain(name: str, where: str, t: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if t.dtype != dtype:
        raise TypeError(f"{name} must be {dtype} throughout, got {t.dtype} for {where}")
    if t.device != device:
        raise ValueError(f"{name} must be on {device} throughout, got {t.device} for {where}")
    if t.dim() != 2 or 0 in t.shape:
        raise ValueError(
            f"{name} must be a non-empty matrix, got shape {tuple(t.shape)} for {where}"
        )


def _explain_client(client: int, layer: int, A: Tensor, B: Tensor, d: int, k: int, r: int) -> None:
    where = f"client {client}, layer {layer}"
    if A.dim() == 2 and A.shape[1] == k and A.shape[0] > r:
        raise ValueError(
            f"lora_A has rank {A.shape[0]} for {where}, more than the reference's {r}: "
            "averaging would drop part of the update; zero-pad the reference to the larger rank"
        )
    if A.dim() != 2 or A.shape[0] < 1 or A.shape[1] != k:
        raise ValueError(f"lora_A must be (r <= {r}, {k}) for {where}, got {tuple(A.shape)}")
    raise ValueError(f"lora_B must be ({d}, {A.shape[0]}) for {where}, got {tuple(B.shape)}")


def _explain_weights(values: list[float]) -> NoReturn:
    for client, value in enumerate(values):
        if not (math.isfinite(value) and value >= 0.0):
            raise ValueError(f"weights[{client}] must be finite and non-negative, got {value}")
    raise ValueError("weights must have a positive sum, all are zero")


def _dtype_names() -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in DTYPES)


# --------------------------------------------------------------------------------------------
# the operators

_library.define(
    "align_aggregate(Tensor[] lora_A, Tensor[] lora_B, Tensor[] ref_A, Tensor[] ref_B,"
    ' Tensor? weights=None, *, float lam=0.4, str align="joint", bool proper=True)'
    " -> (Tensor[] A, Tensor[] B)"
)
_library.define(
    "align(Tensor[] lora_A, Tensor[] lora_B, Tensor[] ref_A, Tensor[] ref_B,"
    ' *, float lam=0.4, str align="joint", bool proper=True) -> Tensor[]'
)
_library.define("polar(Tensor M, *, bool proper=False) -> Tensor")
_library.define(
    "gram(Tensor[] lora_A, Tensor[] lora_B, Tensor[] ref_A, Tensor[] ref_B)"
    " -> (Tensor gram_A, Tensor gram_B)"
)
_library.define(
    "combine(Tensor[] lora_A, Tensor[] lora_B, Tensor[] ref_A, Tensor[] ref_B,"
    " Tensor mix_A, Tensor mix_B) -> (Tensor[] A, Tensor[] B)"
)
for _name in ("align_aggregate", "align", "polar", "gram", "combine"):
    # Not differentiable: autograd passes by, and outputs never require a gradient.
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")


def align_aggregate(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    ref_A: Sequence[Tensor],
    ref_B: Sequence[Tensor],
    weights: Tensor | None = None,
    *,
    lam: float = 0.4,
    align: str = "joint",
    proper: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    """Rotate every client's LoRA factors toward the reference and average them (FedRot-LoRA).

    Per layer, with ``R_i`` as returned by :func:`align`:
    ``B = sum_i w_i B_i R_i`` and ``A = sum_i w_i R_i^T A_i``, accumulated in float32 (float64
    for float64 inputs) and rounded once. A client of rank ``r_i < r`` is a client zero-padded
    to ``r``. ``lam=0`` is plain factor averaging (FedIT). Factors are used as they are: bring
    clients of different scaling ``lora_alpha / r`` to one scale first.

    Args:
        lora_A: ``N * L`` tensors ``(r_i, k)``, client-major: ``lora_A[i * L + l]``.
        lora_B: ``N * L`` tensors ``(d, r_i)``.
        ref_A: ``L`` tensors ``(r, k)``, the factors from which the clients started the round.
        ref_B: ``L`` tensors ``(d, r)``.
        weights: ``(N,)``, finite, non-negative, normalised to sum 1; ``None`` is uniform.
        lam: soft rotation in [0, 1]; 0 leaves the clients as they are, 1 rotates fully.
        align: ``"joint"``, ``"A"`` or ``"B"``: which factors the rotation is fitted to.
        proper: rotations only (``det R = +1``), no reflections.

    Returns:
        ``(A, B)``: ``L`` tensors ``(r, k)`` and ``L`` tensors ``(d, r)`` in the dtype of the
        reference. Never aliases an input; carries no gradient.

    dtypes are float64, float32, bfloat16, float16, one for all clients and one for the
    reference. A tensor whose last dimension is not contiguous is copied.

    Raises:
        ValueError: a length, shape, rank, device, weight or option is wrong, or (on CPU) a
            value is not finite; the message names argument, client and layer.
        TypeError: a dtype is unsupported or mixed.

    Source: arXiv 2602.23638; the alignment is orthogonal Procrustes (Schoenemann 1966).
    """
    return torch.ops.fedrot.align_aggregate(
        lora_A, lora_B, ref_A, ref_B, weights, lam=lam, align=align, proper=proper
    )


def align(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    ref_A: Sequence[Tensor],
    ref_B: Sequence[Tensor],
    *,
    lam: float = 0.4,
    align: str = "joint",
    proper: bool = True,
) -> list[Tensor]:
    """The rotation of every client and layer that :func:`align_aggregate` applies.

    ``R* = U V^T`` for ``M = U S V^T`` with ``M = A_i A_ref^T`` (``align="A"``),
    ``B_i^T B_ref`` (``"B"``) or their sum (``"joint"``); with ``proper`` the direction of the
    smallest singular value is flipped where ``det`` would be -1. Where ``M`` is rank-deficient
    ``R*`` is the minimal-rotation completion ``lim eps->0+ polar(M + eps I)``. Then
    ``R = polar((1 - lam) I + lam R*)``.

    Arguments and errors as for :func:`align_aggregate`.

    Returns:
        ``N * L`` tensors ``(r_i, r)``, client-major, float32 (float64 for float64 inputs), with
        orthonormal rows.
    """
    return torch.ops.fedrot.align(lora_A, lora_B, ref_A, ref_B, lam=lam, align=align, proper=proper)


def polar(M: Tensor, *, proper: bool = False) -> Tensor:
    """The (semi-)orthogonal polar factor ``U V^T`` of each ``M = U S V^T``.

    Args:
        M: ``(..., m, n)`` with ``m <= n``; float64, float32, bfloat16 or float16.
        proper: the best rotation (``det = +1``) instead of the best orthogonal matrix.

    Returns:
        ``(..., m, n)``, float32 (float64 for float64): orthonormal rows, maximising
        ``trace(R^T M)``. Rank-deficient ``M`` gives ``lim eps->0+ polar(M + eps I)`` for ``M``
        zero-padded to ``(n, n)``, of which the first ``m`` rows are returned; ``M = 0`` gives
        ``I``.

    Raises:
        ValueError: ``M`` is no such matrix, or (on CPU) holds a non-finite value.
        TypeError: the dtype is unsupported.
    """
    return torch.ops.fedrot.polar(M, proper=proper)


def gram(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    ref_A: Sequence[Tensor],
    ref_B: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Gram blocks of every layer: all that r-space methods need to know of the factors.

    With the clients' factors and then the reference's one behind the other, each padded with zeros
    to ``r``, the largest rank of the call, ``gram_A[l] = stack(A_i) stack(A_i)^T`` and
    ``gram_B[l] = stack(B_i)^T stack(B_i)``: rows ``i r`` to ``(i + 1) r`` belong to client ``i``,
    the last ``r`` to the reference.

    Arguments and errors as for :func:`align_aggregate`.

    Returns:
        ``(gram_A, gram_B)``, ``(L, S, S)`` each with ``S = (N + 1) r``, symmetric to the bit,
        float32 (float64 for float64 inputs).
    """
    return torch.ops.fedrot.gram(lora_A, lora_B, ref_A, ref_B)


def combine(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    ref_A: Sequence[Tensor],
    ref_B: Sequence[Tensor],
    mix_A: Tensor,
    mix_B: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """Average the factors with given matrices: what :func:`align_aggregate` does with its
    rotations.

    ``A[l] = sum_i mix_A[l, i]^T A_i`` and ``B[l] = sum_i B_i mix_B[l, i]``, accumulated in float32
    (float64 for float64 inputs) and rounded once. With ``mix_A = mix_B = w_i R_i`` that is the
    weighted average of rotated clients.

    Args:
        lora_A, lora_B: as for :func:`align_aggregate`.
        ref_A, ref_B: give the results their shapes and dtype; their values are not used.
        mix_A, mix_B: ``(L, N, r, r)`` with ``r`` the largest rank of the call, float32 (float64 for
            float64 inputs). Of a client of rank ``r_i`` in a layer of rank ``r_l`` only the first
            ``r_i`` rows and ``r_l`` columns are read.

    Returns:
        ``(A, B)`` as :func:`align_aggregate`.

    Raises:
        ValueError, TypeError: as :func:`align_aggregate`; on CPU only values that reach the result
            need to be finite.
    """
    return torch.ops.fedrot.combine(lora_A, lora_B, ref_A, ref_B, mix_A, mix_B)


@torch.library.register_fake("fedrot::align_aggregate", lib=_library)
def _align_aggregate_fake(
    lora_A, lora_B, ref_A, ref_B, weights=None, *, lam=0.4, align="joint", proper=True
):
    problem = check(lora_A, lora_B, ref_A, ref_B, weights, lam, align)
    A = [ref_A[0].new_empty((r, k)) for _, k, r in problem.shapes]
    B = [ref_B[0].new_empty((d, r)) for d, _, r in problem.shapes]
    return A, B


@torch.library.register_fake("fedrot::align", lib=_library)
def _align_fake(lora_A, lora_B, ref_A, ref_B, *, lam=0.4, align="joint", proper=True):
    problem = check(lora_A, lora_B, ref_A, ref_B, None, lam, align)
    return [
        lora_A[0].new_empty(
            (r_i, problem.shapes[i % problem.layers][2]), dtype=problem.compute_dtype
        )
        for i, r_i in enumerate(problem.ranks)
    ]


@torch.library.register_fake("fedrot::polar", lib=_library)
def _polar_fake(M, *, proper=False):
    check_polar(M)
    return M.new_empty(M.shape, dtype=accumulate_dtype(M.dtype))


@torch.library.register_fake("fedrot::gram", lib=_library)
def _gram_fake(lora_A, lora_B, ref_A, ref_B):
    problem = check(lora_A, lora_B, ref_A, ref_B, None, 0.0, "joint")
    size = (problem.clients + 1) * problem.rank
    shape, dtype = (problem.layers, size, size), problem.compute_dtype
    return lora_A[0].new_empty(shape, dtype=dtype), lora_A[0].new_empty(shape, dtype=dtype)


@torch.library.register_fake("fedrot::combine", lib=_library)
def _combine_fake(lora_A, lora_B, ref_A, ref_B, mix_A, mix_B):
    problem = check(lora_A, lora_B, ref_A, ref_B, None, 0.0, "joint")
    shape = (problem.layers, problem.clients, problem.rank, problem.rank)
    check_mix(shape, problem.compute_dtype, problem.device, mix_A, mix_B)
    A = [ref_A[0].new_empty((r, k)) for _, k, r in problem.shapes]
    B = [ref_B[0].new_empty((d, r)) for d, _, r in problem.shapes]
    return A, B


def implement(name: str, dispatch_key: str, function: Callable[..., Any]) -> None:
    """Register ``function`` as the kernel of ``fedrot::name`` for one dispatch key.

    It runs under ``no_grad``, since the operators are not differentiable.
    """
    _library.impl(name, torch.no_grad()(function), dispatch_key)
