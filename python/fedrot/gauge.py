"""A client's own latent basis: the same adapter in other factors."""

from __future__ import annotations

import torch
from torch import Tensor

from fedrot.factors import Factors


def haar(n: int, generator: torch.Generator) -> Tensor:
    """A uniformly drawn orthogonal matrix ``(n, n)`` in float64, determinant +1 or -1.

    QR of a Gaussian matrix with the signs of ``diag(R)`` taken out (Mezzadri, math-ph/0609050).
    """
    Q, R = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return Q * R.diagonal().sign()


def regauge(factors: Factors, generator: torch.Generator, *, proper: bool = False) -> Factors:
    """``(B R, R^T A)`` with a random orthogonal ``R`` per layer: the product stays ``B A``.

    ``proper``: rotations only, determinant +1.
    """
    A, B = {}, {}
    for module, A_i in factors.A.items():
        R = haar(A_i.shape[0], generator)
        if proper and torch.linalg.det(R) < 0:
            R = torch.cat([-R[:, :1], R[:, 1:]], 1)
        R = R.to(A_i.device)
        A[module] = (R.T @ A_i.double()).to(A_i.dtype)
        B_i = factors.B[module]
        B[module] = (B_i.double() @ R).to(B_i.dtype)
    return Factors(A, B)
