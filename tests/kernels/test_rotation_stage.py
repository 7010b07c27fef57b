"""The r x r stage alone: every rank has its own split into lanes, blocks and tails."""

from __future__ import annotations

import pytest
import torch
from problems import haar

from fedrot_kernels.backends import reference

op = torch.ops.fedrot
RANKS = (*range(1, 41), 64, 100, 128, 257)
DTYPES = (torch.float32, torch.float64)


def eye(n: int) -> torch.Tensor:
    return torch.eye(n, dtype=torch.float64)


def with_singular_values(S: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    n = S.numel()
    return (haar(n, generator) * S) @ haar(n, generator).T


def determinants(batch: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.linalg.det(M) for M in batch])  # batched, large ones may deadlock MKL


def check(M: torch.Tensor, proper: bool) -> None:
    """``M`` ``(batch, n, n)`` against the reference, as closely as its condition allows."""
    n, eps = M.shape[-1], torch.finfo(M.dtype).eps
    R = op.polar(M, proper=proper)
    assert R.dtype == M.dtype
    orthogonality = (R.double() @ R.double().mT - eye(n)).abs().amax((-2, -1))
    assert float(orthogonality.max()) < 40 * eps
    for actual, given in zip(R.double(), M.double(), strict=True):
        S = torch.linalg.svdvals(given)
        expected = reference.polar(given, proper=proper)
        flipped = proper and float(torch.linalg.det(given)) < 0
        gap = S[0] if n == 1 else S[-2] - S[-1] if flipped else S[-2] + S[-1]
        error = float(torch.linalg.matrix_norm(actual - expected))
        assert error < (40 + 2 * n) * eps * float(S[0] / gap), f"n = {n}, {S}"
        best = float((expected * given).sum())
        assert float((actual * given).sum()) > best - 20 * n**0.5 * eps * float(S.sum())
        if proper:
            assert float(torch.linalg.det(actual)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("proper", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", RANKS)
def test_random_and_ill_conditioned(n, dtype, proper):
    g = torch.Generator().manual_seed(n)
    check(
        torch.randn(3 if n > 99 else 20, n, n, generator=g, dtype=torch.float64).to(dtype), proper
    )
    exponents = torch.linspace(0, -5 if dtype == torch.float32 else -12, n, dtype=torch.float64)
    if n < 100:  # eps n counts as zero
        M = torch.stack([with_singular_values(10**exponents, g) for _ in range(5)])
        check(M.to(dtype), proper)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", RANKS)
def test_reflections(n, dtype):
    """All singular values are equal: whichever direction is flipped, the optimum is n - 2."""
    g = torch.Generator().manual_seed(n)
    Q = torch.stack([haar(n, g) for _ in range(4)])
    Q[:, 0] *= -determinants(Q).sign()[:, None]
    R = op.polar(Q.to(dtype), proper=True).double()
    eps = torch.finfo(dtype).eps
    assert float((R @ R.mT - eye(n)).abs().max()) < 40 * eps
    torch.testing.assert_close(determinants(R), torch.ones(4).double(), atol=1e-3, rtol=0)
    best = torch.full((4,), n - 2.0, dtype=torch.float64)
    torch.testing.assert_close((R * Q).sum((-2, -1)), best, atol=40 * n * eps, rtol=0)


@pytest.mark.parametrize("proper", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [2, 3, 7, 8, 15, 16, 17, 31, 33, 40, 64, 100])
def test_rank_deficient(n, dtype, proper):
    g = torch.Generator().manual_seed(n)
    eps = torch.finfo(dtype).eps
    for rank in {0, 1, n // 2, n - 1}:
        factors = torch.randn(2, n, rank, generator=g, dtype=torch.float64)
        M = factors[0] @ factors[1].T
        R = op.polar(M.to(dtype), proper=proper).double()
        assert float((R @ R.T - eye(n)).abs().max()) < 40 * eps
        optimum = float(torch.linalg.svdvals(M).sum())
        assert float((R * M).sum()) >= optimum * (1 - 20 * n * eps)
        if proper:
            assert float(torch.linalg.det(R)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("lam", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [4, 8, 16, 17, 33, 64])
def test_soft_rotation_of_turns(n, dtype, lam):
    """Block-diagonal turns in a random basis: each plane by its own angle, half turns included."""
    g = torch.Generator().manual_seed(n)
    theta = torch.linspace(0, torch.pi, n // 2, dtype=torch.float64)
    soft = torch.atan2(lam * theta.sin(), 1 - lam + lam * theta.cos())
    if lam == 0.5:
        soft[-1] = 0.0  # rotate nothing rather than flip

    def turns(angles):
        D = eye(n)
        for i, angle in enumerate(angles):
            c, s = angle.cos(), angle.sin()
            D[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = torch.tensor([[c, -s], [s, c]])
        return D

    Q = haar(n, g)
    M, zero = (Q @ turns(theta) @ Q.T).to(dtype), torch.zeros(1, n, dtype=dtype)
    (R,) = op.align([M], [zero], [torch.eye(n, dtype=dtype)], [zero], lam=lam, align="A")
    expected = (Q @ turns(soft) @ Q.T).to(dtype)
    # At lam = 1/2 and an angle just below a half turn little is left of M: 1 / cos(theta / 2).
    atol = 40 * n * n * torch.finfo(dtype).eps
    torch.testing.assert_close(R, expected, atol=atol, rtol=0)


def mixture(n: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Easy matrices beside singular, zero, ill-conditioned, reflected and badly scaled ones."""
    g = torch.Generator().manual_seed(n)
    M = torch.randn(count, n, n, generator=g, dtype=torch.float64)
    M[1::7, -1] = 0.0
    M[2::7] = 0.0
    M[3::7] = with_singular_values(torch.logspace(0, -4, n, dtype=torch.float64), g)
    M[4::7] = haar(n, g)
    M[5::7] *= 1e-30
    M[6::7] += 10 * n * eye(n)
    return M.to(dtype)


@pytest.mark.parametrize("proper", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 4, 8, 13, 16, 17, 40, 64])
def test_neighbours_change_no_bit(n, dtype, proper):
    M = mixture(n, 35, dtype)
    together = op.polar(M, proper=proper)
    for shift in (1, 5, 18):
        turned = op.polar(M.roll(shift, 0), proper=proper).roll(-shift, 0)
        assert torch.equal(turned, together)
    for i in range(len(M)):
        assert torch.equal(op.polar(M[i], proper=proper), together[i])
    zero, unit = torch.zeros(1, n, dtype=dtype), torch.eye(n, dtype=dtype)
    clients = op.align(list(M), [zero] * len(M), [unit], [zero], lam=0.4, proper=proper)
    for i in range(len(M)):
        (alone,) = op.align([M[i]], [zero], [unit], [zero], lam=0.4, proper=proper)
        assert torch.equal(alone, clients[i])


@pytest.mark.parametrize("n", [3, 16, 17, 40])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_matrix_is_named(n, value):
    M = torch.randn(40, n, n, generator=torch.Generator().manual_seed(n))
    M[21, -1, -1] = M[33, 0, 0] = value
    with pytest.raises(ValueError, match="matrix 21"):
        op.polar(M)
