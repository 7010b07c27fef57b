"""What one round did to its uploads, measured in r-space."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

import fedrot_kernels  # noqa: F401  (registers torch.ops.fedrot)
from fedrot.factors import Factors, client_major, naming_layers, within_range
from fedrot_kernels.checks import check_weight_values


def aggregation_error(
    uploads: Sequence[Factors],
    aggregate: Factors,
    weights: Tensor | None = None,
    folded: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """``||sum_i w_i B_i A_i - B A||_F`` of each layer, in float64.

    ``folded``: what the server added to the frozen weights besides, ``(d, k)`` by layer; it is
    subtracted as well. Without it no ``d x k`` matrix is formed: with the factors side by side,
    ``left = [w_1 B_1 .. w_N B_N, -B]`` and ``right = [A_1; ..; A_N; A]``, the squared norm is
    ``<left^T left, right right^T>``.
    """
    w = check_weight_values(weights, len(uploads))
    errors = {}
    for name, B in aggregate.B.items():
        left = torch.cat(
            [w[i] * u.B[name].double() for i, u in enumerate(uploads)] + [-B.double()], 1
        )
        right = torch.cat([u.A[name].double() for u in uploads] + [aggregate.A[name].double()])
        if folded:
            errors[name] = float(torch.linalg.matrix_norm(left @ right - folded[name].double()))
            continue
        # QR first: the difference of Gram blocks alone would lose half of the digits.
        R_left = torch.linalg.qr(left, mode="r").R
        R_right = torch.linalg.qr(right.T, mode="r").R
        errors[name] = float(torch.linalg.matrix_norm(R_left @ R_right.T))
    return errors


def total(errors: Mapping[str, float]) -> float:
    """The Frobenius norm over all layers together."""
    return math.sqrt(sum(e * e for e in errors.values()))


def _padded(t: Tensor, amount: Sequence[int]) -> Tensor:
    """With no copy where nothing is added."""
    return pad(t, amount) if any(amount) else t


def rotation_angles(
    uploads: Sequence[Factors], reference: Factors, align: str = "joint", proper: bool = True
) -> Tensor:
    """How far each client is turned away from the reference, ``(N, L)`` in degrees.

    The mean of the ``r`` principal angles (eigenvalues ``exp(+-i theta)``) of the hard rotation
    ``R*``: 0 where the bases agree. A client of smaller rank counts as zero-padded.
    """
    lora_A, lora_B = client_major([within_range(upload) for upload in uploads])
    ref_A, ref_B = list(reference.A.values()), list(reference.B.values())
    ranks = [A.shape[0] for A in ref_A] * len(uploads)
    with naming_layers(reference):
        rotations = torch.ops.fedrot.align(
            [_padded(A, (0, 0, 0, r - A.shape[0])) for A, r in zip(lora_A, ranks, strict=True)],
            [_padded(B, (0, r - B.shape[1])) for B, r in zip(lora_B, ranks, strict=True)],
            ref_A,
            ref_B,
            lam=1.0,
            align=align,
            proper=proper,
        )
    angles = [torch.linalg.eigvals(R.double()).angle().abs().mean() for R in rotations]
    return torch.rad2deg(torch.stack(angles)).reshape(len(uploads), len(ref_A))
