"""``fedrot::gram`` and ``fedrot::combine`` against the float64 reference."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from problems import GRAM_TOLERANCE, OUTPUT_TOLERANCE, assert_close, planted
from torch.library import opcheck

from fedrot_kernels.backends import matmul, reference

op = torch.ops.fedrot
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def ragged(r: int) -> list[tuple[int, int, int]]:
    """Layers of different shape and rank, none a multiple of a vector or a panel; one of them is
    longer than a panel."""
    return [(2 * r + 7, 1100 + r, r), (1033 + r, 3 * r + 1, r), (r + 5, r + 3, max(1, r // 2))]


def mixes(inputs, dtype, seed=0):
    r = max(A.shape[0] for A in inputs.ref_A)
    g = torch.Generator().manual_seed(seed)
    shape = (inputs.layers, inputs.clients, r, r)
    return [torch.randn(shape, dtype=torch.float64, generator=g).to(dtype) for _ in range(2)]


def compute(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("backend", ["cpu", "matmul"])
@pytest.mark.parametrize("r", [1, 2, 3, 4, 8, 16, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_reference(dtype, r, backend):
    implementation = {"cpu": op, "matmul": matmul}[backend]
    for ranks in (None, [r, 1, max(1, r - 1)]):
        inputs = planted(3, ragged(r), dtype, ranks=ranks, seed=r)
        for actual, expected in zip(
            implementation.gram(*inputs), reference.gram(*inputs), strict=True
        ):
            assert_close([actual], [expected], GRAM_TOLERANCE[compute(dtype)])
            assert torch.equal(actual, actual.mT)
        mix = mixes(inputs, compute(dtype), seed=r)
        for actual, expected in zip(
            implementation.combine(*inputs, *mix), reference.combine(*inputs, *mix), strict=True
        ):
            assert_close(actual, expected, OUTPUT_TOLERANCE[dtype])


def test_gram_by_hand():
    """Two clients of rank 1 in a layer of rank 2: A = (1, 2), (3, 0), reference rows (0, 1) and
    (1, 1); B the columns (1, 0), (2, 2), reference (1, 1) and (0, 1)."""
    A = [torch.tensor([[1.0, 2]]), torch.tensor([[3.0, 0]])]
    B = [torch.tensor([[1.0], [0]]), torch.tensor([[2.0], [2]])]
    ref_A, ref_B = torch.tensor([[0.0, 1], [1, 1]]), torch.tensor([[1.0, 0], [1, 1]])
    gram_A, gram_B = op.gram(A, B, [ref_A], [ref_B])
    # Rows: client 0 and its padding, client 1 and its padding, the reference.
    expected = [
        [5, 0, 3, 0, 2, 3],
        [0, 0, 0, 0, 0, 0],
        [3, 0, 9, 0, 0, 3],
        [0, 0, 0, 0, 0, 0],
        [2, 0, 0, 0, 1, 1],
        [3, 0, 3, 0, 1, 2],
    ]
    assert gram_A[0].tolist() == expected
    assert gram_B[0, 0].tolist() == [1, 0, 2, 0, 1, 0]
    assert gram_B[0, 2].tolist() == [2, 0, 8, 0, 4, 2]
    assert gram_B[0, 4:, 4:].tolist() == [[2, 1], [1, 1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine_with_weighted_rotations_is_align_aggregate(dtype):
    """Bit for bit: one average, whoever found the rotations."""
    inputs = planted(5, [(40, 530, 4), (700, 33, 4)], dtype)
    weights = torch.tensor([1.0, 2.0, 0.0, 3.0, 0.5], dtype=torch.float64)
    options = {"lam": 0.7, "align": "joint"}
    R = torch.stack(op.align(*inputs, **options)).view(5, 2, 4, 4).transpose(0, 1)
    W = R * (weights / weights.sum()).to(R.dtype)[:, None, None]
    A, B = op.combine(*inputs, W, W)  # W is not contiguous
    expected_A, expected_B = op.align_aggregate(*inputs, weights, **options)
    assert_close(A, expected_A, 0.0)
    assert_close(B, expected_B, 0.0)


def test_bit_identical_for_any_number_of_threads():
    """One layer, several, and more than threads: factors are shared between threads or not."""
    before = torch.get_num_threads()
    for shapes in ([(700, 1100, 4)], [(300, 257, 16), (64, 2048, 33)], 20 * [(65, 130, 3)]):
        inputs = planted(7, shapes, torch.bfloat16)
        mix = mixes(inputs, torch.float32)
        results = []
        try:
            for threads in (1, 2, 3, 8, 1):
                torch.set_num_threads(threads)
                A, B = op.combine(*inputs, *mix)
                results.append([*A, *B, *op.gram(*inputs)])
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("isa", ["sse2", "avx2"])
def test_other_instruction_sets(isa):
    script = (
        "import torch\n"
        "from problems import planted\n"
        "from fedrot_kernels.backends import cpu, reference\n"
        f"assert cpu.instruction_set in ('portable', '{isa}')\n"
        "for dtype in (torch.float64, torch.float32, torch.float16):\n"
        "    inputs = planted(5, [(90, 270, 5), (33, 19, 2)], dtype, ranks=[5, 1, 2, 4, 3])\n"
        "    for a, e in zip(cpu.gram(*inputs), reference.gram(*inputs)):\n"
        "        assert float((a - e).abs().max()) < 1e-5 * float(e.abs().max())\n"
    )
    import os
    from pathlib import Path

    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "FEDROT_CPU": isa, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", [None, [4, 1, 2]], ids=str)
def test_views_in_a_sentinel_filled_buffer(dtype, ranks):
    plain = planted(3, [(9, 514, 4), (531, 8, 4), (35, 33, 5)], dtype, ranks=ranks)

    def bury(t):
        buffer = torch.full((t.shape[0] + 2, t.shape[1] + 5), float("nan"), dtype=t.dtype)
        buffer[1:-1, 2:-3] = t
        return buffer[1:-1, 2:-3]

    mix = mixes(plain, compute(dtype))
    buried = plain.map(bury)
    for a, e in zip(op.gram(*buried), op.gram(*plain), strict=True):
        assert torch.equal(a, e)
    for a, e in zip(op.combine(*buried, *mix), op.combine(*plain, *mix), strict=True):
        assert_close(a, e, 0.0)


def test_opcheck_and_compile():
    inputs = planted(2, [(9, 14, 4), (31, 8, 2)], ranks=[4, 3])
    mix = mixes(inputs, torch.float32)
    opcheck(op.gram.default, tuple(inputs))
    opcheck(op.combine.default, (*inputs, *mix))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(lora_A, lora_B, ref_A, ref_B):
        gram_A, _ = op.gram(lora_A, lora_B, ref_A, ref_B)
        return 2 * gram_A, op.combine(lora_A, lora_B, ref_A, ref_B, *mix)[0]

    gram_A, A = step(*inputs)
    assert torch.equal(gram_A, 2 * op.gram(*inputs)[0])
    assert_close(A, op.combine(*inputs, *mix)[0], 0.0)


def test_bad_arguments():
    inputs = planted(2, [(9, 14, 4), (31, 8, 2)])
    good = mixes(inputs, torch.float32)
    for implementation in (op, reference, matmul):
        with pytest.raises(ValueError, match=r"mix_B must be \(2, 2, 4, 4\), got \(2, 2, 4, 3\)"):
            implementation.combine(*inputs, good[0], good[1][..., :3])
        with pytest.raises(TypeError, match=r"mix_A must be torch.float32, got torch.float64"):
            implementation.combine(*inputs, good[0].double(), good[1])
        with pytest.raises(ValueError, match="as many layers as ref_A: 1 != 2"):
            implementation.gram(inputs.lora_A, inputs.lora_B, inputs.ref_A, inputs.ref_B[:1])


@pytest.mark.parametrize("name", ["lora_A", "lora_B", "ref_A", "ref_B"])
def test_non_finite_values_are_named(name):
    inputs = planted(2, [(9, 14, 4), (31, 8, 2)])
    mix = mixes(inputs, torch.float32)
    getattr(inputs, name)[-1][0, 0] = float("inf")
    where = "client 1, layer 1" if name.startswith("lora") else "layer 1"
    for implementation in (op, reference):
        with pytest.raises(ValueError, match=f"{name} holds a non-finite value for {where}"):
            implementation.gram(*inputs)
        if name.startswith("lora"):
            with pytest.raises(ValueError, match=f"{name} holds a non-finite value for {where}"):
                implementation.combine(*inputs, *mix)
        else:  # only its shape is used
            implementation.combine(*inputs, *mix)
    mix[0][0, 0, 0, 0] = float("nan")
    for implementation in (op, reference):
        with pytest.raises(ValueError, match=r"mix_A or mix_B holds a non-finite|lora_. holds"):
            implementation.combine(*inputs, *mix)


def test_overflow_is_told_apart():
    big = torch.full((1, 4), 1e38)
    for implementation in (op, reference):
        with pytest.raises(ValueError, match="overflows"):
            implementation.gram([big], [big.T], [big], [big.T])
