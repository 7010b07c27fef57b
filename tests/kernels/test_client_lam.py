"""`lam="auto-client"`: against dense float64 errors on a grid of all combinations, and by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from problems import haar, planted

from fedrot_kernels import rspace
from fedrot_kernels.rspace import Blocks

op = torch.ops.fedrot
GRID = [i / 20 for i in range(21)]


def dense_error(inputs, rotations, weights) -> torch.Tensor:
    """`|D - B A|` of one layer from the factors themselves; a stack of rotations for every client,
    `(..., r, r)`."""
    w = weights / weights.sum()
    A = sum(w[i] * R.mT @ inputs.lora_A[i] for i, R in enumerate(rotations))
    B = sum(w[i] * inputs.lora_B[i] @ R for i, R in enumerate(rotations))
    D = sum(w[i] * b @ a for i, (a, b) in enumerate(zip(inputs.lora_A, inputs.lora_B, strict=True)))
    return torch.linalg.matrix_norm(D - B @ A)


def soft(R, lam):
    """The soft rotation by an SVD."""
    U, _, Vh = torch.linalg.svd((1 - lam) * torch.eye(len(R), dtype=R.dtype) + lam * R)
    return U @ Vh


def test_by_hand():
    """Two clients that mean the identity, the first in a basis turned by 90 degrees. Both get that
    turn as their rotation: right for the first, wrong for the second. One `lam` for both leaves
    them 90 degrees apart, `B A = I / 2` and an error of `|I / 2|^2 = 1/2`, whatever it is."""
    Q = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    blocks = Blocks.of([Q, eye], [Q.T.contiguous(), eye], [eye], [eye])
    R = torch.stack([Q, Q])[None]
    for lam in (0.0, 0.3, 1.0):
        error = blocks.error_square(rspace.soften(R, lam))
        torch.testing.assert_close(error, torch.tensor([0.5], dtype=torch.float64))
    assert rspace.client_lam(blocks, R).tolist() == [[1.0, 0.0]]
    exact = torch.stack([Q, eye])[None]
    assert float(blocks.error_square(exact)) == pytest.approx(0, abs=1e-15)


def test_lam_of_layers_of_several_ranks(monkeypatch):
    """What `auto_lam` and `client_lam` give for each layer alone, in the order of the layers."""
    shapes = [(9, 14, 4), (31, 8, 2), (12, 10, 4), (7, 9, 4)]
    inputs = planted(3, shapes, torch.float64, noise=3.0, seed=4)
    weights = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    monkeypatch.setattr(rspace.blocks, "BYTES", 5000)  # two layers of rank 4
    found = {}
    for lam in (*rspace.AUTO, 0.3):
        A, B, found[lam] = rspace.aggregate_with_lam(*inputs, weights, align="joint", lam=lam)
        expected = rspace.aggregate(*inputs, weights, align="joint", lam=lam)
        assert all(map(torch.equal, (*A, *B), (*expected[0], *expected[1])))
    one, each = (found[lam] for lam in rspace.AUTO)
    assert found[0.3].tolist() == [[0.3]] * 4
    assert (one.shape, each.shape) == ((4, 1), (4, 3))
    for layer in range(4):
        blocks = Blocks.of(*(t[layer::4] for t in inputs), weights)
        R = rspace.procrustes(blocks)
        assert one[layer].tolist() == rspace.auto_lam(blocks, R).tolist()
        assert each[layer].tolist() == rspace.client_lam(blocks, R)[0].tolist()
    assert len({*one.flatten().tolist()}) > 2  # that an order can be wrong


def test_half_a_turn_by_hand():
    """A client turned by 45 degrees to which a turn by 90 is given, beside one that stays: half of
    it, `lam = 1/2`."""
    c = 0.5**0.5
    half = torch.tensor([[c, -c], [c, c]], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    blocks = Blocks.of([half, eye], [half.T.contiguous(), eye], [eye], [eye])
    R = torch.stack([half @ half, eye])[None]
    assert float(rspace.client_lam(blocks, R)[0, 0]) == pytest.approx(0.5, abs=0.0126)


def inputs_of(clients, seed, noise=3.0, r=2):
    return planted(clients, [(7, 6, r)], torch.float64, noise=noise, seed=seed)


@pytest.mark.parametrize("clients", [2, 3])
def test_against_all_combinations(clients):
    """With every client in 21 steps: never above one for all, and of the best combination at most
    a few per cent of |D| away; in most cases none."""
    gaps, gains = [], []
    for seed in range(8):
        inputs = inputs_of(clients, seed)
        weights = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)[:clients]
        blocks = Blocks.of(*inputs, weights)
        R = rspace.procrustes(blocks)
        turns = [torch.stack([soft(R[0, i], lam) for lam in GRID]) for i in range(clients)]
        combinations = torch.cartesian_prod(*[torch.arange(len(GRID))] * clients)
        table = dense_error(inputs, [turns[i][combinations[:, i]] for i in range(clients)], weights)
        same = dense_error(inputs, turns, weights)
        best, norm = float(table.min()), float(blocks.norm_square()) ** 0.5
        lam = rspace.client_lam(blocks, R)[0].tolist()
        found = dense_error(inputs, [soft(R[0, i], x) for i, x in enumerate(lam)], weights)
        one = dense_error(inputs, rspace.rotations(blocks, align="joint", lam="auto")[0], weights)
        assert found <= one * (1 + 1e-9)
        # The grids have other points, so a little less than the best of this one is possible.
        assert found >= best - 0.01 * norm
        gaps.append((found - best) / norm)
        gains.append((float(same.min()) - best) / norm)
    assert max(gaps) < 0.05, gaps
    assert sum(gap < 0.005 for gap in gaps) >= 6, gaps
    assert max(gains) > 0.02, gains  # that there was something to gain


def cases():
    """Inputs of one layer, and weights, by name."""
    g = torch.Generator().manual_seed(5)

    def normal(count, *size):
        return [torch.randn(*size, generator=g, dtype=torch.float64) for _ in range(count)]

    def draw(clients, r):
        return normal(clients, r, 8), normal(clients, 9, r), normal(1, r, 8), normal(1, 9, r)

    A, B, ref_A, ref_B = strangers = draw(4, 3)
    turns = [haar(3, g) for _ in A]
    other_bases = [R.T @ A[0] for R in turns], [B[0] @ R for R in turns], A[:1], B[:1]
    signs = [1, -1, 1, -1]
    half_turns = [s * A[0] for s in signs], [s * B[0] for s in signs], A[:1], B[:1]
    cancel = [A[0], A[0], A[1], A[1]], [B[0], -B[0], B[1], -B[1]], ref_A, ref_B
    ranks = [a[: min(i + 1, 3)] for i, a in enumerate(A)]
    mixed = ranks, [b[:, : len(a)] for a, b in zip(ranks, B, strict=True)], ref_A, ref_B
    scaled = [s * a for s, a in zip((1e-5, 1.0, 1e3, 10.0), A, strict=True)], B, ref_A, ref_B
    return {
        "strangers": (strangers, None),
        "scales": (scaled, None),
        "weights": (strangers, torch.tensor([0.0, 1e-6, 5.0, 1.0])),
        "one client": (draw(1, 3), None),
        "rank 1": (draw(5, 1), None),
        "copies": (([A[0]] * 4, [B[0]] * 4, ref_A, ref_B), None),
        "they cancel": (cancel, None),
        "all zero": (([0 * a for a in A], [0 * b for b in B], ref_A, ref_B), None),
        "one zero": (([0 * A[0], *A[1:]], B, ref_A, ref_B), None),
        "no reference": ((A, B, [0 * ref_A[0]], [0 * ref_B[0]]), None),
        "other bases": (other_bases, None),
        "half turns": (half_turns, None),
        "mixed ranks": (mixed, torch.tensor([1.0, 2.0, 0.5, 1.0])),
    }


CASES = cases()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("proper", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_never_above_one_for_all(name, proper, dtype):
    """By the error of what comes out, measured on the factors in float64."""
    given, weights = CASES[name]
    inputs = [[t.to(dtype).contiguous() for t in side] for side in given]
    w = torch.ones(len(inputs[0])) if weights is None else weights
    w = (w / w.sum()).double()
    products = [B.double() @ A.double() for A, B in zip(*inputs[:2], strict=True)]
    D = sum(x * product for x, product in zip(w, products, strict=True))
    size = sum(float(x * product.norm()) for x, product in zip(w, products, strict=True))
    for align in ("joint", "A", "gpa", "optimal"):
        error = {}
        for lam in (0.0, 1.0, "auto", "auto-client"):
            (A,), (B,) = rspace.aggregate(*inputs, weights, align=align, lam=lam, proper=proper)
            assert bool(A.isfinite().all() and B.isfinite().all())
            error[lam] = float((D - B.double() @ A.double()).norm())
        # Squares from Gram blocks are off by their rounding.
        rounding = (1e-13 if dtype == torch.float64 else 1e-6) * size**2
        for lam in (0.0, 1.0, "auto"):
            assert error["auto-client"] ** 2 <= error[lam] ** 2 + rounding, (align, lam)


@pytest.mark.parametrize("seed", range(4))
def test_no_client_alone_can_do_better(seed):
    inputs = planted(5, [(12, 10, 3), (9, 8, 3)], torch.float64, noise=3.0, seed=seed)
    weights = torch.tensor([1.0, 3.0, 0.0, 2.0, 0.5])
    blocks = Blocks.of(*inputs, weights)
    norm = blocks.norm_square()
    R = rspace.procrustes(blocks)
    lam = rspace.client_lam(blocks, R)
    chosen = rspace.rotations(blocks, align="joint", lam="auto-client")
    found = blocks.error_square(chosen)
    one = blocks.error_square(rspace.rotations(blocks, align="joint", lam="auto"))
    assert bool((found <= one).all()) and bool((found < one).any())
    assert lam.shape == (2, 5) and bool(((lam >= 0) & (lam <= 1)).all())
    for i, other in itertools.product(range(5), GRID):
        moved = chosen.clone()
        moved[:, i] = rspace.soften(R[:, i], other)
        assert bool((blocks.error_square(moved) >= found - 0.003 * norm).all()), (i, other)
    again = rspace.client_lam(blocks, R)
    assert torch.equal(lam, again)


def test_layers_do_not_see_each_other():
    shapes = [(12, 10, 3), (9, 8, 3), (7, 14, 3)]
    inputs = planted(4, shapes, torch.float64, noise=3.0, seed=3)
    together = rspace.aggregate(*inputs, align="joint", lam="auto-client")
    for layer in range(3):
        one = [side[layer :: len(shapes)] for side in inputs]
        alone = rspace.aggregate(*one, align="joint", lam="auto-client")
        for both, single in zip(together, alone, strict=True):
            torch.testing.assert_close(both[layer], single[0], rtol=0, atol=1e-10)
