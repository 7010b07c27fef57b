"""``Plan``: current values into the same outputs, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from problems import assert_equal, planted

from fedrot_kernels import Plan
from fedrot_kernels.backends import reference
from fedrot_kernels.plan import run_once

op = torch.ops.fedrot
SHAPES = [(9, 14, 4), (31, 8, 2)]


def fill(inputs, values):
    for tensors, new in zip(inputs, values, strict=True):
        for t, v in zip(tensors, new, strict=True):
            t.copy_(v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"lam": 1.0, "align": "A", "proper": False}], ids=str)
def test_reads_current_values_into_the_same_outputs(planner, dtype, options):
    inputs = planted(3, SHAPES, dtype, ranks=[4, 1, 3])
    weights = torch.tensor([1.0, 2.0, 3.0])
    plan = Plan(*inputs, weights, **options)
    A, B = plan()
    assert_equal((A, B), op.align_aggregate(*inputs, weights, **options))
    pointers = [t.data_ptr() for t in [*A, *B]]

    fill(inputs, planted(3, SHAPES, dtype, ranks=[4, 1, 3], seed=1))
    weights.copy_(torch.tensor([0.0, 5.0, 1.0]))
    again_A, again_B = plan()
    assert [t.data_ptr() for t in [*again_A, *again_B]] == pointers
    assert_equal((again_A, again_B), op.align_aggregate(*inputs, weights, **options))


def test_writes_into_given_outputs_and_nowhere_else(planner):
    inputs = planted(2, SHAPES)
    flat = torch.full((3, 100), -7.0)

    def window(rows, columns, layer):
        return flat[layer].as_strided((rows, columns), (columns + 1, 1), 100 * layer + 2)

    A = [window(r, k, layer) for layer, (_, k, r) in enumerate(SHAPES)]
    B = [torch.nn.Parameter(torch.empty(d, r)) for d, _, r in SHAPES]
    expected = op.align_aggregate(*inputs)
    got_A, got_B = Plan(*inputs, out=(A, B))()
    assert all(g is t for g, t in zip([*got_A, *got_B], [*A, *B], strict=True))
    assert_equal((A, B), expected)
    written = sum(t.numel() for t in A)
    assert int((flat == -7.0).sum()) == flat.numel() - written


def test_parameters_and_gradients(planner):
    inputs = planted(2, SHAPES).map(torch.nn.Parameter)
    A, B = Plan(*inputs)()
    assert not any(t.requires_grad for t in [*A, *B])
    assert_equal((A, B), op.align_aggregate(*inputs))


def test_autograd_notices_overwritten_outputs(planner):
    plan = Plan(*planted(2, SHAPES))
    A, _ = plan()
    x = torch.ones(2, 4, requires_grad=True)
    loss = (x @ A[0]).sum()
    plan()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_memory_outlives_the_tensors(planner):
    """Giving a tensor other memory does not pull the old one away from under the plan."""
    inputs = planted(2, [(64, 64, 4)])
    expected = op.align_aggregate(*inputs)
    plan = Plan(*inputs)
    for tensors in inputs:
        for t in tensors:
            t.data = torch.full_like(t, 3.0)
    assert_equal(plan(), expected)
    del inputs, tensors, t
    assert_equal(plan(), expected)


def test_errors_of_a_call(planner):
    inputs = planted(2, SHAPES)
    weights = torch.ones(2)
    plan = Plan(*inputs, weights)
    good = [[t.clone() for t in side] for side in plan()]
    inputs.lora_B[3][0, 0] = float("nan")
    with pytest.raises(ValueError, match="lora_B holds a non-finite value for client 1, layer 1"):
        plan()
    inputs.lora_B[3][0, 0] = 0.0
    weights[1] = -1.0
    with pytest.raises(ValueError, match=r"weights\[1\] must be finite and non-negative"):
        plan()
    fill(inputs, planted(2, SHAPES))
    weights.fill_(1.0)
    assert_equal(plan(), good)


def test_check_is_that_of_the_operator():
    inputs = planted(2, SHAPES)
    with pytest.raises(ValueError, match="lam must lie"):
        Plan(*inputs, lam=2.0)
    with pytest.raises(ValueError, match=r"weights must be \(2,\)"):
        Plan(*inputs, torch.ones(3))
    with pytest.raises(ValueError, match="lora_A must hold clients x layers"):
        Plan(inputs.lora_A[:3], inputs.lora_B[:3], inputs.ref_A, inputs.ref_B)


def test_what_no_schema_has_checked():
    lora_A, *rest = inputs = planted(2, SHAPES)
    for message, make in {
        "lam must be a number, got 'auto'": lambda: Plan(*inputs, lam="auto"),
        r"weights must be a tensor \(2,\), got list": lambda: Plan(*inputs, [1.0, 2.0]),
        r"lora_A\[1\] must be a tensor, got NoneType": lambda: Plan(
            [lora_A[0], None, *lora_A[2:]], *rest
        ),
        r"out B\[0\] must be a tensor, got str": lambda: Plan(*inputs, out=(outputs()[0], "AB")),
    }.items():
        with pytest.raises(TypeError, match=message):
            make()
    with pytest.raises(ValueError, match=r"out must be \(A, B\), two lists of tensors, got 4"):
        Plan(*inputs, out=[t for side in outputs() for t in side])


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_plan_is_not_copied(copied):
    with pytest.raises(TypeError, match="a Plan belongs to the memory of its tensors"):
        copied(Plan(*planted(2, SHAPES)))


class Subclass(torch.Tensor):
    pass


NOT_PLAIN = {
    "contiguous rows for client 1, layer 1, got strides": lambda t: t.T.contiguous().T,
    "plain dense tensor for client 1, layer 1, got Subclass": lambda t: t.as_subclass(Subclass),
    "client 1, layer 1, got Tensor, torch.strided, a negative view": torch._neg_view,
    "client 1, layer 1, got Tensor, torch.sparse_coo": torch.Tensor.to_sparse,
}


@pytest.mark.parametrize("message", NOT_PLAIN)
def test_a_tensor_that_cannot_be_planned(message):
    inputs = planted(2, SHAPES)
    inputs.lora_A[3] = NOT_PLAIN[message](inputs.lora_A[3])
    with pytest.raises(ValueError, match=f"lora_A .*{message}"):
        Plan(*inputs)


def outputs():
    return [torch.empty(r, k) for _, k, r in SHAPES], [torch.empty(d, r) for d, _, r in SHAPES]


BAD_OUT = {
    "count": (ValueError, "out A must hold 2 layers, got 1", 0, lambda t: None),
    "shape": (ValueError, r"out A must be \(2, 8\) for layer 1, got \(3, 8\)", 0, (3, 8)),
    "dtype": (TypeError, "out B must be torch.float32, got torch.float64 for layer 1", 1, "double"),
    "device": (ValueError, "out A must be on cpu, got meta for layer 1", 0, "meta"),
    "rows": (ValueError, "out B must have contiguous rows for layer 1", 1, "columns"),
    "itself": (ValueError, "out must not overlap itself", 1, "expanded"),
}


@pytest.mark.parametrize("case", BAD_OUT)
def test_bad_outputs(case):
    error, message, side, change = BAD_OUT[case]
    out = outputs()
    t = out[side].pop()
    if change == "double":
        out[side].append(t.double())
    elif change == "meta":
        out[side].append(t.to("meta"))
    elif change == "columns":
        out[side].append(t.T.contiguous().T)
    elif change == "expanded":
        out[side].append(t[:1].expand(t.shape))
    elif isinstance(change, tuple):
        out[side].append(torch.empty(change))
    with pytest.raises(error, match=message):
        Plan(*planted(2, SHAPES), out=out)


def test_outputs_overlap_nothing():
    inputs = planted(2, SHAPES)
    weights = torch.ones(40)[:2]
    buffer = torch.empty(2 * 8 + 31 * 2)
    whole = buffer[: 2 * 8].view(2, 8)
    A, B = outputs()
    for bad in (
        ([A[0], inputs.ref_A[1]], B),
        ([A[0], inputs.lora_A[1]], B),
        ([A[0], whole], [B[0], buffer[15:][: 31 * 2].view(31, 2)]),
        ([A[0], weights.as_strided((2, 8), (8, 1))], B),
    ):
        with pytest.raises(ValueError, match="overlap neither an input nor another output"):
            Plan(*inputs, weights, out=bad)
    beside = ([A[0], whole], [B[0], buffer[16:].view(31, 2)])
    assert_equal(Plan(*inputs, weights, out=beside)(), op.align_aggregate(*inputs))


def test_inputs_may_share_memory(planner):
    """All clients the same tensor: the plan of a federation of one."""
    inputs = planted(1, SHAPES)
    plan = Plan(inputs.lora_A * 3, inputs.lora_B * 3, inputs.ref_A, inputs.ref_B)
    expected = reference.align_aggregate(*inputs)
    for side, wanted in zip(plan(), expected, strict=True):
        for a, w in zip(side, wanted, strict=True):
            torch.testing.assert_close(a, w, rtol=2e-5, atol=2e-5)


LAYOUTS = {
    "plain": lambda t: t,
    "parameter": torch.nn.Parameter,
    "columns": lambda t: t.T.contiguous().T,
    "strided rows": lambda t: torch.nn.functional.pad(t, (0, 3))[:, : t.shape[1]],
    "subclass": lambda t: t.as_subclass(Subclass),
    "negative view": lambda t: torch._neg_view(-t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_run_once_into_outputs_that_stay(planner, layout, dtype):
    for ranks in ([4, 1], [2, 2]):
        inputs = planted(2, SHAPES, dtype, ranks=ranks, seed=ranks[0])
        expected = op.align_aggregate(*inputs, lam=0.7, align="B")
        A, B = outputs()
        A, B = [t.to(dtype) for t in A], [t.to(dtype) for t in B]
        lora = [[LAYOUTS[layout](t) for t in side] for side in (inputs.lora_A, inputs.lora_B)]
        run_once((*lora, inputs.ref_A, inputs.ref_B), A, B, 0.7, "B", True)
        assert_equal((A, B), expected)


def test_run_once_raises_what_the_operator_does(planner):
    inputs = planted(2, SHAPES)
    inputs.lora_B[3][0, 0] = torch.nan
    with pytest.raises(ValueError, match="lora_B holds a non-finite value for client 1, layer 1"):
        run_once(tuple(inputs), *outputs(), 0.4, "joint", True)
    inputs.lora_B[3] = torch.ones(1, 1)
    with pytest.raises(ValueError, match=r"lora_B must be .* for client 1, layer 1"):
        run_once(tuple(inputs), *outputs(), 0.4, "joint", True)


def test_plans_in_several_threads():
    from concurrent.futures import ThreadPoolExecutor

    problems = [planted(3, [(200, 300, 4)], seed=s) for s in range(8)]
    plans = [Plan(*p) for p in problems]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda plan: plan(), plans))
    for result, p in zip(results, problems, strict=True):
        assert_equal(result, op.align_aggregate(*p))


def test_inference_mode():
    with torch.inference_mode():
        inputs = planted(2, SHAPES)
        plan = Plan(*inputs)
        assert_equal(plan(), op.align_aggregate(*inputs))
    assert_equal(plan(), op.align_aggregate(*inputs))


def test_the_example_of_the_reference():
    text = (Path(__file__).parents[2] / "docs" / "op-reference.md").read_text()
    example = text.split("```python\n")[1].split("```")[0]
    scope: dict = {}
    exec(example, scope)
    assert scope["A"] is scope["plan"].A and torch.equal(scope["ref_B"][0], scope["B"][0])
