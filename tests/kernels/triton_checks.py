"""Triton's kernels in its interpreter, on CPU tensors: a program of its own, since the interpreter
is chosen when triton is imported. Prints a line of JSON a check, which ``test_triton.py`` reads.

The interpreter takes a third of a second for a thousand steps of elimination, so that every check
is as small as reaches its branches; ``gpu_checks.py`` has the full grid for a GPU.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback

import torch
from gpu_checks import compare, compare_blocks, non_finite_blocks
from problems import ORTHOGONALITY_TOLERANCE, OUTPUT_TOLERANCE, assert_close, haar, planted

from fedrot_kernels.backends import gpu, reference
from fedrot_kernels.plan import Flat

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def values(backend, *, dtype, shapes, clients=2, ranks=None, ref=None, weights=None, **options):
    inputs = planted(clients, shapes, dtype, ranks=ranks, seed=len(shapes))
    if ref is not None:
        inputs.ref_A[:] = [t.to(ref) for t in inputs.ref_A]
        inputs.ref_B[:] = [t.to(ref) for t in inputs.ref_B]
    compare(backend, inputs, None if weights is None else torch.tensor(weights), **options)


def blocks(backend, *, dtype, shapes, clients=2, ranks=None, ref=None, scale=1.0):
    inputs = planted(clients, shapes, dtype, ranks=ranks, seed=len(shapes))
    if ref is not None:
        inputs.ref_A[:] = [t.to(ref) for t in inputs.ref_A]
        inputs.ref_B[:] = [t.to(ref) for t in inputs.ref_B]
    compare_blocks(backend, inputs, scale)


def large_rank(backend):
    """Tiles that are cut in stacks, and too large for shared memory as a whole."""
    inputs = planted(1, [(70, 75, 66)], F64)
    A, B = backend.align_aggregate(*inputs)
    expected = reference.align_aggregate(*inputs)
    assert_close([*A, *B], [*expected[0], *expected[1]], OUTPUT_TOLERANCE[F64])


def beyond_the_largest_rank(backend):
    r = backend.LARGEST_RANK + 1
    inputs = planted(1, [(3, 4, r)])
    (A,), _ = backend.align_aggregate(*inputs, lam=0.0)
    torch.testing.assert_close(A, inputs.lora_A[0])
    runner = backend.plan(tuple(inputs), None, [A.zero_()], [torch.empty(3, r)], 0.0, "A", True)
    runner.run()
    torch.testing.assert_close(A, inputs.lora_A[0])
    mix = torch.randn(2, 1, 1, r, r)
    averages = backend.combine(*inputs, *mix)
    for side, expected in zip(averages, reference.combine(*inputs, *mix), strict=True):
        assert_close(side, expected, OUTPUT_TOLERANCE[F32])


def several_groups(backend):
    """Layers in groups that are launched one after the other, and units within a layer."""
    cache, gpu._cache_bytes = gpu._cache_bytes, lambda device: 1
    try:
        values(backend, dtype=F32, shapes=[(300, 9, 2), (5, 600, 3)], weights=[1.0, 2.0])
    finally:
        gpu._cache_bytes = cache


def views(backend):
    """Rows that begin anywhere and are further apart than they are long; nothing else is read."""
    whole = planted(2, [(35, 41, 3), (9, 5, 2)], BF16).map(
        lambda t: torch.nn.functional.pad(t, (3, 2, 1, 2), value=torch.nan)
    )
    compare(backend, whole.map(lambda t: t[1:-2, 3:-2]))
    compare_blocks(backend, whole.map(lambda t: t[1:-2, 3:-2]))


def whole_vectors(backend):
    """Rows that begin at multiples of 16 bytes: the only case of long runs of elements."""
    launches = []
    original = backend._run_length
    backend._run_length = lambda values: launches.append(original(values)) or launches[-1]
    try:
        values(backend, dtype=BF16, shapes=[(40, 48, 8)], lam=1.0)
        blocks(backend, dtype=BF16, shapes=[(40, 48, 8)])
    finally:
        backend._run_length = original
    assert 8 in launches and 1 in launches  # 1: the outputs beside the sentinels


def non_finite(backend):
    """One bad value spoils its layer and no other."""
    inputs = planted(2, [(20, 9, 2), (9, 30, 3)])
    A, B = backend.align_aggregate(*inputs)
    for value, lam in ((torch.nan, 0.4), (torch.inf, 0.0)):
        bad = inputs.map(torch.clone)
        bad.lora_A[3][1, 20] = value  # client 1, layer 1
        bad_A, bad_B = backend.align_aggregate(*bad, lam=lam)
        assert bool(bad_A[1].isnan().all()) and bool(bad_B[1].isnan().all())
        if lam == 0.4:
            assert torch.equal(bad_A[0], A[0]) and torch.equal(bad_B[0], B[0])
        R = backend.align(*bad, lam=lam)
        assert [bool(t.isnan().any()) for t in R] == [False, False, False, True]
        assert bool(R[3].isnan().all())
    M = torch.eye(3).repeat(2, 1, 1)
    M[1, 2, 0] = torch.nan
    R = backend.polar(M)
    assert torch.equal(R[0], M[0]) and bool(R[1].isnan().all())


def weights(backend):
    inputs = planted(3, [(9, 7, 2)])
    for given in (
        torch.tensor([1, 2, 3]),
        torch.tensor([1e308, 1e308, 1e300], dtype=F64),
        torch.tensor([0.0, 0.0, 1e-30]),
        torch.tensor([1.0, 9.0, 2.0, 9.0, 3.0, 9.0], dtype=F64)[::2],
    ):
        A, B = backend.align_aggregate(*inputs, given, lam=1.0)
        expected = reference.align_aggregate(*inputs, given, lam=1.0)
        assert_close([*A, *B], [*expected[0], *expected[1]], OUTPUT_TOLERANCE[F32])
    for bad in ([0.0, 0.0, 0.0], [1.0, -0.5, 2.0], [1.0, torch.nan, 1.0], [torch.inf, 1.0, 1.0]):
        A, B = backend.align_aggregate(*inputs, torch.tensor(bad), lam=0.0)
        assert bool(A[0].isnan().all()) and bool(B[0].isnan().all()), bad


def many_clients(backend):
    """More clients than weights are read at a time; small weights in float16."""
    inputs = planted(150, [(2, 3, 1)], F16)
    given = torch.linspace(0, 1, 150)
    A, B = backend.align_aggregate(*inputs, given, lam=0.0)
    expected = reference.align_aggregate(*inputs, given, lam=0.0)
    assert_close([*A, *B], [*expected[0], *expected[1]], OUTPUT_TOLERANCE[F16])


def flat_buffers(backend):
    shapes, offsets = [(9, 16, 2)], [(8, 64)]
    out = [torch.empty(2, 16)], [torch.empty(9, 2)]
    inputs = planted(2, shapes)
    refs = (inputs.ref_A, inputs.ref_B)
    flat = Flat([torch.zeros(96) for _ in range(2)], offsets, shapes)
    runner = backend.Runner((*flat.factors(), *refs), None, *out, 0.4, "joint", True, flat)
    for shift in (0, 8):
        flat.buffers = [torch.full((104,), torch.nan)[shift:][:96] for _ in range(2)]
        runner.rebind()
        for side, given in zip(flat.factors(), inputs, strict=False):
            for view, t in zip(side, given, strict=True):
                view.copy_(t)
        runner.run()
        for side, wanted in zip(out, reference.align_aggregate(*inputs), strict=True):
            assert_close(side, wanted, OUTPUT_TOLERANCE[F32])


def buffers_at_less_round_addresses(backend):
    """Refused: launches that a graph has captured read several numbers at a time."""
    inputs = planted(2, [(9, 16, 2)])
    out = [torch.empty(2, 16)], [torch.empty(9, 2)]
    even = [
        torch.cat([A.flatten(), B.flatten()])
        for A, B in zip(inputs.lora_A, inputs.lora_B, strict=True)
    ]
    odd = [torch.cat([torch.zeros(1), buffer])[1:] for buffer in even]
    for first, other in ((even, [even[0], odd[1]]), (odd, even)):
        flat = Flat(first, [(0, 32)], [(9, 16, 2)])
        given = (*flat.factors(), inputs.ref_A, inputs.ref_B)
        runner = backend.Runner(given, None, *out, 0.4, "joint", True, flat)
        flat.buffers = other
        try:
            runner.rebind()
        except ValueError as error:
            assert first is even and "buffers[1] must begin at a multiple of 32" in str(error)
        else:
            assert first is odd
        runner.run()  # on those of before where it was refused
        for side, wanted in zip(out, reference.align_aggregate(*inputs), strict=True):
            assert_close(side, wanted, OUTPUT_TOLERANCE[F32])


def half_turn(backend):
    """An eigenvalue -1 at lam = 1/2 goes to +1."""
    for dtype in (F32, F64):
        signs = torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=F64)
        Q = haar(4, torch.Generator().manual_seed(3))
        turn, eye = ((Q * signs) @ Q.T).to(dtype), torch.eye(4, dtype=dtype)
        zero = torch.zeros(1, 4, dtype=dtype)
        (R,) = backend.align([turn], [zero], [eye], [zero], lam=0.5, align="A")
        torch.testing.assert_close(R, eye, atol=2e-5, rtol=0)


def polar(backend, *, dtype, n, rank, proper):
    """Orthogonal, optimal, and the limit of polar(M + eps I); full rank, deficient, m < n."""
    g = torch.Generator().manual_seed(10 * n + rank)
    M = torch.randn(2, n, rank, generator=g, dtype=F64)
    M = M @ torch.randn(rank, n, generator=g, dtype=F64) if rank < n else M
    M[0, 0] *= -1  # one of two has the wrong determinant
    M = (1e-20 * M).to(dtype)
    R = backend.polar(M, proper=proper)
    eye = torch.eye(n, dtype=dtype)
    assert float((R @ R.mT - eye).abs().max()) < ORTHOGONALITY_TOLERANCE[dtype]
    optimum = torch.linalg.svdvals(M.double()).sum(-1)
    if proper:
        assert float((torch.linalg.det(R.double()) - 1).abs().max()) < 1e-4
    if not proper or rank < n:
        gain = (R.double() * M.double()).sum((-1, -2))
        assert bool((gain >= optimum * (1 - 1e-5)).all())
    atol = 2e-3 if dtype == F32 else 1e-8
    torch.testing.assert_close(R, reference.polar(M, proper=proper), atol=atol, rtol=0)
    if n > 2:
        wide = backend.polar(M[:, : n - 1], proper=proper)
        wanted = reference.polar(M[:, : n - 1], proper=proper)
        torch.testing.assert_close(wide, wanted, atol=atol, rtol=0)
    assert backend.polar(M[:0]).shape == (0, n, n)


def null_spaces_that_do_not_meet(backend):
    """U_2^T V_2 is zero or keeps the determinant from being +1: several levels of the limit."""
    for ones in ([(0, 1)], [(0, 1), (1, 2)], [(0, 1), (1, 0)]):
        M = torch.zeros(3, 3)
        for i, j in ones:
            M[i, j] = 1.0
        R = backend.polar(M, proper=True)
        torch.testing.assert_close(R @ R.T, torch.eye(3))
        assert abs(float(torch.linalg.det(R)) - 1) < 1e-5
        assert abs(float((R * M).sum()) - len(ones)) < 1e-5


def combine_is_the_average_of_align_aggregate(backend):
    """Bit for bit, where the factors are not float16: then matrices of any size are multiplied."""
    for dtype in (F32, BF16):
        inputs = planted(2, [(9, 40, 2), (35, 7, 2)], dtype)
        weights = torch.tensor([1.0, 2.0], dtype=F64)
        R = torch.stack(backend.align(*inputs, lam=1.0)).view(2, 2, 2, 2).transpose(0, 1)
        W = R * (weights / weights.sum()).to(R.dtype)[:, None, None]
        averages = backend.combine(*inputs, W, W)
        wanted = backend.align_aggregate(*inputs, weights, lam=1.0)
        for side, expected in zip(averages, wanted, strict=True):
            assert_close(side, expected, 0.0)


def _values(**options):
    return functools.partial(values, **options)


def _blocks(**options):
    return functools.partial(blocks, **options)


CHECKS = {
    "bfloat16 r3 mixed ranks": _values(
        dtype=BF16, shapes=[(13, 300, 3)], clients=5, ranks=[3, 1, 2, 3, 3]
    ),
    "float32 r8 A": _values(dtype=F32, shapes=[(29, 41, 8)], align="A", lam=1.0, proper=False),
    "float64 r4 B": _values(dtype=F64, shapes=[(290, 41, 4)], align="B"),
    "float16 r16": _values(dtype=F16, shapes=[(29, 41, 16)], clients=1),
    "float32 r17 half": _values(dtype=F32, shapes=[(29, 41, 17)], clients=1, lam=0.5),
    "float64 r9 mixed ranks": _values(
        dtype=F64, shapes=[(29, 41, 9)], ranks=[9, 5], weights=[1, 2], lam=1.0
    ),
    "bfloat16 r33": _values(dtype=BF16, shapes=[(37, 41, 33)], clients=1, lam=1.0),
    "float32 lam 0": _values(dtype=F32, shapes=[(9, 41, 5)], lam=0.0),
    "bfloat16 and float32": _values(dtype=BF16, shapes=[(29, 41, 4)], ref=F32),
    "float16 and float64": _values(dtype=F16, shapes=[(29, 41, 3)], ref=F64),
    "float32 and float16": _values(dtype=F32, shapes=[(29, 41, 2)], ref=F16),
    "single positions": _values(dtype=F32, shapes=[(1, 1, 1), (1, 5, 1), (6, 1, 1)], clients=1),
    **{
        f"polar {str(dtype)[6:]} n{n} rank {rank}{' proper' * proper}": functools.partial(
            polar, dtype=dtype, n=n, rank=rank, proper=proper
        )
        for dtype, n, rank, proper in [
            (F32, 1, 1, True),
            (F32, 2, 0, False),
            (F32, 3, 3, True),
            (F64, 3, 3, True),
            (F64, 4, 1, True),
            (F32, 5, 2, False),
            (F32, 16, 7, True),
            (F32, 17, 17, True),
            (F64, 8, 8, False),
        ]
    },
    "blocks float32 r1": _blocks(dtype=F32, shapes=[(5, 7, 1), (3, 41, 1)], clients=1),
    "blocks float32 r5 in parts": _blocks(dtype=F32, shapes=[(1030, 9, 5), (41, 2, 3)]),
    "blocks bfloat16 r3 mixed ranks": _blocks(
        dtype=BF16, shapes=[(13, 70, 3), (65, 9, 2)], clients=5, ranks=[3, 1, 2, 3, 3]
    ),
    "blocks float64 r16": _blocks(dtype=F64, shapes=[(29, 41, 16)], clients=3),
    "blocks float16 r33": _blocks(dtype=F16, shapes=[(37, 71, 33)], ranks=[33, 17]),
    "blocks bfloat16 and float32": _blocks(dtype=BF16, shapes=[(29, 41, 4)], ref=F32),
    "blocks float16 and float64": _blocks(dtype=F16, shapes=[(29, 41, 3)], ref=F64),
    "blocks float32 and bfloat16": _blocks(dtype=F32, shapes=[(29, 41, 2)], ref=BF16),
    "blocks float16 large": _blocks(dtype=F16, shapes=[(29, 41, 4)], ref=F32, scale=1e6),
    "blocks float16 small": _blocks(dtype=F16, shapes=[(29, 41, 4)], ref=F32, scale=1e-6),
    "non-finite blocks": functools.partial(non_finite_blocks, device="cpu"),
    **{
        check.__name__.replace("_", " "): check
        for check in (
            large_rank,
            beyond_the_largest_rank,
            several_groups,
            views,
            whole_vectors,
            non_finite,
            weights,
            many_clients,
            flat_buffers,
            buffers_at_less_round_addresses,
            half_turn,
            null_spaces_that_do_not_meet,
            combine_is_the_average_of_align_aggregate,
        )
    },
}


def patch_once_a_launch() -> None:
    """The interpreter replaces all of ``triton.language`` anew at every call of a device function,
    which is more than half of its time: the launch around the call has done that already."""
    from triton import language
    from triton.runtime import interpreter

    core, patch = language.core, getattr(interpreter, "_patch_lang", None)
    if patch is None:  # not a part of Triton's interface
        return

    def patch_what_is_not(function):
        seen = [v for v in function.__globals__.values() if v is language or v is core]
        # What has been replaced no longer is a builtin.
        return patch(function) if any(core.is_builtin(module.dot) for module in seen) else None

    interpreter._patch_lang = patch_what_is_not


def main() -> None:
    from fedrot_kernels.backends import triton

    patch_once_a_launch()
    torch.set_num_threads(1)
    for name in sys.argv[1:] or CHECKS:
        error = None
        try:
            CHECKS[name](triton)
        except Exception:
            error = traceback.format_exc()
        print(json.dumps([name, error]), flush=True)


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    main()
