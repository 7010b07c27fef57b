"""LoRA-FAIR: the averaged ``B`` is corrected so that the product comes nearer to the exact one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedrot.factors import Factors
from fedrot.methods.base import Method, average, stacked

STEPS = 100  # of the fixed point; it ends sooner, as a rule after 5 to 20


@dataclass(frozen=True)
class LoRAFAIR(Method):
    """``A`` and ``B`` are averaged, then ``B`` becomes ``B + D`` (arXiv 2411.14961) with the
    smallest

        ``1 - cos(sum_i w_i B_i A_i, (B + D) A) + regularization ||D||_F^2``.

    The paper descends the gradient by SGD for a fixed number of steps; here its zero is found by
    :func:`corrected`, to the end and without a learning rate.
    """

    name: ClassVar[str] = "LoRA-FAIR"

    regularization: float = 0.01

    def __post_init__(self) -> None:
        if not self.regularization >= 0:
            raise ValueError(f"regularization must not be negative, got {self.regularization}")

    def aggregate(
        self,
        uploads: Sequence[Factors],
        reference: Factors,
        weights: Tensor | None = None,
        *,
        round: int = 1,
        generator: torch.Generator | None = None,
    ) -> Factors:
        mean = average(uploads, reference, weights)
        B = {
            module: corrected(
                *stacked(uploads, module, weights), mean.A[module], B, self.regularization
            )
            for module, B in mean.B.items()
        }
        return Factors(mean.A, B)


def corrected(left: Tensor, right: Tensor, A: Tensor, B: Tensor, regularization: float) -> Tensor:
    """The ``X`` that minimises ``1 - cos(T, X A) + regularization ||X - B||_F^2`` near ``B``,
    with ``T = left @ right``.

    With ``G = T A^T``, ``S = A A^T``, ``t = ||T||``, ``n = ||X A||`` and ``c = <G, X> / (t n)``
    the gradient is zero where

        ``X (2 regularization I + c / n^2 S) = 2 regularization B + G / (t n)``,

    solved for X with the n and c of the last one, from ``X = B`` on. Every iterate is ``[B, G] C``,
    so the iteration runs on ``C (2r, r)`` and the Gram matrix of ``[B, G]``; neither ``T`` nor
    anything else of size ``d x k`` is formed.
    """
    dtype, r = B.dtype, B.shape[1]
    left, right, A, B = (t.double() for t in (left, right, A, B))
    S = A @ A.mT
    t = ((left.mT @ left) * (right @ right.mT)).sum().clamp(min=0).sqrt()
    basis = torch.cat([B, left @ (right @ A.mT)], 1)
    gram = basis.mT @ basis
    identity = torch.eye(r, dtype=torch.float64, device=B.device)
    C = torch.cat([identity, torch.zeros_like(identity)])
    for _ in range(STEPS):
        n = ((gram @ C) * (C @ S)).sum().clamp(min=0).sqrt()
        c = (gram[r:] @ C).trace() / (t * n)
        if not (n > 0 and c > 0):
            break  # no update at all, or one against the average: there is nothing to correct
        target = torch.cat([2 * regularization * identity, identity / (t * n)])
        system = 2 * regularization * identity + c / n**2 * S
        fresh = torch.linalg.lstsq(system, target.mT).solution.mT
        change, C = fresh - C, fresh
        if ((gram @ change) * change).sum() <= 1e-20 * ((gram @ C) * C).sum():
            break
    return (basis @ C).to(dtype)
