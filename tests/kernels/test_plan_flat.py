"""``Plan.flat``: clients that send one flat buffer, and ``rebind`` to those of the next round."""

from __future__ import annotations

import weakref

import pytest
import torch
from problems import assert_equal, planted

from fedrot_kernels import Plan

op = torch.ops.fedrot
SHAPES = [(9, 14, 4), (31, 8, 2)]


def flat_problem(seed, offsets=None):
    inputs = planted(3, SHAPES, seed=seed)
    buffers = []
    for i in range(3):
        factors = list(
            zip(inputs.lora_A[2 * i : 2 * i + 2], inputs.lora_B[2 * i : 2 * i + 2], strict=True)
        )
        if offsets is None:
            buffer = torch.cat([t.flatten() for pair in factors for t in pair])
        else:
            buffer = torch.full((400,), torch.nan)
            for pair, at in zip(factors, offsets, strict=True):
                for t, begin in zip(pair, at, strict=True):
                    buffer[begin : begin + t.numel()] = t.flatten()
        buffers.append(buffer)
    return inputs, buffers


@pytest.mark.parametrize("offsets", [None, [(200, 3), (60, 300)]], ids=["packed", "offsets"])
def test_flat_buffers_are_exchanged(planner, offsets):
    inputs, buffers = flat_problem(0, offsets)
    weights = torch.tensor([1.0, 2.0, 3.0])
    plan = Plan.flat(buffers, inputs.ref_A, inputs.ref_B, weights, offsets=offsets, lam=0.7)
    assert_equal(plan(), op.align_aggregate(*inputs, weights, lam=0.7))
    pointers = [t.data_ptr() for t in [*plan.A, *plan.B]]
    for seed in (1, 2):
        others, buffers = flat_problem(seed, offsets)
        plan.rebind([torch.nn.functional.pad(b, (seed, 9))[seed:] for b in buffers])
        del buffers
        wanted = others.lora_A, others.lora_B, inputs.ref_A, inputs.ref_B
        assert_equal(plan(), op.align_aggregate(*wanted, weights, lam=0.7))
    assert [t.data_ptr() for t in [*plan.A, *plan.B]] == pointers
    bad = [b.clone() for b in flat_problem(3, offsets)[1]]
    bad[1][offsets[0][1] if offsets else 0] = torch.inf
    plan.rebind(bad)
    with pytest.raises(ValueError, match="non-finite value for client 1, layer 0"):
        plan()


def test_flat_buffers_of_before_are_let_go():
    inputs, buffers = flat_problem(0)
    gone = weakref.ref(buffers[0].untyped_storage())
    plan = Plan.flat(buffers, inputs.ref_A, inputs.ref_B)
    plan.rebind(flat_problem(1)[1])
    del buffers
    assert gone() is None


BAD_BUFFERS = {
    "buffers must be 3, got 2": lambda b: b[:2],
    r"buffers\[1\] must be torch.float32, got torch.float64": lambda b: [b[0], b[1].double(), b[2]],
    r"buffers\[2\] must be contiguous, 1-D and hold 170 elements": lambda b: [*b[:2], b[2][1:]],
    r"buffers\[0\] must be contiguous, 1-D": lambda b: [torch.ones(400)[::2], *b[1:]],
    r"buffers\[1\] must be a tensor, got ndarray": lambda b: [b[0], b[1].numpy(), b[2]],
    r"buffers\[0\] must be a tensor, got list": lambda b: [b[0].tolist(), *b[1:]],
    r"buffers\[1\] must be on cpu, got meta": lambda b: [b[0], b[1].to("meta"), b[2]],
}


@pytest.mark.parametrize("message", BAD_BUFFERS)
def test_bad_buffers(message):
    inputs, buffers = flat_problem(0)
    plan = Plan.flat(buffers, inputs.ref_A, inputs.ref_B)
    with pytest.raises((ValueError, TypeError), match=message):
        plan.rebind(BAD_BUFFERS[message](buffers))
    assert_equal(plan(), op.align_aggregate(*inputs))
    if "got 2" not in message:
        with pytest.raises((ValueError, TypeError)):
            Plan.flat(BAD_BUFFERS[message](buffers), inputs.ref_A, inputs.ref_B)


def test_a_refused_rebind_changes_nothing(monkeypatch):
    inputs, buffers = flat_problem(0)
    plan = Plan.flat(buffers, inputs.ref_A, inputs.ref_B)

    def refuse():
        raise ValueError("as Triton's may")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="as Triton's may"):
        patch.setattr(plan._runner, "rebind", refuse)
        plan.rebind(flat_problem(1)[1])
    assert_equal(plan(), op.align_aggregate(*inputs))
    with pytest.raises(ValueError, match="non-finite value for client 0, layer 0"):  # names views
        buffers[0].fill_(torch.nan)
        plan()


def test_buffers_overlap_no_output():
    inputs, buffers = flat_problem(0)
    memory = torch.zeros(1000)
    A = [memory[200:256].view(4, 14), memory[300:316].view(2, 8)]
    B = [memory[400:436].view(9, 4), memory[500:562].view(31, 2)]
    plan = Plan.flat(buffers, inputs.ref_A, inputs.ref_B, out=(A, B))
    for begin in (31, 200, 255, 399, 500, 561):
        with pytest.raises(ValueError, match=r"buffers\[2\] must not overlap an output"):
            plan.rebind([*buffers[:2], memory[begin : begin + 170]])
    memory[30:200] = buffers[2]
    plan.rebind([*buffers[:2], memory[30:200]])
    assert_equal(plan(), op.align_aggregate(*inputs))


def test_bad_flat_layouts():
    inputs, buffers = flat_problem(0)
    with pytest.raises(ValueError, match="offsets must hold 2 layers, got 1"):
        Plan.flat(buffers, inputs.ref_A, inputs.ref_B, offsets=[(0, 60)])
    with pytest.raises(ValueError, match=r"offsets must not be negative, got \(-1, 60\)"):
        Plan.flat(buffers, inputs.ref_A, inputs.ref_B, offsets=[(-1, 60), (100, 120)])
    with pytest.raises(ValueError, match="only a plan made by Plan"):
        Plan(*inputs).rebind(buffers)
    with pytest.raises(ValueError, match="ref_B must hold as many layers as ref_A: 1 != 2"):
        Plan.flat(buffers, inputs.ref_A, inputs.ref_B[:1])
