"""Inputs that can fail a kernel, and what "equal" means for each dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import fedrot_kernels  # noqa: F401  (registers torch.ops.fedrot)

# Relative to the largest entry of the expected tensor. Outputs are rounded once to their dtype;
# rotations are float32 (float64) and as accurate as the smallest gap of M lets them be.
OUTPUT_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.bfloat16: 2.0**-7,
    torch.float16: 2.0**-10,
}
ROTATION_TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-4}
GRAM_TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6}
ORTHOGONALITY_TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6}


@dataclass(frozen=True)
class Inputs:
    lora_A: list[Tensor]
    lora_B: list[Tensor]
    ref_A: list[Tensor]
    ref_B: list[Tensor]

    def __iter__(self):
        return iter((self.lora_A, self.lora_B, self.ref_A, self.ref_B))

    @property
    def layers(self) -> int:
        return len(self.ref_A)

    @property
    def clients(self) -> int:
        return len(self.lora_A) // self.layers

    def map(self, function) -> Inputs:
        return Inputs(*([function(t) for t in tensors] for tensors in self))

    def permuted(self, order: Sequence[int]) -> Inputs:
        def pick(tensors):
            return [tensors[i * self.layers + j] for i in order for j in range(self.layers)]

        return replace(self, lora_A=pick(self.lora_A), lora_B=pick(self.lora_B))


def haar(n: int, generator: torch.Generator) -> Tensor:
    Q, R = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    return Q * R.diagonal().sign()


def planted(
    clients: int,
    shapes: Sequence[tuple[int, int, int]],
    dtype: torch.dtype = torch.float32,
    *,
    ranks: Sequence[int] | None = None,
    noise: float = 0.5,
    seed: int = 0,
) -> Inputs:
    """Clients that are the reference in a basis of their own (rotations and reflections) plus
    noise. ``shapes[l] = (d, k, r)``; client ``i`` has rank ``ranks[i]`` at most."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=g)

    ref_A = [normal(r, k) for _, k, r in shapes]
    ref_B = [normal(d, r) for d, _, r in shapes]
    lora_A, lora_B = [], []
    for i in range(clients):
        for layer, (d, k, r) in enumerate(shapes):
            r_i = r if ranks is None else min(r, ranks[i])
            Q = haar(r, g)[:r_i]
            lora_A.append(Q @ ref_A[layer] + noise * normal(r_i, k))
            lora_B.append(ref_B[layer] @ Q.T + noise * normal(d, r_i))
    return Inputs(lora_A, lora_B, ref_A, ref_B).map(lambda t: t.to(dtype))


def strangers(clients, shapes, seed=0, ranks=None, dtype=torch.float64) -> Inputs:
    """Clients with little in common: no rotation comes near the exact average."""
    return planted(clients, shapes, dtype, noise=3.0, seed=seed, ranks=ranks)


def assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape and a.dtype == e.dtype, f"tensor {i}: {a.shape} {a.dtype}"
        difference = float((a.double() - e.double()).abs().max())
        scale = max(float(e.double().abs().max()), 1e-30)
        assert difference <= tolerance * scale, f"tensor {i}: off by {difference / scale:.2e}"


def assert_equal(actual, expected):
    for side, wanted in zip(actual, expected, strict=True):
        assert all(torch.equal(a, w) for a, w in zip(side, wanted, strict=True))
