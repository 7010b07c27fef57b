"""Properties that hold for every problem, on problems that hypothesis draws."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import assert_close, haar, planted

op = torch.ops.fedrot
ranks = st.integers(1, 9)
lams = st.sampled_from([0.0, 0.2, 0.4, 0.5, 0.9, 1.0])


several = st.integers(1, 5)


@st.composite
def problems(draw, clients=several):
    layers = draw(st.integers(1, 3))
    shapes = [
        (draw(st.integers(r, 40)), draw(st.integers(r, 40)), r)
        for r in (draw(ranks) for _ in range(layers))
    ]
    return planted(draw(clients), shapes, torch.float64, seed=draw(st.integers(0, 10**6)))


settings.register_profile("fedrot", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("fedrot")


@given(problems(), lams, st.sampled_from(["joint", "A", "B"]), st.booleans())
def test_rotations_are_orthogonal_and_keep_the_product(inputs, lam, align, proper):
    rotations = op.align(*inputs, lam=lam, align=align, proper=proper)
    for A, B, R in zip(inputs.lora_A, inputs.lora_B, rotations, strict=True):
        identity = torch.eye(R.shape[0], dtype=R.dtype)
        torch.testing.assert_close(R.T @ R, identity, atol=1e-12, rtol=0)
        torch.testing.assert_close(B @ R @ R.T @ A, B @ A)
        if proper:
            assert float(torch.linalg.det(R)) > 0


@given(problems(clients=st.just(2)), st.sampled_from(["joint", "A", "B"]), st.integers(0, 99))
def test_no_rotation_does_better(inputs, align, seed):
    """The Procrustes objective of R* against the singular values and against random rotations."""
    g = torch.Generator().manual_seed(seed)
    rotations = op.align(*inputs, lam=1.0, align=align, proper=False)
    for index, R in enumerate(rotations):
        A, B, ref_A, ref_B = (
            inputs.lora_A[index],
            inputs.lora_B[index],
            inputs.ref_A[index % inputs.layers],
            inputs.ref_B[index % inputs.layers],
        )
        M = {"A": A @ ref_A.T, "B": B.T @ ref_B, "joint": A @ ref_A.T + B.T @ ref_B}[align]
        best = float((R * M).sum())
        torch.testing.assert_close(best, float(torch.linalg.svdvals(M).sum()))
        for _ in range(10):
            assert float((haar(R.shape[0], g) * M).sum()) <= best + 1e-9


@given(problems(), st.randoms(use_true_random=False), lams)
def test_order_of_clients_does_not_matter(inputs, random, lam):
    order = list(range(inputs.clients))
    random.shuffle(order)
    weights = torch.arange(1.0, inputs.clients + 1)
    A, B = op.align_aggregate(*inputs, weights, lam=lam)
    other_A, other_B = op.align_aggregate(*inputs.permuted(order), weights[order], lam=lam)
    assert_close(other_A, A, 1e-11)
    assert_close(other_B, B, 1e-11)


@given(problems(), st.floats(1e-30, 1e30))
def test_only_the_ratio_of_weights_matters(inputs, factor):
    weights = torch.arange(1.0, inputs.clients + 1, dtype=torch.float64)
    A, _ = op.align_aggregate(*inputs, weights)
    scaled, _ = op.align_aggregate(*inputs, weights * factor)
    assert_close(scaled, A, 1e-11)


@given(problems())
def test_lam_zero_is_the_weighted_mean(inputs):
    weights = torch.arange(1.0, inputs.clients + 1, dtype=torch.float64)
    A, B = op.align_aggregate(*inputs, weights, lam=0.0)
    share = weights / weights.sum()
    for layer in range(inputs.layers):
        mean_A = sum(
            w * t for w, t in zip(share, inputs.lora_A[layer :: inputs.layers], strict=True)
        )
        mean_B = sum(
            w * t for w, t in zip(share, inputs.lora_B[layer :: inputs.layers], strict=True)
        )
        torch.testing.assert_close(A[layer], mean_A)
        torch.testing.assert_close(B[layer], mean_B)


@given(problems(clients=st.just(1)), st.integers(0, 99), st.booleans())
def test_planted_basis_change_is_undone(inputs, seed, reflect):
    """A client that is the reference in another basis comes back as the reference."""
    g = torch.Generator().manual_seed(seed)
    for layer, (A, B) in enumerate(zip(inputs.ref_A, inputs.ref_B, strict=True)):
        Q = haar(A.shape[0], g)
        if (torch.linalg.det(Q) < 0) != reflect:
            Q[0] *= -1
        inputs.lora_A[layer], inputs.lora_B[layer] = Q @ A, B @ Q.T
    A, B = op.align_aggregate(*inputs, lam=1.0, proper=not reflect)
    assert_close(A, inputs.ref_A, 1e-9)
    assert_close(B, inputs.ref_B, 1e-9)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 8), st.integers(0, 10**6))
def test_polar_of_wide_matrices(batch, m, extra, seed):
    g = torch.Generator().manual_seed(seed)
    M = torch.randn(batch, m, m + extra, dtype=torch.float64, generator=g)
    R = op.polar(M)
    torch.testing.assert_close(
        R @ R.mT, torch.eye(m, dtype=M.dtype).expand(batch, m, m), atol=1e-12, rtol=0
    )
    torch.testing.assert_close((R * M).sum((1, 2)), torch.linalg.svdvals(M).sum(1))
