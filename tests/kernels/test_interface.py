"""How the operators meet torch and their callers: registration, views, threads, bad input."""

from __future__ import annotations

import pytest
import torch
from problems import assert_close, assert_equal, planted
from torch.library import opcheck

import fedrot_kernels
from fedrot_kernels import Plan
from fedrot_kernels.backends import reference

op = torch.ops.fedrot
SHAPES = [(9, 14, 4), (31, 8, 2)]


def arguments(**changes):
    inputs = planted(2, SHAPES, ranks=[4, 3])
    given = dict(zip(("lora_A", "lora_B", "ref_A", "ref_B"), inputs, strict=True))
    given.update(weights=torch.tensor([1.0, 2.0]), lam=0.4, align="joint", proper=True)
    given.update(changes)
    return given


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    inputs = planted(2, SHAPES).map(lambda t: t.requires_grad_(requires_grad))
    opcheck(op.align_aggregate.default, (*inputs, torch.tensor([1.0, 2.0])), {"lam": 0.7})
    opcheck(op.align_aggregate.default, tuple(inputs), {"align": "A"})
    opcheck(op.align.default, tuple(inputs), {"proper": False})
    M = torch.randn(3, 2, 5, requires_grad=requires_grad)
    opcheck(op.polar.default, (M,), {"proper": True})


def test_outputs_carry_no_gradient():
    inputs = planted(2, SHAPES).map(lambda t: t.requires_grad_(True))
    A, B = op.align_aggregate(*inputs)
    assert not any(t.requires_grad for t in [*A, *B, *op.align(*inputs)])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    inputs = planted(3, SHAPES)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    def step(lora_A, lora_B, ref_A, ref_B):
        A, B = op.align_aggregate(lora_A, lora_B, ref_A, ref_B, lam=0.6)
        R = op.align(lora_A, lora_B, ref_A, ref_B)
        return [2 * a for a in A], B, op.polar(R[0])

    A, B, _ = step(*inputs)
    expected_A, expected_B = op.align_aggregate(*inputs, lam=0.6)
    assert_close(A, [2 * a for a in expected_A], 1e-6)
    assert_close(B, expected_B, 1e-6)


def test_the_functions_are_the_operators():
    """Options and defaults pass through; the first client's reflection makes `proper` matter."""
    lora_A, lora_B, *_ = inputs = planted(2, SHAPES)
    lora_A[0][0].neg_()
    lora_B[0][:, 0].neg_()
    weights = torch.tensor([1.0, 3.0])
    for given in ({}, {"lam": 1.0, "align": "B", "proper": False}):
        whole = fedrot_kernels.align_aggregate(*inputs, weights, **given)
        assert_equal(whole, op.align_aggregate(*inputs, weights, **given))
        rotations = fedrot_kernels.align(*inputs, **given)
        assert all(map(torch.equal, rotations, op.align(*inputs, **given)))
    flip = torch.tensor([[3.0, 0], [0, -1]])
    assert torch.equal(fedrot_kernels.polar(flip), op.polar(flip))
    assert torch.equal(fedrot_kernels.polar(flip, proper=True), op.polar(flip, proper=True))
    blocks = fedrot_kernels.gram(*inputs)
    assert all(map(torch.equal, blocks, op.gram(*inputs)))
    mixes = torch.randn(2, 2, 2, 4, 4).unbind(0)
    assert_equal(fedrot_kernels.combine(*inputs, *mixes), op.combine(*inputs, *mixes))


def test_schemas_are_the_contract():
    assert str(op.align_aggregate.default._schema) == (
        "fedrot::align_aggregate(Tensor[] lora_A, Tensor[] lora_B, Tensor[] ref_A, Tensor[] ref_B,"
        ' Tensor? weights=None, *, float lam=0.40000000000000002, str align="joint",'
        " bool proper=True) -> (Tensor[] A, Tensor[] B)"
    )
    assert str(op.polar.default._schema) == (
        "fedrot::polar(Tensor M, *, bool proper=False) -> Tensor"
    )
    assert str(op.align.default._schema).endswith("bool proper=True) -> Tensor[]")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views_in_a_sentinel_filled_buffer(dtype):
    """Strided views are read where they lie; nothing around or inside them is written."""
    plain = planted(2, SHAPES, dtype)

    def bury(t):
        buffer = torch.full((t.shape[0] + 2, t.shape[1] + 5), float("nan"), dtype=dtype)
        buffer[1:-1, 2:-3] = t
        return buffer

    buffers = plain.map(bury)
    before = buffers.map(torch.clone)
    A, B = op.align_aggregate(*buffers.map(lambda b: b[1:-1, 2:-3]))
    expected_A, expected_B = op.align_aggregate(*plain)
    assert_close(A, expected_A, 0.0)
    assert_close(B, expected_B, 0.0)
    for now, then in zip(buffers, before, strict=True):
        for a, b in zip(now, then, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    inputs = {t.untyped_storage().data_ptr() for tensors in buffers for t in tensors}
    assert not inputs & {t.untyped_storage().data_ptr() for t in [*A, *B]}


def test_every_layout_gives_the_same_bits():
    inputs = planted(2, SHAPES)
    expected = op.align_aggregate(*inputs)
    layouts = {
        "transposed": inputs.map(lambda t: t.T.contiguous().T),
        "every second column": inputs.map(lambda t: t.repeat_interleave(2, dim=1)[:, ::2]),
        "negative view": inputs.map(lambda t: torch._neg_view(-t)),
        "one flat buffer": inputs.map(lambda t: torch.cat([t.reshape(-1)])[:].view(t.shape)),
    }
    stacked = planted(2, SHAPES)
    stacked.lora_A[0::2] = torch.stack(stacked.lora_A[0::2]).unbind(0)
    layouts["unbind"] = stacked
    for name, layout in layouts.items():
        for actual, wanted in zip(op.align_aggregate(*layout), expected, strict=True):
            assert all(torch.equal(a, w) for a, w in zip(actual, wanted, strict=True)), name


def test_a_sparse_tensor_is_named():
    inputs = planted(2, SHAPES)
    inputs.lora_B[2] = inputs.lora_B[2].to_sparse()
    message = "lora_B must be dense for client 1, layer 0, got torch.sparse_coo"
    for call in (op.align_aggregate, op.align, op.gram):
        with pytest.raises(TypeError, match=message):
            call(*inputs)


@pytest.mark.parametrize(
    ("clients", "shapes", "dtype"),
    [
        (7, [(700, 1100, 4), (300, 257, 16), (64, 2048, 33)], torch.bfloat16),
        (1, [(600, 900, 16)], torch.float32),
        (20, [(40, 60, 4), (600, 900, 16)], torch.float32),  # more than a block holds, uneven
        (37, [(64, 100, 8)], torch.float32),
    ],
)
@pytest.mark.parametrize("options", [{}, {"align": "A"}, {"align": "B"}, {"lam": 0.0}], ids=str)
def test_bit_identical_for_any_number_of_threads(clients, shapes, dtype, options):
    inputs = planted(clients, shapes, dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8, 1):
            torch.set_num_threads(threads)
            A, B = op.align_aggregate(*inputs, torch.arange(1.0, clients + 1), **options)
            turns = op.polar(torch.eye(5).repeat(40, 1, 1))
            results.append([*A, *B, *op.align(*inputs, **options), turns])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_largest_weights():
    inputs = planted(2, SHAPES)
    expected, _ = op.align_aggregate(*inputs)
    actual, _ = op.align_aggregate(*inputs, torch.tensor([1e308, 1e308], dtype=torch.float64))
    assert_close(actual, expected, 0.0)


def test_calls_from_several_threads():
    from concurrent.futures import ThreadPoolExecutor

    problems = [planted(3, [(200, 300, 4)], seed=s) for s in range(8)]
    expected = [op.align_aggregate(*p) for p in problems]
    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(lambda p: op.align_aggregate(*p), problems * 3))
    for a, e in zip(actual, expected * 3, strict=True):
        assert torch.equal(a[0][0], e[0][0]) and torch.equal(a[1][0], e[1][0])


def test_empty_batch():
    assert op.polar(torch.empty(0, 3, 4)).shape == (0, 3, 4)


BAD = {
    "lam": (ValueError, r"lam must lie in \[0, 1\], got 1.5", {"lam": 1.5}),
    "lam nan": (ValueError, "lam must lie", {"lam": float("nan")}),
    "align": (ValueError, "align must be one of joint, A, B, got 'both'", {"align": "both"}),
    "no layers": (ValueError, "lora_A must hold clients x layers", {"ref_A": [], "ref_B": []}),
    "count": (ValueError, "got 3 tensors for 2 layers", {"lora_A": 3, "lora_B": 3}),
    "A and B": (ValueError, "as many tensors as lora_A: 3 != 4", {"lora_B": 3}),
    "ref_B": (ValueError, "as many layers as ref_A: 1 != 2", {"ref_B": 1}),
    "weights": (ValueError, r"weights must be \(2,\).*got \(3,\)", {"weights": torch.ones(3)}),
    "negative": (
        ValueError,
        r"weights\[1\] must be finite and non-negative, got -1.0",
        {"weights": torch.tensor([1.0, -1.0])},
    ),
    "nan weight": (ValueError, r"weights\[0\].*nan", {"weights": torch.tensor([torch.nan, 1.0])}),
    "zero weights": (ValueError, "positive sum", {"weights": torch.zeros(2)}),
    "complex weights": (TypeError, "real", {"weights": torch.ones(2, dtype=torch.complex64)}),
    "boolean weights": (TypeError, "real", {"weights": torch.tensor([True, False])}),
    "weights elsewhere": (ValueError, "weights must be on cpu", {"weights": "meta"}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    error, message, changes = BAD[case]
    given = arguments()
    for name, value in changes.items():
        given[name] = given[name][:value] if type(value) is int else value
    if given["weights"] == "meta":
        given["weights"] = torch.ones(2, device="meta")
    with pytest.raises(error, match=message):
        op.align_aggregate(**given)


BAD_TENSOR = {
    "k": (ValueError, r"lora_A must be \(r <= 2, 8\) for client 1, layer 1", "lora_A", (2, 9)),
    "r too large": (ValueError, "rank 5 for client 1, layer 1, more than.* 2", "lora_A", (5, 8)),
    "d": (ValueError, r"lora_B must be \(31, 2\) for client 1, layer 1", "lora_B", (30, 2)),
    "dim": (ValueError, "lora_A must be .* client 1, layer 1", "lora_A", (16,)),
    "empty": (ValueError, "lora_A must be .* client 1, layer 1", "lora_A", (0, 8)),
    "ref rank": (ValueError, r"ref_B\[1\] must be \(d, 2\)", "ref_B", (31, 3)),
    "ref dim": (ValueError, "ref_A must be a non-empty matrix.*layer 1", "ref_A", (8,)),
}


@pytest.mark.parametrize("case", BAD_TENSOR)
@pytest.mark.parametrize("fake", [False, True])
def test_bad_shapes_name_client_and_layer(case, fake):
    error, message, name, shape = BAD_TENSOR[case]
    given = arguments()
    given[name][-1] = torch.ones(shape)
    if fake:
        mode = torch._subclasses.FakeTensorMode()
        given = {
            k: [mode.from_tensor(t) for t in v] if isinstance(v, list) else v
            for k, v in given.items()
        }
        given["weights"] = None
    with pytest.raises(error, match=message):
        op.align_aggregate(**given)


def test_bad_dtypes():
    given = arguments()
    given["lora_B"][2] = given["lora_B"][2].double()
    with pytest.raises(TypeError, match=r"lora_B must be torch.float32.*client 1, layer 0"):
        op.align_aggregate(**given)
    inputs = planted(2, SHAPES).map(lambda t: t.int())
    with pytest.raises(TypeError, match="float64, float32, bfloat16, float16"):
        op.align_aggregate(*inputs)
    with pytest.raises(TypeError, match="M must be"):
        op.polar(torch.eye(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="1 <= m <= n"):
        op.polar(torch.ones(3, 2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
@pytest.mark.parametrize("align", ["joint", "A", "B"])
def test_non_finite_values_name_client_and_layer(name, align, value):
    given = arguments(align=align, weights=None)
    given[name][3][0, 0] = value
    message = f"{name} holds a non-finite value for client 1, layer 1"
    inputs = [given[key] for key in ("lora_A", "lora_B", "ref_A", "ref_B")]
    for lam in (0.0, 0.4):  # at 0 and in the other factor, values that no rotation needs
        for backend in (op, reference):
            with pytest.raises(ValueError, match=message):
                backend.align_aggregate(*inputs, lam=lam, align=align)
            with pytest.raises(ValueError, match=message):
                backend.align(*inputs, lam=lam, align=align)


def test_non_finite_reference_and_matrix():
    given = arguments(lam=0.0, align="A")
    given["ref_B"][1][0, 0] = float("nan")
    with pytest.raises(ValueError, match="ref_B holds a non-finite value for layer 1"):
        op.align_aggregate(**given)
    M = torch.eye(3).repeat(5, 1, 1)
    M[3, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="matrix 3"):
        op.polar(M)


def test_overflow_of_the_output_dtype():
    """The sum fits into float32, the float16 of the reference does not hold it."""
    big, ref = torch.full((1, 4), 1e5), torch.ones(1, 4, dtype=torch.float16)
    with pytest.raises(ValueError, match="overflows"):
        op.align_aggregate([big], [big.T], [ref], [ref.T])
    with pytest.raises(ValueError, match="overflows"):
        reference.align_aggregate([big], [big.T], [ref], [ref.T])


def test_overflow_is_told_apart():
    big = torch.full((1, 4), 1e38)
    with pytest.raises(ValueError, match="overflows"):
        op.align_aggregate([big], [big.T], [big], [big.T])


def test_overflow_names_the_layer():
    small, big = torch.ones(1, 4), torch.full((1, 4), 1e38)
    lora_A, lora_B = [small, small, big] * 2, [small.T, small.T, big.T] * 2
    factors = (lora_A, lora_B, lora_A[:3], lora_B[:3])
    for call in (op.align_aggregate, op.align, op.gram, lambda *given: Plan(*given)()):
        with pytest.raises(
            ValueError, match=r"overflows its dtype.*\(layer 2; the largest .* is 0\)"
        ):
            call(*factors)
    half = [t.half() for t in lora_A[:2]], [t.half() for t in lora_B[:2]]
    lora_A[3] = torch.full((1, 4), 1e6)  # client 1, layer 0: float16 does not hold it
    lora_A, lora_B = [lora_A[i] for i in (0, 1, 3, 4)], [lora_B[i] for i in (0, 1, 3, 4)]
    for implementation in (op, reference):
        with pytest.raises(ValueError, match=r"\(layer 0; the largest client there is 1\)"):
            implementation.align_aggregate(lora_A, lora_B, *half)
