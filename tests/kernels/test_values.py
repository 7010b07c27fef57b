"""The native backend against the float64 reference."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from problems import (
    ORTHOGONALITY_TOLERANCE,
    OUTPUT_TOLERANCE,
    ROTATION_TOLERANCE,
    assert_close,
    haar,
    planted,
)

from fedrot_kernels.backends import cpu, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
RANKS = (1, 2, 3, 4, 8, 16, 33)
op = torch.ops.fedrot


def ragged(r: int) -> list[tuple[int, int, int]]:
    """Layers of different shape and rank, none a multiple of a vector or of a tile."""
    return [(2 * r + 7, 600 + r, r), (517 + r, 3 * r + 1, r), (r + 5, r + 3, max(1, r // 2))]


def compare(inputs, weights=None, **options) -> None:
    rotations = op.align(*inputs, **options)
    assert_close(
        rotations, reference.align(*inputs, **options), ROTATION_TOLERANCE[rotations[0].dtype]
    )
    for R in rotations:
        identity = torch.eye(R.shape[0], dtype=R.dtype)
        assert float((R @ R.T - identity).abs().max()) <= ORTHOGONALITY_TOLERANCE[R.dtype]
    A, B = op.align_aggregate(*inputs, weights, **options)
    expected_A, expected_B = reference.align_aggregate(*inputs, weights, **options)
    tolerance = OUTPUT_TOLERANCE[A[0].dtype]
    assert_close(A, expected_A, tolerance)
    assert_close(B, expected_B, tolerance)


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("align", ["joint", "A", "B"])
def test_against_reference(dtype, align, r):
    inputs = planted(3, ragged(r), dtype, seed=r)
    weights = torch.tensor([3.0, 0.0, 1.5])
    for lam in (0.0, 0.4, 1.0):
        for proper in (True, False):
            compare(inputs, weights, lam=lam, align=align, proper=proper)


# Only the default mode and float32/float64 at these ranks: the reference takes seconds, and what
# the dtype and the mode change (loads, which panels are read) does not depend on the rank.
@pytest.mark.parametrize("r", [64, 130, 256])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_against_reference_large_rank(dtype, r):
    compare(planted(2, [(r + 9, 2 * r + 1, r)], dtype, seed=r))


@pytest.mark.parametrize("lam", [0.4, 0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_ranks(dtype, lam):
    inputs = planted(4, ragged(8), dtype, ranks=[8, 1, 3, 5])
    compare(inputs, lam=lam)
    padded = inputs.map(lambda t: t)
    for index, (A, B) in enumerate(zip(inputs.lora_A, inputs.lora_B, strict=True)):
        r = inputs.ref_A[index % inputs.layers].shape[0]
        padded.lora_A[index] = torch.nn.functional.pad(A, (0, 0, 0, r - A.shape[0]))
        padded.lora_B[index] = torch.nn.functional.pad(B, (0, r - B.shape[1]))
    for actual, expected in zip(
        op.align_aggregate(*inputs, lam=lam), op.align_aggregate(*padded, lam=lam), strict=True
    ):
        assert_close(actual, expected, OUTPUT_TOLERANCE[dtype])


@pytest.mark.parametrize("client", DTYPES, ids=str)
@pytest.mark.parametrize("ref", DTYPES, ids=str)
def test_clients_and_reference_of_different_dtype(client, ref):
    inputs = planted(2, ragged(4))
    inputs.lora_A[:] = [t.to(client) for t in inputs.lora_A]
    inputs.lora_B[:] = [t.to(client) for t in inputs.lora_B]
    inputs.ref_A[:] = [t.to(ref) for t in inputs.ref_A]
    inputs.ref_B[:] = [t.to(ref) for t in inputs.ref_B]
    compare(inputs)
    assert op.align_aggregate(*inputs)[0][0].dtype == ref


def test_hand_computed_two_clients():
    """r = 1, lam = 1: the second client is the first with both factors negated."""
    A, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [0.0]])
    out_A, out_B = op.align_aggregate(
        [A, -3 * A], [B, -B], [A], [B], torch.tensor([3.0, 1.0]), lam=1.0, proper=False
    )
    torch.testing.assert_close(out_A[0], 0.75 * A + 0.25 * 3 * A)
    torch.testing.assert_close(out_B[0], B)
    # A rotation in one dimension is the identity.
    out_A, _ = op.align_aggregate([A, -A], [B, -B], [A], [B], lam=1.0)
    torch.testing.assert_close(out_A[0], 0 * A)


def test_soft_rotation_angle():
    """A plane rotated by theta turns by atan2(lam sin theta, 1 - lam + lam cos theta)."""
    theta, lam = torch.tensor(2.1, dtype=torch.float64), 0.3
    R = torch.tensor([[theta.cos(), -theta.sin()], [theta.sin(), theta.cos()]])
    ref_A = torch.randn(2, 9, dtype=torch.float64)
    zero = torch.zeros(5, 2, dtype=torch.float64)
    (soft,) = op.align([R @ ref_A], [zero], [ref_A], [zero], lam=lam, align="A")
    turned = torch.atan2(soft[1, 0], soft[0, 0])
    expected = torch.atan2(lam * theta.sin(), 1 - lam + lam * theta.cos())
    torch.testing.assert_close(turned, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_half_turn_at_half_lambda_rotates_nothing(dtype):
    ref_A = torch.randn(4, 50, dtype=dtype)
    zero = torch.zeros(5, 4, dtype=dtype)
    g = torch.Generator().manual_seed(3)
    Q = haar(4, g).to(dtype)
    turn = Q @ torch.diag(torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=dtype)) @ Q.T
    (R,) = op.align([turn @ ref_A], [zero], [ref_A], [zero], lam=0.5, align="A")
    torch.testing.assert_close(R, torch.eye(4, dtype=dtype), atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [2, 3, 8, 16, 33])
def test_determinant_flip_belongs_to_the_smallest_singular_value(n, dtype):
    g = torch.Generator().manual_seed(n)
    U, V = haar(n, g), haar(n, g)
    if torch.linalg.det(U @ V.T) > 0:
        U[:, 0] *= -1
    S = torch.linspace(1.0, 0.01, n, dtype=torch.float64)
    M = (U * S) @ V.T
    R = op.polar(M.to(dtype), proper=True).double()
    assert abs(float(torch.linalg.det(R)) - 1) < 1e-4
    best = float(S.sum() - 2 * S[-1])
    assert abs(float((R * M).sum()) - best) < (1e-5 if dtype == torch.float32 else 1e-12) * best


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("n", [4, 16, 64])
def test_polar_of_ill_conditioned_matrices(n, condition):
    g = torch.Generator().manual_seed(n)
    S = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), n, dtype=torch.float64)
    M = (haar(n, g) * S) @ haar(n, g).T
    R = op.polar(M.float()).double()
    identity = torch.eye(n, dtype=torch.float64)
    assert float((R @ R.T - identity).abs().max()) < 1e-5
    assert float((R * M).sum()) > float(S.sum()) * (1 - 1e-5)
    exact = op.polar(M)
    torch.testing.assert_close(exact, reference.polar(M), atol=1e-15 * condition * n, rtol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_polar_does_not_depend_on_scale(scale):
    M = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(op.polar(M * scale), op.polar(M), atol=5e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "rank"), [(2, 1), (4, 3), (4, 1), (16, 7), (33, 32), (8, 0)])
@pytest.mark.parametrize("proper", [True, False])
def test_rank_deficient_polar(n, rank, proper, dtype):
    """Orthogonal, optimal, and the limit of polar(M + eps I) where that is well-posed."""
    g = torch.Generator().manual_seed(10 * n + rank)
    left = torch.randn(n, rank, dtype=torch.float64, generator=g)
    M = (left @ torch.randn(rank, n, dtype=torch.float64, generator=g)).to(dtype)
    R = op.polar(M, proper=proper)
    assert (
        float((R @ R.T - torch.eye(n, dtype=dtype)).abs().max()) < (ORTHOGONALITY_TOLERANCE[dtype])
    )
    optimum = float(torch.linalg.svdvals(M.double()).sum())
    assert float((R.double() * M.double()).sum()) >= optimum * (1 - 1e-5)
    if proper:
        assert float(torch.linalg.det(R.double())) == pytest.approx(1, abs=1e-4)
    # The same definition by another route (SVD and null spaces, float64).
    torch.testing.assert_close(
        R, reference.polar(M, proper=proper), atol=2e-3 if dtype == torch.float32 else 1e-8, rtol=0
    )
    if dtype == torch.float64 and not proper and rank > 0:
        U, _, Vh = torch.linalg.svd(M + 1e-9 * torch.eye(n, dtype=dtype))
        torch.testing.assert_close(R, U @ Vh, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", [op, reference], ids=["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_half_turns_at_half_lambda_stay_rotations(dtype, backend):
    """Just beside a half turn one of a pair of equal singular values may count as zero."""
    g = torch.Generator().manual_seed(0)
    eps = torch.finfo(dtype).eps
    for n in (2, 3, 4, 8):
        zero = torch.zeros(1, n, dtype=dtype)
        for trial in range(100):
            angle = torch.tensor(torch.pi - eps * n * 64 * (0.5 + trial / 100)).double()
            turn = torch.eye(n, dtype=torch.float64)
            turn[:2, :2] = torch.tensor(
                [[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]], dtype=torch.float64
            )
            Q = haar(n, g)
            M, eye = (Q @ turn @ Q.T).to(dtype), torch.eye(n, dtype=dtype)
            (R,) = backend.align([M], [zero], [eye], [zero], lam=0.5, align="A")
            assert float(torch.linalg.det(R.double())) > 0
            assert float((R @ R.T - eye).abs().max()) < 1e-5


def test_small_gap_in_float64():
    """The flip finds the smallest singular value where it differs in the eighth digit."""
    g = torch.Generator().manual_seed(0)
    U, V = haar(3, g), haar(3, g)
    if torch.linalg.det(U @ V.T) > 0:
        U[:, 0] *= -1
    S = torch.tensor([1.0, 1.0, 1 - 1e-8], dtype=torch.float64)
    M = (U * S) @ V.T
    best = U @ torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)) @ V.T
    torch.testing.assert_close(op.polar(M, proper=True), best, atol=1e-6, rtol=0)


def test_denormal_matrix():
    quarter_turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    torch.testing.assert_close(op.polar(quarter_turn * 1e-40), quarter_turn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_than_one_wave(dtype):
    """More data than the layers that are worked on at a time."""
    compare(planted(6, [(2048, 1500, 16), (700, 2048, 8), (2048, 2048, 16)] * 3, dtype))


def test_float64_is_rounded_once():
    """A value just above a tie of float16 that a detour over float32 would round down."""
    x = torch.tensor([[1 + 2.0**-11 + 2.0**-40]], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float16)
    (A,), _ = op.align_aggregate([x], [x], [one], [one], lam=0.0)
    assert float(A) == 1 + 2.0**-10
    (A,), _ = op.align_aggregate([x + 2.0**-9], [x], [one.bfloat16()], [one.bfloat16()], lam=0.0)
    assert float(A) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rank", [1, 2])
def test_proper_on_disjoint_null_spaces(rank, dtype):
    """M = sum +-q_i q_(i+2)^T: U_2^T V_2 = 0, and half of the signs ask for a reflection there."""
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        Q = haar(4, g)
        signs = torch.randn(rank, dtype=torch.float64, generator=g).sign()
        M = ((Q[:, :rank] * signs) @ Q[:, 2 : 2 + rank].T).to(dtype)
        R = op.polar(M, proper=True)
        torch.testing.assert_close(R @ R.T, torch.eye(4, dtype=dtype))
        assert float(torch.linalg.det(R)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ones", [[(0, 1)], [(0, 1), (1, 2)], [(0, 0)], [(0, 1), (1, 0)]])
def test_proper_where_the_null_spaces_do_not_meet(ones, dtype):
    """U_2^T V_2 may be zero or keep M's determinant from being +1: proper still holds."""
    M = torch.zeros(3, 3, dtype=dtype)
    for i, j in ones:
        M[i, j] = 1.0
    for backend in (op, reference):
        R = backend.polar(M, proper=True)
        torch.testing.assert_close(R @ R.T, torch.eye(3, dtype=dtype))
        assert float(torch.linalg.det(R)) == pytest.approx(1)
        assert float((R * M).sum()) == pytest.approx(len(ones))


def test_zero_reference_gives_identity():
    inputs = planted(2, ragged(4))
    inputs.ref_A[:] = [0 * A for A in inputs.ref_A]
    inputs.ref_B[:] = [0 * B for B in inputs.ref_B]
    for index, R in enumerate(op.align(*inputs, lam=1.0)):
        assert torch.equal(R, torch.eye(inputs.ref_A[index % inputs.layers].shape[0]))
    A, _ = op.align_aggregate(*inputs)
    L = inputs.layers
    torch.testing.assert_close(A[0], (inputs.lora_A[0] + inputs.lora_A[L]) / 2)


def test_zero_B_aligns_by_A():
    """Right after initialisation B_ref = 0: joint is then A alone."""
    inputs = planted(2, ragged(4))
    inputs.ref_B[:] = [0 * B for B in inputs.ref_B]
    assert_close(op.align(*inputs), op.align(*inputs, align="A"), 1e-6)


def test_half_precision_keeps_the_product():
    """R is not rounded to bf16: with one client B R R^T A = B A up to the output rounding."""
    inputs = planted(1, [(64, 64, 8)], torch.bfloat16, noise=0.1)
    double = inputs.map(torch.Tensor.double)
    wide = op.align_aggregate(inputs.lora_A, inputs.lora_B, double.ref_A, double.ref_B, lam=1.0)
    product = double.lora_B[0] @ double.lora_A[0]
    error = torch.linalg.matrix_norm(wide[1][0] @ wide[0][0] - product)
    assert float(error / torch.linalg.matrix_norm(product)) < 1e-12


@pytest.mark.skipif("FEDROT_CPU" in os.environ, reason="the environment limits them")
@pytest.mark.parametrize("level", ["sse2", "avx2", "avx512", "amx"])
def test_every_instruction_set(level):
    """The paths below the machine's own, each in a process of its own."""
    script = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "import torch, test_values as t\n"
        "for dtype in t.DTYPES:\n"
        "    t.compare(t.planted(3, t.ragged(5), dtype, ranks=[5, 2, 4]))\n"
        "    t.compare(t.planted(3, t.ragged(20), dtype, ranks=[20, 17, 3]))\n"
        "    t.compare(t.planted(9, [(40, 1100, r) for r in (3, 4, 8, 13)], dtype))\n"
        "x = torch.cat([torch.randn(4096) * 10.0**e for e in range(-9, 5)])\n"
        "for dtype in (torch.float16, torch.bfloat16):\n"
        "    zero = torch.zeros(1, 1)\n"
        "    (A,), _ = torch.ops.fedrot.align_aggregate([x[None].to(dtype)], [zero.to(dtype)],\n"
        "        [torch.zeros(1, x.numel())], [zero], lam=0.0)\n"
        "    assert torch.equal(A[0], x.to(dtype).float()), 'widening'\n"
        "    (A,), _ = torch.ops.fedrot.align_aggregate([x[None]], [zero],\n"
        "        [torch.zeros(1, x.numel(), dtype=dtype)], [zero.to(dtype)], lam=0.0)\n"
        "    assert torch.equal(A[0], x.to(dtype)), 'rounding'\n"
        "from fedrot_kernels.backends import cpu\n"
        "print(cpu.instruction_set)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, os.path.dirname(__file__)],
        env={**os.environ, "FEDROT_CPU": level},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    order = ["portable", "sse2", "avx2", "avx512", "amx"]
    own = order.index(cpu.instruction_set)
    assert done.stdout.strip() == order[min(own, order.index(level))]
