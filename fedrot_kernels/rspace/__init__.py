"""Aggregation rules that iterate, on Gram blocks alone: no pass over the factors but one to make
the blocks (``fedrot::gram``) and one to average with what was found (``fedrot::combine``).

With all clients side by side, ``stack(B) = [B_1 .. B_N]`` ``(d, S)`` and ``stack(A)`` ``(S, k)``,
``S = N r``, every average is ``B = stack(B) U_B`` and ``A = U_A^T stack(A)`` for some ``U (S, r)``;
rotations are ``U_A = U_B = [w_1 R_1; ..; w_N R_N]``. The exact average is
``D = stack(B) W stack(A)``, ``W = diag(w_i)``, and the squared aggregation error

    |D - B A|^2 = |D|^2 - 2 <U_B, G_B W G_A U_A> + <U_B^T G_B U_B, U_A^T G_A U_A>

needs ``G_A = stack(A) stack(A)^T`` and ``G_B = stack(B)^T stack(B)`` only. Layers of one rank are
worked on as one batch. A client of smaller rank is one padded with zeros: rows of its ``R`` beyond
its rank mean nothing.
"""

from __future__ import annotations

from fedrot_kernels.rspace.averages import (
    Solver,
    aggregate,
    aggregate_with_lam,
    combined,
    truncation,
)
from fedrot_kernels.rspace.blocks import Blocks, batches
from fedrot_kernels.rspace.rotations import (
    ALIGN,
    gpa,
    optimal,
    procrustes,
    rotations,
    shifted,
)
from fedrot_kernels.rspace.softness import AUTO, auto_lam, check_lam, client_lam, soften

__all__ = [
    "ALIGN",
    "AUTO",
    "Blocks",
    "Solver",
    "aggregate",
    "aggregate_with_lam",
    "auto_lam",
    "batches",
    "check_lam",
    "client_lam",
    "combined",
    "gpa",
    "optimal",
    "procrustes",
    "rotations",
    "shifted",
    "soften",
    "truncation",
]
