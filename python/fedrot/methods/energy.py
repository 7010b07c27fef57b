"""Ranks by energy: singular values of an average, and the rank that holds a share of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedrot.factors import Factors
from fedrot.methods.base import stacked


def singular_values(
    uploads: Sequence[Factors], weights: Tensor | None = None, *, rounding: bool = False
) -> dict[str, Tensor]:
    """Those of the exact average ``sum_i w_i B_i A_i`` of each layer: ``(n,)`` float64, descending.

    With the factors side by side and ``left = Q L``, ``right^T = P R``, they are those of
    ``L R^T``, at most ``sum_i r_i`` square; no ``d x k`` matrix is formed. ``n`` is the numerical
    rank: what lies below ``max(d, k) eps max_i |w_i B_i A_i|`` is rounding of the factors, whose
    ``eps`` this is (float32's for narrower ones), and left out. With one client that is the rule of
    ``torch.linalg.matrix_rank``; measuring against the clients' products rather than their average
    makes an average of zero have none. With ``rounding`` nothing is left out.
    """
    values = {}
    for name, B in uploads[0].B.items():
        ranks = [u.A[name].shape[0] for u in uploads]
        layer = [Factors({name: u.A[name].double()}, {name: u.B[name].double()}) for u in uploads]
        left, right = stacked(layer, name, weights)
        L = torch.linalg.qr(left, mode="r").R
        R = torch.linalg.qr(right.T, mode="r").R
        values[name] = torch.linalg.svdvals(L @ R.T)
        if rounding:
            continue
        products = zip(L.split(ranks, 1), R.split(ranks, 1), strict=True)
        largest = max(float(torch.linalg.matrix_norm(b @ a.T)) for b, a in products)
        eps = torch.finfo(torch.promote_types(B.dtype, torch.float32)).eps
        least = max(left.shape[0], right.shape[1]) * eps * largest
        values[name] = values[name][values[name] > least]
    return values


def rank_for(values: Tensor, energy: float) -> int:
    """The smallest rank, at least 1, without which no more than ``1 - energy`` of the squares of
    ``values`` ``(n,)``, descending, is lost."""
    squares = values.square().tolist()
    # The tail is summed from its small end: with energy 1 the last value still counts.
    may_lose = (1 - energy) * math.fsum(squares) * (1 + 1e-12)
    lost, rank = 0.0, len(squares)
    while rank > 1 and lost + squares[rank - 1] <= may_lose:
        rank -= 1
        lost += squares[rank]
    return max(rank, 1)


def check_energy(energy: float) -> None:
    """Raise ValueError unless ``energy`` is above 0 and at most 1."""
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be above 0 and at most 1, got {energy}")
