"""Clients of 16 bits at ranks that processors with a matrix unit (AMX) multiply in tiles of 16 rows
of 32 bfloat16: sizes that do and do not fit, and all else that such tiles could get wrong. On other
machines the vector kernels have to pass the same."""

from __future__ import annotations

import pytest
import torch
from problems import GRAM_TOLERANCE, OUTPUT_TOLERANCE, assert_close, planted
from test_values import compare

from fedrot_kernels import Plan
from fedrot_kernels.backends import reference

op = torch.ops.fedrot


def narrow_clients(inputs, ref=torch.float32, dtype=torch.bfloat16):
    """A float32 reference shows errors that rounding the result to 16 bits would hide."""
    inputs.lora_A[:] = [t.to(dtype) for t in inputs.lora_A]
    inputs.lora_B[:] = [t.to(dtype) for t in inputs.lora_B]
    inputs.ref_A[:] = [t.to(ref) for t in inputs.ref_A]
    inputs.ref_B[:] = [t.to(ref) for t in inputs.ref_B]
    return inputs


def with_gaps(t):
    wide = torch.full((t.shape[0], t.shape[1] + 5), float("nan"), dtype=t.dtype)
    wide[:, : t.shape[1]] = t
    return wide[:, : t.shape[1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("r", [9, 16, 17, 24, 31, 32, 33, 48, 64])
@pytest.mark.parametrize("align", ["joint", "A", "B"])
def test_against_reference(r, align, dtype):
    """Eleven clients are more than are multiplied together (eight, two of r = 64 in float16). The
    last chunk of positions and the last of directions are cut off."""
    shapes = [(530, 1023, r), (1040, 147, r), (160, 512, r)]
    ranks = [r, r, r // 2, 1, r, r - 1, r, 5, r, r, (2 * r) // 3]
    for given in (None, ranks):
        inputs = narrow_clients(planted(11, shapes, ranks=given, seed=r), dtype=dtype)
        # Reflections stay: which direction is turned for a proper one is decided by small gaps.
        compare(inputs, torch.arange(11.0), lam=0.4, align=align, proper=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("r", [100, 256])
def test_large_ranks(r, dtype):
    inputs = narrow_clients(planted(3, [(r + 9, 2 * r + 1, r)], seed=r), dtype=dtype)
    compare(inputs, proper=False)


@pytest.mark.parametrize("ref", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_references(ref):
    compare(narrow_clients(planted(3, [(130, 600, 20), (48, 64, 16)]), ref))


@pytest.mark.parametrize("ref", [torch.bfloat16, torch.float32], ids=str)
def test_gram(ref):
    """Tiles of several clients, cut off at every end, and more positions than are multiplied at a
    time, of few clients and of many; a float reference is not rounded."""
    shapes = [(530, 1063, 5), (1040, 147, 20), (31, 33, 16)]
    few = [planted(3, shapes, ranks=given, seed=5) for given in (None, [20, 3, 16])]
    for inputs in (*few, planted(41, [(300, 650, 7)], seed=6)):
        narrow = narrow_clients(inputs, ref)
        for given in (narrow, narrow.map(with_gaps)):
            for actual, expected in zip(op.gram(*given), reference.gram(*narrow), strict=True):
                assert_close([actual], [expected], GRAM_TOLERANCE[torch.float32])


def test_float_reference_keeps_its_bits():
    """A reference is told from one that differs by less than bfloat16 resolves."""
    inputs = narrow_clients(planted(1, [(64, 64, 16)]))
    moved = inputs.map(lambda t: t if t.dtype == torch.bfloat16 else t * (1 + 2.0**-10))
    moved.ref_A[0][3] = inputs.ref_A[0][3]
    (R,), (moved_R,) = op.align(*inputs, lam=1.0), op.align(*moved, lam=1.0)
    (expected,) = reference.align(*moved.map(torch.Tensor.double), lam=1.0)
    assert float((moved_R - expected).abs().max()) < 2e-6
    assert float((R - expected).abs().max()) > 2e-5


@pytest.mark.parametrize("r", [20, 32])
def test_float16_loses_nothing(r):
    """Not the products of what bfloat16 leaves of two float16 either."""
    inputs = planted(2, [(64, 64, r)], torch.float16, seed=1)
    expected = reference.align(*inputs.map(torch.Tensor.double), lam=1.0)
    for R, e in zip(op.align(*inputs, lam=1.0), expected, strict=True):
        assert float((R - e).abs().max()) < 1e-6


def test_cancellation_in_combine():
    """Two clients that nearly cancel: matrices have all bits of a float."""
    inputs = narrow_clients(planted(2, [(96, 160, 16)]))
    inputs.lora_A[1], inputs.lora_B[1] = inputs.lora_A[0], inputs.lora_B[0]
    mix = torch.randn(1, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    mix[:, 1] = mix[:, 0] * -(1 - 2.0**-10)
    A, B = op.combine(*inputs, mix, mix)
    first, both = mix[0, 0].double(), mix[0].double().sum(0)
    client_A, client_B = inputs.lora_A[0].double(), inputs.lora_B[0].double()
    of_one = float((first.T @ client_A).abs().max())
    assert float((A[0] - both.T @ client_A).abs().max()) < 2.0**-22 * of_one
    of_one = float((client_B @ first).abs().max())
    assert float((B[0] - client_B @ both).abs().max()) < 2.0**-22 * of_one


@pytest.mark.parametrize("ref", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("client", [torch.bfloat16, torch.float16], ids=str)
def test_bits_do_not_depend_on_blocks_or_threads(client, ref):
    """One layer is cut among threads, forty are taken whole in blocks of clients."""
    ranks = [33, 7, 33, 32, 1, 33, 20, 33, 33, 9, 33, 31, 33]
    one = narrow_clients(planted(13, [(700, 1100, 33)], ranks=ranks), ref, client)
    many = one.map(lambda t: t)
    many.lora_A[:] = [t for t in one.lora_A for _ in range(40)]
    many.lora_B[:] = [t for t in one.lora_B for _ in range(40)]
    many.ref_A[:], many.ref_B[:] = one.ref_A * 40, one.ref_B * 40
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for inputs in (one, many):
                A, B = op.align_aggregate(*inputs)
                results += [(A[0], B[0]), (A[-1], B[-1])]
    finally:
        torch.set_num_threads(before)
    for A, B in results[1:]:
        assert torch.equal(A, results[0][0]) and torch.equal(B, results[0][1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_combine_of_smaller_ranks(dtype):
    """Rows of a matrix beyond its client's rank are not read."""
    inputs = narrow_clients(planted(3, [(70, 1100, 33)], ranks=[33, 20, 5]), dtype=dtype)
    mix = torch.randn(1, 3, 33, 33, generator=torch.Generator().manual_seed(0))
    expected = reference.combine(*inputs.map(torch.Tensor.double), mix.double(), mix.double())
    for i, rank in enumerate([33, 20, 5]):
        mix[:, i, rank:] = float("nan")
    for actual, e in zip(op.combine(*inputs, mix, mix), expected, strict=True):
        assert_close([t.double() for t in actual], e, OUTPUT_TOLERANCE[torch.float32])


def test_rows_with_gaps():
    inputs = narrow_clients(planted(3, [(96, 128, 16), (40, 50, 19)]))
    for actual, expected in zip(
        op.align_aggregate(*inputs.map(with_gaps)), op.align_aggregate(*inputs), strict=True
    ):
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a, e)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_what_is_not_finite_is_named(value, side):
    inputs = narrow_clients(planted(3, [(96, 128, 16)] * 2))
    getattr(inputs, side)[5][1, 7] = value  # client 2, layer 1
    with pytest.raises(ValueError, match=f"{side}.*client 2, layer 1"):
        op.align_aggregate(*inputs)


def test_beside_pytorch_products():
    """PyTorch multiplies bfloat16 matrices on the same unit, which each sets up for itself."""
    inputs = narrow_clients(planted(4, [(96, 128, 16), (200, 300, 24)]))
    left, right = torch.randn(300, 200).bfloat16(), torch.randn(200, 500).bfloat16()
    plan = Plan(*inputs)
    product, (A, B) = left @ right, plan()
    A, B = [t.clone() for t in A], [t.clone() for t in B]
    for _ in range(5):
        assert torch.equal(left @ right, product)
        again_A, again_B = plan()
        assert all(torch.equal(a, b) for a, b in zip((*A, *B), (*again_A, *again_B), strict=True))
    expected = reference.align_aggregate(*inputs)
    assert_close((*A, *B), (*expected[0], *expected[1]), OUTPUT_TOLERANCE[torch.float32])
