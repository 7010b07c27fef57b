"""Rotations found in r-space: against dense float64 computations, scans and random restarts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Inputs, assert_close, haar, planted, strangers

from fedrot_kernels import rspace
from fedrot_kernels.rspace import Blocks

op = torch.ops.fedrot
WEIGHTS = torch.tensor([1.0, 3.0, 0.0, 2.0, 0.5], dtype=torch.float64)

settings.register_profile("rspace", max_examples=12, deadline=None, derandomize=True)
settings.load_profile("rspace")


def rotated(clients, shapes, seed=0) -> Inputs:
    """Clients that are one adapter in other bases, det +1 or -1."""
    return planted(clients, shapes, torch.float64, noise=0.0, seed=seed)


def exact(inputs, layer, weights) -> torch.Tensor:
    share = (weights / weights.sum()).tolist()
    return sum(
        w * (B @ A)
        for w, A, B in zip(
            share,
            inputs.lora_A[layer :: inputs.layers],
            inputs.lora_B[layer :: inputs.layers],
            strict=True,
        )
    )


def uniform(clients):
    return torch.ones(clients, dtype=torch.float64)


def random_rotations(shape, seed=0):
    layers, clients, r = shape
    g = torch.Generator().manual_seed(seed)
    R = torch.stack([haar(r, g) for _ in range(layers * clients)])
    R[..., 0] *= torch.linalg.det(R)[:, None]
    return R.view(layers, clients, r, r)


@st.composite
def problems(draw):
    r = draw(st.integers(1, 5))
    clients = draw(st.integers(1, 5))
    ranks = [draw(st.integers(1, r)) for _ in range(clients)] if draw(st.booleans()) else None
    shapes = [(draw(st.integers(r, 20)), draw(st.integers(r, 20)), r) for _ in range(2)]
    noise = draw(st.sampled_from([0.1, 0.5, 3.0]))
    seed = draw(st.integers(0, 10**6))
    inputs = planted(clients, shapes, torch.float64, noise=noise, ranks=ranks, seed=seed)
    return inputs, WEIGHTS[:clients]


@given(problems(), st.integers(0, 99))
def test_errors_and_bound_are_the_dense_ones(problem, seed):
    inputs, weights = problem
    blocks = Blocks.of(*inputs, weights)
    layers, _, r = blocks.shape
    R = random_rotations(blocks.shape, seed)
    mix = blocks.weights[:, None, None] * R
    A, B = op.combine(*inputs, mix, mix)
    for layer in range(layers):
        D = exact(inputs, layer, weights)
        norm = float(D.norm()) ** 2
        assert float(blocks.norm_square()[layer]) == pytest.approx(norm, rel=1e-10)
        error = float((D - B[layer] @ A[layer]).norm()) ** 2
        assert float(blocks.error_square(R)[layer]) == pytest.approx(error, abs=1e-9 * norm)
        beyond = float(torch.linalg.svdvals(D)[r:].square().sum())
        assert float(blocks.bound_square()[layer]) == pytest.approx(beyond, abs=1e-9 * norm)


@given(problems(), st.booleans())
def test_no_step_is_worse_and_no_rule_than_the_one_before(problem, proper):
    """gpa never lowers the agreement, optimal never raises the error, step by step; reference ->
    gpa -> optimal -> bound fall in the measure that each minimises."""
    inputs, weights = problem
    blocks = Blocks.of(*inputs, weights)
    scale = blocks.norm_square()

    def agreement(R):
        U = blocks.stacked(R)
        return (U * ((blocks.A + blocks.B) @ U)).sum((1, 2))

    last = agreement(rspace.procrustes(blocks, proper=proper))
    size = agreement(rspace.procrustes(blocks, proper=proper)).abs() + 1e-30
    for steps in (1, 2, 6):
        f = agreement(rspace.gpa(blocks, proper=proper, iterations=steps, tolerance=0.0))
        assert bool((f >= last - 1e-11 * size).all())
        last = f
    start = rspace.gpa(blocks, proper=proper)
    last = blocks.error_square(start)
    for steps in (1, 2, 4, 10):
        R = rspace.optimal(blocks, proper=proper, iterations=steps, tolerance=0.0)
        error = blocks.error_square(R)
        assert bool((error <= last + 1e-11 * scale).all())
        last = error
    assert bool((last >= blocks.bound_square() - 1e-11 * scale).all())


def test_optimal_is_never_above_joint_nor_none():
    """From gpa alone, 6 of these layers end above one of them, their squared error by up to .1."""
    blocks = Blocks.of(*strangers(3, [(12, 10, 2)] * 150, seed=2))
    error = blocks.error_square(rspace.optimal(blocks))
    eye = torch.eye(2, dtype=torch.float64).expand_as(blocks.ref_A)
    for other in (rspace.procrustes(blocks), rspace.gpa(blocks), eye):
        assert bool((error <= blocks.error_square(other) * (1 + 1e-12)).all())


@given(problems(), st.sampled_from(rspace.ALIGN), st.booleans())
def test_results_are_rotations_in_the_basis_of_the_reference(problem, align, proper):
    inputs, weights = problem
    blocks = Blocks.of(*inputs, weights)
    R = rspace.rotations(blocks, align=align, proper=proper)
    eye = torch.eye(R.shape[-1], dtype=R.dtype)
    torch.testing.assert_close(R @ R.mT, eye.expand_as(R), atol=1e-11, rtol=0)
    if proper:
        assert bool((torch.linalg.det(R) > 0).all())
    if align in ("gpa", "optimal"):
        mean = (blocks.weights[:, None, None] * (R.mT @ blocks.cross("joint"))).sum(1)
        # Turned to the reference already: the best further rotation is none.
        best = (op.polar(mean, proper=proper) * mean).sum((1, 2))
        trace = mean.diagonal(dim1=1, dim2=2).sum(1)
        torch.testing.assert_close(trace, best, atol=1e-9 * float(best.abs().max()), rtol=0)


@pytest.mark.parametrize("noise", [3e-2, 1e-2, 3e-3])
@pytest.mark.parametrize("lam", rspace.AUTO)
def test_auto_lam_of_near_clients_in_float32(lam, noise):
    """As after a round: what clients differ in is small beside what they have in common, and so the
    errors that are compared are small beside the average."""
    g = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    ref_A, ref_B = randn(8, 256), randn(256, 8)
    turns = [torch.linalg.qr(torch.eye(8) + noise * randn(8, 8)).Q for _ in range(10)]
    turns = [Q * Q.diagonal().sign() for Q in turns]
    inputs = Inputs(
        [Q.T @ (ref_A + noise * randn(8, 256)) for Q in turns],
        [(ref_B + noise * randn(256, 8)) @ Q for Q in turns],
        [ref_A],
        [ref_B],
    )
    D = exact(inputs.map(torch.Tensor.double), 0, uniform(10))

    def error(lam):
        (A,), (B,) = rspace.aggregate(*inputs, lam=lam)
        return float((D - B.double() @ A.double()).norm())

    assert error(lam) <= 1.01 * min(error(0.0), error(1.0))


@given(problems(), st.sampled_from(rspace.ALIGN), st.booleans())
def test_auto_lam_is_the_best_of_a_scan(problem, align, proper):
    inputs, weights = problem
    blocks = Blocks.of(*inputs, weights)
    scale = blocks.norm_square()
    R = rspace.rotations(blocks, align=align, proper=proper)
    chosen = rspace.rotations(blocks, align=align, lam="auto", proper=proper)
    error = blocks.error_square(chosen)
    for lam in (0.0, 1.0):
        other = blocks.error_square(rspace.soften(R, lam, proper=proper))
        assert bool((error <= other + 1e-11 * scale).all())
    scan = torch.stack(
        [blocks.error_square(rspace.soften(R, i / 20, proper=proper)) for i in range(21)]
    )
    assert bool((error <= scan.min(0).values + 0.02 * scale).all())


def test_against_random_restarts():
    """On small problems descent from gpa ends about where the best of 10 random starts does."""
    ratios = []
    for seed in range(6):
        blocks = Blocks.of(*strangers(4, [(12, 10, 3)], seed))
        ours = rspace.optimal(blocks, iterations=100, tolerance=1e-6)
        best = min(
            float(
                blocks.error_square(
                    rspace.optimal(
                        blocks,
                        iterations=100,
                        tolerance=1e-6,
                        start=random_rotations(blocks.shape, restart),
                    )
                )
            )
            for restart in range(10)
        )
        ratios.append(float(blocks.error_square(ours)) / best)
    assert sum(ratio < 1.001 for ratio in ratios) >= 2, ratios
    assert max(ratios) < 1.25 and sum(ratios) / len(ratios) < 1.06, ratios


@pytest.mark.parametrize("seed", range(5))
def test_two_clients_of_rank_two_by_a_scan(seed):
    """Only one angle matters: the error over all of them, and optimal in a minimum of it."""
    blocks = Blocks.of(*strangers(2, [(7, 9, 2)], seed))
    angles = torch.arange(0, 2 * math.pi, 2 * math.pi / 2000, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    turns = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    eye = torch.eye(2, dtype=torch.float64)
    errors = torch.cat([blocks.error_square(torch.stack([eye, t])[None]) for t in turns])
    R = rspace.optimal(blocks, iterations=200, tolerance=0.0)[0]
    relative = R[1] @ R[0].T
    at = int((turns - relative).square().sum((1, 2)).argmin())
    around = errors[[at - 2, at - 1, at, (at + 1) % 2000, (at + 2) % 2000]]
    found = float(blocks.error_square(R[None]))
    assert found <= float(around.min()) * (1 + 1e-9)
    assert found <= float(errors.median())


@pytest.mark.parametrize("seed", range(3))
def test_two_clients_do_not_swap_places(seed):
    """Where gpa has converged, one client is the other's Procrustes solution."""
    inputs = strangers(2, [(20, 30, 4)], seed)
    blocks = Blocks.of(*inputs)
    R = rspace.gpa(blocks, iterations=2000, tolerance=0.0)[0]
    K = inputs.lora_B[0].T @ inputs.lora_B[1] + inputs.lora_A[0] @ inputs.lora_A[1].T
    torch.testing.assert_close(R[0] @ R[1].T, op.polar(K, proper=True), rtol=0, atol=1e-3)


def test_bases_are_found_without_a_reference():
    """Clients that are one adapter in different bases, and nothing to align to: the product is
    exact; the paper's alignment to an empty reference averages plainly."""
    inputs = rotated(5, [(30, 20, 4), (8, 50, 4)])
    empty = Inputs(
        inputs.lora_A, inputs.lora_B, *([torch.zeros_like(t) for t in ref] for ref in
        (inputs.ref_A, inputs.ref_B)),
    )  # fmt: skip
    for align in ("gpa", "optimal"):
        A, B = rspace.aggregate(*empty, align=align, proper=False)
        plain_A, plain_B = op.align_aggregate(*empty, lam=1.0)
        for layer in range(2):
            D = exact(inputs, layer, uniform(5))
            scale = float(D.norm())
            assert float((B[layer] @ A[layer] - D).norm()) < 1e-2 * scale
            assert float((plain_B[layer] @ plain_A[layer] - D).norm()) > 0.5 * scale
        # With the reference the result is that adapter in the reference's own basis.
        A, B = rspace.aggregate(*inputs, align=align, proper=False)
        assert_close(A, inputs.ref_A, 1e-9)
        assert_close(B, inputs.ref_B, 1e-9)


def test_shifted():
    blocks = Blocks.of(*planted(3, [(20, 30, 4)], torch.float64))
    torch.testing.assert_close(rspace.shifted(blocks, 0.0), rspace.procrustes(blocks))
    eye = torch.eye(4, dtype=torch.float64).expand(1, 3, 4, 4)
    torch.testing.assert_close(rspace.shifted(blocks, 1e9), eye, atol=1e-8, rtol=0)
    M = blocks.cross("A")
    U, _, Vh = torch.linalg.svd(M + 0.5 * M.square().sum((2, 3), keepdim=True).sqrt() * eye)
    torch.testing.assert_close(rspace.shifted(blocks, 0.5, "A", proper=False), U @ Vh)


@given(problems())
def test_truncation_is_the_svd_in_the_basis_of_the_reference(problem):
    inputs, weights = problem
    A, B = rspace.combined(*inputs, weights, rspace.truncation)
    for layer in range(inputs.layers):
        D = exact(inputs, layer, weights)
        S = torch.linalg.svdvals(D)
        r = A[layer].shape[0]
        error = float((B[layer] @ A[layer] - D).norm()) ** 2
        best = float(S[r:].square().sum())
        assert error <= best + 1e-9 * float(D.norm()) ** 2
        # In the gauge of the reference: its mean imbalance, and no rotation comes nearer to it.
        a, b, ref_A, ref_B = A[layer], B[layer], inputs.ref_A[layer], inputs.ref_B[layer]
        if int(torch.linalg.matrix_rank(D, rtol=1e-6)) >= r:
            delta = float(ref_B.square().sum() - ref_A.square().sum()) / r
            eye = torch.eye(r, dtype=a.dtype)
            size = float(a.square().sum() + b.square().sum())
            torch.testing.assert_close(b.T @ b - a @ a.T, delta * eye, atol=1e-6 * size, rtol=0)
            M = a @ ref_A.T + b.T @ ref_B
            torch.testing.assert_close(M, M.T, atol=1e-6 * float(M.norm()), rtol=0)
            assert float(torch.linalg.eigvalsh(M).min()) > -1e-6 * float(M.norm())


EMPTY = {
    "B of all clients zero": lambda x: [t.zero_() for t in x.lora_B],
    "reference zero": lambda x: [t.zero_() for t in [*x.ref_A, *x.ref_B]],
    "B of the reference zero": lambda x: [t.zero_() for t in x.ref_B],
    "all zero": lambda x: [t.zero_() for ts in x for t in ts],
    "one client zero": lambda x: [t.zero_() for t in [*x.lora_A[:2], *x.lora_B[:2]]],
    "a direction missing": lambda x: [t[:1].zero_() for t in x.lora_A],
}


@pytest.mark.parametrize("case", EMPTY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_deficient_problems(case, dtype):
    """What says nothing about a rotation gives one all the same, and the exact products of it."""
    inputs = planted(3, [(9, 14, 3), (20, 8, 3)], dtype)
    EMPTY[case](inputs)
    weights = uniform(3)
    blocks = Blocks.of(*inputs, weights)
    norm = blocks.norm_square().double()
    eps = 1e-10 if dtype == torch.float64 else 1e-4
    last = None
    for align in ("gpa", "optimal"):
        R = rspace.rotations(blocks, align=align)
        eye = torch.eye(3, dtype=dtype)
        torch.testing.assert_close(R @ R.mT, eye.expand_as(R), atol=5e-6, rtol=0)
        error = blocks.error_square(R)
        assert last is None or bool((error <= last + eps * norm).all())
        last = error
    A, B = rspace.combined(*inputs, weights, rspace.truncation)
    for layer in range(2):
        D = exact(inputs.map(torch.Tensor.double), layer, weights)
        best = float(torch.linalg.svdvals(D)[3:].square().sum())
        error = float((B[layer].double() @ A[layer].double() - D).norm()) ** 2
        assert error <= best + eps * float(D.norm()) ** 2


@pytest.mark.parametrize("align", ["gpa", "optimal"])
def test_one_client_is_aligned_to_the_reference(align):
    inputs = planted(1, [(20, 30, 4), (9, 5, 2)], torch.float64)
    A, B = rspace.aggregate(*inputs, align=align)
    expected_A, expected_B = op.align_aggregate(*inputs, lam=1.0)
    assert_close(A, expected_A, 1e-9)
    assert_close(B, expected_B, 1e-9)


@pytest.mark.parametrize("align", ["gpa", "optimal"])
def test_a_client_of_weight_zero_does_not_count(align):
    inputs = strangers(3, [(20, 30, 4), (9, 5, 2)])
    A, B = rspace.aggregate(*inputs, torch.tensor([1.0, 0.0, 2.0]), align=align)
    two = inputs.permuted([0, 2])
    expected_A, expected_B = rspace.aggregate(*two, torch.tensor([1.0, 2.0]), align=align)
    assert_close(A, expected_A, 1e-6)
    assert_close(B, expected_B, 1e-6)


def test_the_paper_s_rotations_are_those_of_the_operator():
    inputs = planted(4, [(20, 30, 4), (9, 5, 4)], torch.float64, ranks=[4, 2, 3, 1])
    for align in ("joint", "A", "B"):
        for lam in (0.3, 1.0):
            A, B = rspace.aggregate(*inputs, WEIGHTS[:4], align=align, lam=lam)
            expected = op.align_aggregate(*inputs, WEIGHTS[:4], align=align, lam=lam)
            assert_close([*A, *B], [*expected[0], *expected[1]], 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_lose_little(dtype):
    """Against float64 on the same values: the error reached, and the dtype of the result."""
    inputs = strangers(6, [(60, 40, 4)], dtype=dtype)
    wide = inputs.map(torch.Tensor.double)
    reached = {}
    for name, problem in (("narrow", inputs), ("wide", wide)):
        for align in ("gpa", "optimal"):
            A, B = rspace.aggregate(*problem, align=align)
            assert A[0].dtype == B[0].dtype == problem.ref_A[0].dtype
            D = exact(wide, 0, uniform(6))
            reached[name, align] = float((B[0].double() @ A[0].double() - D).norm() / D.norm())
    for align in ("gpa", "optimal"):
        assert reached["narrow", align] == pytest.approx(reached["wide", align], abs=0.01)
