"""What every GPU backend must satisfy, against the float64 reference.

``checks(full)`` yields ``(name, check)``; ``check(backend, device)`` raises ``AssertionError``.
A backend is a module with ``align_aggregate``, ``align``, ``polar`` and ``Runner``;
``block_checks(full)`` are for modules with ``gram`` and ``combine``. Used by
``test_gpu.py`` on a GPU, by the tests of the backends that can run without one on the CPU, and by
``benchmarks/gpu_suite.py``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from problems import (
    GRAM_TOLERANCE,
    ORTHOGONALITY_TOLERANCE,
    OUTPUT_TOLERANCE,
    ROTATION_TOLERANCE,
    Inputs,
    assert_close,
    haar,
    planted,
)
from torch import Tensor

from fedrot_kernels.backends import reference
from fedrot_kernels.plan import Flat

Check = Callable[[Any, str], None]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAN_ON_A_GPU = ("non-finite", "bad weights")  # checks of what the CPU backend raises for
SMALL_RANKS, FULL_RANKS = (1, 3, 8, 17), (1, 2, 3, 4, 5, 8, 11, 16, 17, 32, 33, 64)


def checks(full: bool) -> Iterator[tuple[str, Check]]:
    """Every check with its name; without ``full`` a small selection that reaches every branch."""
    modes = ("joint", "A", "B")
    for dtype, align, r in itertools.product(DTYPES, modes, FULL_RANKS if full else SMALL_RANKS):
        if full or (align == "joint") == (r in (3, 17)):
            name = f"values {_name(dtype)} {align} r{r}"
            yield name, functools.partial(_values, dtype=dtype, align=align, r=r, full=full)
    for dtype, r in [(torch.float32, 64), (torch.bfloat16, 72)]:
        yield f"large rank {_name(dtype)} r{r}", functools.partial(_large_rank, dtype=dtype, r=r)
    if full:
        for dtype, r in itertools.product((torch.float64, torch.float32), (128, 200, 256)):
            name = f"large rank {_name(dtype)} r{r}"
            yield name, functools.partial(_large_rank, dtype=dtype, r=r)
        for dtype, r in itertools.product((torch.float32, torch.bfloat16), (4, 16)):
            name = f"many units {_name(dtype)} r{r}"
            yield name, functools.partial(_many_units, dtype=dtype, r=r)
    for client, ref in itertools.product(DTYPES, DTYPES):
        if full or (client, ref) in ((torch.bfloat16, torch.float32), (torch.float16, DTYPES[0])):
            name = f"clients {_name(client)} reference {_name(ref)}"
            yield name, functools.partial(_two_dtypes, client=client, ref=ref)
    for dtype in DTYPES if full else (torch.float32, torch.bfloat16):
        yield f"mixed ranks {_name(dtype)}", functools.partial(_mixed_ranks, dtype=dtype)
        yield f"views {_name(dtype)}", functools.partial(_views, dtype=dtype)
        yield f"non-finite {_name(dtype)}", functools.partial(_non_finite, dtype=dtype)
    yield "single positions", _single_positions
    yield "weights", _weights
    yield "bad weights", _bad_weights
    yield "flat buffers", _flat_buffers
    yield "half turns", _half_turns
    for dtype in (torch.float32, torch.float64):
        sizes = (1, 2, 3, 4, 8, 16, 33, 64, 130) if full else (1, 2, 5, 17, 33)
        yield f"polar {_name(dtype)}", functools.partial(_polar, dtype=dtype, sizes=sizes)
        yield f"deficient polar {_name(dtype)}", functools.partial(_deficient, dtype=dtype)


def block_checks(full: bool) -> Iterator[tuple[str, Check]]:
    """The same of ``gram`` and ``combine``."""
    for dtype, r in itertools.product(DTYPES, FULL_RANKS if full else SMALL_RANKS):
        if full or (dtype in (DTYPES[0], DTYPES[2])) == (r in (3, 17)):
            yield f"blocks {_name(dtype)} r{r}", functools.partial(_blocks, dtype=dtype, r=r)
    for client, ref in itertools.product(DTYPES, DTYPES):
        if full or (client, ref) in ((torch.bfloat16, torch.float32), (torch.float16, DTYPES[0])):
            name = f"blocks of clients {_name(client)} reference {_name(ref)}"
            yield name, functools.partial(_blocks_of_two_dtypes, client=client, ref=ref)
    for dtype in DTYPES if full else (torch.float32, torch.bfloat16):
        yield f"blocks of views {_name(dtype)}", functools.partial(_blocks_of_views, dtype=dtype)
    if full:
        for r in (128, 200, 256):
            yield f"blocks r{r}", functools.partial(_blocks, dtype=torch.float32, r=r)
        for dtype in (torch.float32, torch.bfloat16):
            yield f"many blocks {_name(dtype)}", functools.partial(_many_blocks, dtype=dtype)
    yield "blocks of one client", _blocks_of_one_client
    yield "non-finite blocks", non_finite_blocks


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _on(device: str, inputs: Inputs) -> Inputs:
    return inputs.map(lambda t: t.to(device))


def _ragged(r: int) -> list[tuple[int, int, int]]:
    """Layers of different shape and rank, none a multiple of a tile."""
    return [(2 * r + 7, 300 + r, r), (517 + r, 3 * r + 1, r), (r + 5, r + 3, max(1, r // 2))]


def compare(backend, inputs: Inputs, weights: Tensor | None = None, **options: Any) -> None:
    """Operators and plan: right, written everywhere, the same bits again, inputs untouched."""
    options = {"lam": 0.4, "align": "joint", "proper": True, **options}
    before = inputs.map(torch.clone)
    rotations = backend.align(*inputs, **options)
    expected = reference.align(*inputs, **options)
    assert_close(rotations, expected, ROTATION_TOLERANCE[rotations[0].dtype])
    for R in rotations:
        identity = torch.eye(R.shape[0], dtype=R.dtype, device=R.device)
        assert float((R @ R.T - identity).abs().max()) <= ORTHOGONALITY_TOLERANCE[R.dtype]

    A, B = backend.align_aggregate(*inputs, weights, **options)
    expected_A, expected_B = reference.align_aggregate(*inputs, weights, **options)
    assert_close(A, expected_A, OUTPUT_TOLERANCE[A[0].dtype])
    assert_close(B, expected_B, OUTPUT_TOLERANCE[B[0].dtype])

    out_A, out_B = ([_poisoned(t) for t in side] for side in (A, B))
    runner = backend.Runner(
        tuple(inputs), weights, out_A, out_B, options["lam"], options["align"], options["proper"]
    )
    for _ in range(2):
        for out in [*out_A, *out_B]:
            out.fill_(torch.nan)
        runner.run()
        for out, wanted in zip([*out_A, *out_B], [*A, *B], strict=True):
            assert torch.equal(out, wanted), "a plan gives other bits"
            edge = out.as_strided((out.shape[0],), (out.stride(0),), out.shape[1])
            assert bool((edge == -7).all()), "written beside the output"
    for side, was in zip(inputs, before, strict=True):
        assert all(torch.equal(t, w) for t, w in zip(side, was, strict=True)), "input changed"


def _poisoned(like: Tensor) -> Tensor:
    """NaN of the shape of ``like`` inside a buffer of -7, one column beside it."""
    rows, columns = like.shape
    buffer = torch.full((rows * (columns + 1) + 1,), -7.0, dtype=like.dtype, device=like.device)
    return buffer.as_strided((rows, columns), (columns + 1, 1)).fill_(torch.nan)


def _values(backend, device, *, dtype, align, r, full) -> None:
    inputs = _on(device, planted(3, _ragged(r), dtype, seed=r))
    weights = torch.tensor([3.0, 0.0, 1.5], device=device)
    grid = (
        itertools.product((0.0, 0.4, 1.0), (True, False)) if full else [(0.4, True), (1.0, False)]
    )
    for lam, proper in grid:
        compare(backend, inputs, weights, lam=lam, align=align, proper=proper)


def _large_rank(backend, device, *, dtype, r) -> None:
    compare(backend, _on(device, planted(2, [(r + 9, 2 * r + 1, r)], dtype, seed=r)))


def _many_units(backend, device, *, dtype, r) -> None:
    shapes = [(2048, 1500, r), (700, 9000, r), (5000, 2048, r)] * 3
    compare(backend, _on(device, planted(6, shapes, dtype, seed=r)))


def _two_dtypes(backend, device, *, client, ref) -> None:
    for r in (4, 16):
        inputs = planted(2, _ragged(r))
        factors = [[t.to(client) for t in inputs.lora_A], [t.to(client) for t in inputs.lora_B]]
        refs = [[t.to(ref) for t in inputs.ref_A], [t.to(ref) for t in inputs.ref_B]]
        compare(backend, _on(device, Inputs(*factors, *refs)))


def _mixed_ranks(backend, device, *, dtype) -> None:
    for lam in (0.4, 0.5, 1.0):
        inputs = _on(device, planted(4, _ragged(20), dtype, ranks=[20, 1, 9, 16]))
        compare(backend, inputs, lam=lam)


def _views_of(device, r: int, dtype: torch.dtype) -> Inputs:
    """Factors within larger ones that hold NaN around them."""
    whole = _on(device, planted(3, _ragged(r), dtype)).map(
        lambda t: torch.nn.functional.pad(t, (3, 2, 1, 2), value=torch.nan)
    )
    return whole.map(lambda t: t[1:-2, 3:-2])


def _views(backend, device, *, dtype) -> None:
    """Rows that begin anywhere and are further apart than they are long; nothing else is read."""
    for r in (3, 16):
        compare(backend, _views_of(device, r, dtype))


def _non_finite(backend, device, *, dtype) -> None:
    """One bad value spoils its layer and no other."""
    inputs = _on(device, planted(3, _ragged(8), dtype))
    A, B = backend.align_aggregate(*inputs)
    for value in (torch.nan, torch.inf):
        bad = inputs.map(torch.clone)
        bad.lora_B[1 * 3 + 1][300, 2] = value  # client 1, layer 1
        bad_A, bad_B = backend.align_aggregate(*bad)
        assert bool(bad_A[1].isnan().all()) and bool(bad_B[1].isnan().all())
        for layer in (0, 2):
            assert torch.equal(bad_A[layer], A[layer]) and torch.equal(bad_B[layer], B[layer])
        R = backend.align(*bad)
        assert [bool(t.isnan().any()) for t in R] == [i == 4 for i in range(9)]


def _single_positions(backend, device) -> None:
    compare(backend, _on(device, planted(1, [(1, 1, 1), (1, 5, 1), (6, 1, 1)])))
    compare(backend, _on(device, planted(5, [(1, 2, 3), (300, 1, 2)], torch.bfloat16)))


def _weights(backend, device) -> None:
    inputs = _on(device, planted(3, _ragged(4)))
    for weights in (
        torch.tensor([1, 2, 3]),
        torch.tensor([1e300, 2e300, 1e300], dtype=torch.float64),
        torch.tensor([0.0, 0.0, 1e-30]),
        torch.tensor([1.0, 9.0, 2.0, 9.0, 3.0, 9.0], dtype=torch.float64)[::2],
    ):
        compare(backend, inputs, weights.to(device))


def _bad_weights(backend, device) -> None:
    """Found only on the device, where raising would mean waiting for it: everything is NaN."""
    inputs = _on(device, planted(2, [(9, 14, 4)]))
    for values in ([0.0, 0.0], [1.0, -0.5], [1.0, torch.nan], [torch.inf, 1.0]):
        A, B = backend.align_aggregate(*inputs, torch.tensor(values, device=device))
        assert bool(A[0].isnan().all()) and bool(B[0].isnan().all()), values


def _flat_buffers(backend, device) -> None:
    shapes = [(9, 14, 4), (31, 8, 4)]
    offsets = [(5, 200), (100, 300)]
    out = None
    for seed in range(3):
        inputs = _on(device, planted(3, shapes, seed=seed))
        buffers = [torch.full((500,), torch.nan, device=device) for _ in range(3)]
        views = Flat(buffers, offsets, shapes)
        for side, given in zip(views.factors(), inputs, strict=False):
            for view, t in zip(side, given, strict=True):
                view.copy_(t)
        if out is None:
            flat, refs = views, (inputs.ref_A, inputs.ref_B)
            out = [torch.empty_like(t) for t in refs[0]], [torch.empty_like(t) for t in refs[1]]
            runner = backend.Runner((*flat.factors(), *refs), None, *out, 0.4, "joint", True, flat)
        else:
            flat.buffers = buffers
            runner.rebind()
        runner.run()
        expected = reference.align_aggregate(inputs.lora_A, inputs.lora_B, *refs)
        for actual, wanted in zip(out, expected, strict=True):
            assert_close(actual, wanted, OUTPUT_TOLERANCE[torch.float32])


def _half_turns(backend, device) -> None:
    """An eigenvalue -1 at lam = 1/2 goes to +1."""
    g = torch.Generator().manual_seed(3)
    for dtype, n in ((torch.float32, 4), (torch.float64, 4), (torch.float32, 18)):
        signs = torch.ones(n, dtype=torch.float64)
        signs[:2] = -1
        Q = haar(n, g)
        turn = ((Q * signs) @ Q.T).to(device, dtype)
        eye, zero = torch.eye(n, dtype=dtype, device=device), torch.zeros(1, n, device=device)
        (R,) = backend.align([turn], [zero.to(dtype)], [eye], [zero.to(dtype)], lam=0.5, align="A")
        torch.testing.assert_close(R, eye, atol=2e-5, rtol=0)


def _polar(backend, device, *, dtype, sizes) -> None:
    g = torch.Generator().manual_seed(7)
    for n, proper in itertools.product(sizes, (False, True)):
        for m in {n, (n + 1) // 2}:
            M = torch.randn(2, 3, m, n, generator=g, dtype=torch.float64).to(device, dtype)
            for scale in (1.0, 1e-25, 1e25):
                R = backend.polar(scale * M, proper=proper)
                wanted = reference.polar(scale * M, proper=proper)
                assert_close([R], [wanted], 2 * ROTATION_TOLERANCE[dtype])
    if torch.device(device).type == "cuda":
        assert bool(backend.polar(torch.full((2, 2), torch.nan, device=device)).isnan().all())
    assert backend.polar(torch.zeros(0, 3, 3, dtype=dtype, device=device)).shape == (0, 3, 3)


def _deficient(backend, device, *, dtype) -> None:
    """Orthogonal, optimal, and the limit of polar(M + eps I) where that is well-posed."""
    g = torch.Generator().manual_seed(11)
    for (n, rank), proper in itertools.product(
        [(1, 0), (2, 1), (4, 3), (4, 1), (8, 0), (16, 7), (33, 32)], (True, False)
    ):
        left = torch.randn(n, rank, dtype=torch.float64, generator=g)
        M = left @ torch.randn(rank, n, dtype=torch.float64, generator=g)
        M = M.to(device, dtype)
        R = backend.polar(M, proper=proper)
        eye = torch.eye(n, dtype=dtype, device=device)
        assert float((R @ R.T - eye).abs().max()) < ORTHOGONALITY_TOLERANCE[dtype]
        optimum = float(torch.linalg.svdvals(M.double()).sum())
        assert float((R.double() * M.double()).sum()) >= optimum * (1 - 1e-5)
        if proper:
            assert abs(float(torch.linalg.det(R.double())) - 1) < 1e-4
        wanted = reference.polar(M, proper=proper)
        atol = 2e-3 if dtype == torch.float32 else 1e-8
        torch.testing.assert_close(R, wanted, atol=atol, rtol=0)
    identity = torch.eye(4, dtype=dtype, device=device)
    assert torch.equal(backend.polar(0 * identity), identity)


def compare_blocks(backend, inputs: Inputs, scale: float = 1.0) -> None:
    """Right, symmetric to the bit, the same bits again, inputs untouched; what is beyond a rank is
    not read."""
    before = inputs.map(torch.clone)
    layers, r = inputs.layers, max(A.shape[0] for A in inputs.ref_A)
    blocks = backend.gram(*inputs)
    for G, expected in zip(blocks, reference.gram(*inputs), strict=True):
        assert_close([G], [expected], GRAM_TOLERANCE[G.dtype])
        assert torch.equal(G, G.mT), "not symmetric"
    generator = torch.Generator().manual_seed(r)
    size = (2, inputs.clients, layers, r, r)
    mix = scale * torch.randn(size, generator=generator, dtype=torch.float64)
    mix = mix.to(blocks[0].device, blocks[0].dtype)
    for i, A in enumerate(inputs.lora_A):
        client, layer = divmod(i, layers)
        mix[:, client, layer, A.shape[0] :] = torch.nan
        mix[:, client, layer, :, inputs.ref_A[layer].shape[0] :] = torch.nan
    mix_A, mix_B = mix.transpose(1, 2)
    # Matrices that do not lie one behind the other, and that begin anywhere.
    shifted = torch.cat([mix_A.new_zeros(1), mix_A.flatten()])[1:].view(mix_A.shape)
    expected = [t for side in reference.combine(*inputs, mix_A, mix_B) for t in side]
    results = []
    for left in (mix_A, mix_A, shifted):
        A, B = backend.combine(*inputs, left, mix_B)
        assert_close([*A, *B], expected, OUTPUT_TOLERANCE[A[0].dtype])
        results.append([*A, *B])
    first, again = [*results[0], *blocks], [*results[1], *backend.gram(*inputs)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "other bits"
    for side, was in zip(inputs, before, strict=True):
        assert all(torch.equal(t, w) for t, w in zip(side, was, strict=True)), "input changed"


def _blocks(backend, device, *, dtype, r) -> None:
    """The longest layer is cut in parts; with mixed ranks the blocks have gaps."""
    for ranks in (None, [r, 1, max(1, r - 1)]):
        shapes = [*_ragged(r), (1100 + r, 2, r)]
        compare_blocks(backend, _on(device, planted(3, shapes, dtype, ranks=ranks, seed=r)))


def _blocks_of_two_dtypes(backend, device, *, client, ref) -> None:
    for r, scale in ((4, 1.0), (16, 1e-6), (16, 1e6)):
        inputs = planted(2, _ragged(r))
        factors = [[t.to(client) for t in inputs.lora_A], [t.to(client) for t in inputs.lora_B]]
        refs = [[t.to(ref) for t in inputs.ref_A], [t.to(ref) for t in inputs.ref_B]]
        # A result in float16 has little room.
        scale = 1.0 if ref == torch.float16 else scale
        compare_blocks(backend, _on(device, Inputs(*factors, *refs)), scale)


def _blocks_of_views(backend, device, *, dtype) -> None:
    """Rows that begin anywhere and are further apart than they are long; nothing else is read."""
    for r in (3, 16):
        compare_blocks(backend, _views_of(device, r, dtype))


def _many_blocks(backend, device, *, dtype) -> None:
    shapes = [(2048, 1500, 16), (700, 9000, 16), (5000, 2048, 8)]
    compare_blocks(backend, _on(device, planted(30, shapes, dtype)))


def _blocks_of_one_client(backend, device) -> None:
    compare_blocks(backend, _on(device, planted(1, [(1, 1, 1), (1, 5, 1), (6, 1, 1)])))
    compare_blocks(backend, _on(device, planted(1, [(64, 4096, 16)], torch.bfloat16)))


def non_finite_blocks(backend, device) -> None:
    """One bad value spoils its own products, and the average of its layer, and nothing else."""
    inputs = _on(device, planted(2, _ragged(4)))
    mix = torch.ones(2, 3, 2, 4, 4, device=device)
    gram_A, gram_B = backend.gram(*inputs)
    A, B = backend.combine(*inputs, *mix)
    bad = inputs.map(torch.clone)
    bad.lora_B[1 * 3 + 1][300, 2] = torch.nan  # client 1, layer 1
    bad_A, bad_B = backend.gram(*bad)
    assert torch.equal(bad_A, gram_A)
    spoiled = torch.zeros_like(gram_B, dtype=torch.bool)
    spoiled[1, 4 + 2, :] = spoiled[1, :, 4 + 2] = True
    assert torch.equal(bad_B.isnan(), spoiled)
    assert torch.equal(bad_B[~spoiled], gram_B[~spoiled])
    bad_A, bad_B = backend.combine(*bad, *mix)
    assert all(torch.equal(a, w) for a, w in zip([*bad_A, bad_B[0]], [*A, B[0]], strict=True))
    assert [bool(b) for b in bad_B[1].isnan().all(1)] == [i == 300 for i in range(len(B[1]))]
