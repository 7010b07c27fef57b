"""What the operators check of their arguments, once for the fake kernels and every backend."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

ALIGN_MODES = ("joint", "A", "B")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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
    check_fraction("lam", lam)


def check_fraction(name: str, value: float) -> None:
    """Raise ValueError unless the number lies in [0, 1]."""
    check_number(name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


def check_number(name: str, value: float) -> None:
    """Raise TypeError unless it can be compared with one. The schemas of the operators say so
    themselves; `Plan` and what is in Python alone have none."""
    try:
        bool(value > 0.0)
    except (TypeError, ValueError, RuntimeError) as error:  # the last two of several elements
        raise TypeError(f"{name} must be a number, got {value!r}") from error


def check_weights(weights: Tensor | None, clients: int, device: torch.device) -> None:
    """The part of :func:`check` that concerns ``weights``; reads no values."""
    if weights is None:
        return
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights must be a tensor ({clients},), got {type(weights).__name__}")
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
        TypeError: a tensor is sparse, or of another layout that has no plain values.
    """
    for name, tensors in arguments.items():
        for index, t in enumerate(tensors):
            if t.layout != torch.strided:
                where = place(name, index, layers)
                raise TypeError(f"{name} must be dense for {where}, got {t.layout}")
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


def overflow(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    layers: int,
    *results: Sequence[Tensor] | Tensor,
) -> ValueError:
    """What to raise where finite factors gave ``results`` that are not, entry ``[i * layers + l]``
    for layer ``l``; names the layer of the first that is not, and the client to look at there."""
    for index, t in itertools.chain.from_iterable(map(enumerate, results)):
        if not bool(torch.isfinite(t).all()):
            layer = index % layers
            pairs = zip(lora_A[layer::layers], lora_B[layer::layers], strict=True)
            sizes = [max(float(A.abs().max()), float(B.abs().max())) for A, B in pairs]
            largest = sizes.index(max(sizes))
            return ValueError(f"{OVERFLOW} (layer {layer}; the largest client there is {largest})")
    return ValueError(OVERFLOW)


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
