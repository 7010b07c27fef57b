"""The native reading of a call against ``check``, the one place where the rules are written."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import planted

from fedrot_kernels import tables
from fedrot_kernels.checks import check

op = torch.ops.fedrot
SHAPES = [(9, 14, 4), (31, 8, 2)]

native = pytest.mark.skipif(tables._native is None, reason="torch without the DLPack exchange API")


def strided(t, layout):
    """The values of ``t`` in another layout of the same shape."""
    if layout == "inside":
        buffer = torch.zeros(*[n + 3 for n in t.shape], dtype=t.dtype)
        inside = buffer[tuple(slice(1, n + 1) for n in t.shape)]
        return inside.copy_(t)
    if layout == "parameter" and t.dtype.is_floating_point:
        return torch.nn.Parameter(t)
    return t


# What is done to one tensor of a good call; some of it is harmless.
CHANGES = {
    "none": lambda t: t,
    "one row less": lambda t: t[1:],
    "one column less": lambda t: t[:, 1:],
    "one row more": lambda t: torch.cat([t, t[:1]]),
    "one column more": lambda t: torch.cat([t, t[:, :1]], dim=1),
    "empty": lambda t: t[:, :0],
    "no rows": lambda t: t[:0],
    "vector": lambda t: t[0],
    "three dimensions": lambda t: t[None],
    "double": lambda t: t.double(),
    "half": lambda t: t.half(),
    "integer": lambda t: t.int(),
    "complex": lambda t: t.to(torch.complex64),
    "boolean": lambda t: t > 0,
    "meta": lambda t: t.to("meta"),
    "repeated row": lambda t: t[:1].expand(t.shape),
    "parameter": lambda t: torch.nn.Parameter(t) if t.dtype.is_floating_point else t,
}


def variants(inputs, at):
    """A good call, and the call with each change to one tensor, one factor pair, one list."""
    yield "as it is", inputs

    def replaced(changed):
        return [changed.get(side, tensors) for side, tensors in enumerate(inputs)]

    def put(side, index, t):
        return [*inputs[side][:index], t, *inputs[side][index + 1 :]]

    for side in range(4):
        index = at % len(inputs[side])
        for name, change in CHANGES.items():
            t = change(inputs[side][index].detach())
            yield f"{name} in list {side}", replaced({side: put(side, index, t)})
        yield f"list {side} shortened", replaced({side: inputs[side][1:]})
        yield f"list {side} empty", replaced({side: []})
    for side in (0, 2):
        index = at % len(inputs[side])
        A, B = (inputs[s][index].detach() for s in (side, side + 1))
        for name, wider in {
            "more": (torch.cat([A, A[:1]]), torch.cat([B, B[:, :1]], dim=1)),
            "less": (A[1:], B[:, 1:]),
        }.items():
            pair = {side + i: put(side + i, index, t) for i, t in enumerate(wider)}
            yield f"one rank {name} in lists {side}, {side + 1}", replaced(pair)
        yield (
            f"lists {side}, {side + 1} shortened",
            replaced({side: inputs[side][1:], side + 1: inputs[side + 1][1:]}),
        )


@native
@given(
    clients=st.integers(1, 3),
    shapes=st.lists(st.tuples(*[st.integers(1, 4)] * 3), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(["plain", "inside", "parameter"]),
    at=st.integers(0, 8),
)
@settings(max_examples=60, deadline=None)
def test_native_reading_accepts_what_check_accepts(clients, shapes, dtype, layout, at):
    good = [[strided(t, layout) for t in tensors] for tensors in planted(clients, shapes, dtype)]
    for what, inputs in variants(good, at):
        try:
            problem = check(*inputs, None, 0.4, "joint")
        except (TypeError, ValueError):
            problem = None
        read = tables._native.read(*inputs)
        on_cpu = all(t.device.type == "cpu" for tensors in inputs for t in tensors)
        assert (read is not None) == (problem is not None and on_cpu), what
        if read is not None:
            assert read.clients == problem.clients, what


@native
def test_what_is_not_plain_memory_is_left_to_check():
    class Subclass(torch.Tensor):
        pass

    A, B = torch.randn(2, 4), torch.randn(3, 2)
    assert tables._native.read([A], [B], [A], [B]) is not None
    mode = torch._subclasses.FakeTensorMode()
    for other in (
        A.as_subclass(Subclass),
        mode.from_tensor(A),
        A.to_sparse(),
        A.T.contiguous().T,
        torch.randn(2, 8)[:, ::2],
        None,
        3,
    ):
        assert tables._native.read([other], [B], [A], [B]) is None, other
        assert tables._native.read([A], [B], [other], [B]) is None, other


@native
def test_an_unknown_exchange_api_is_refused():
    with pytest.raises(ValueError, match="PyCapsule_GetPointer called with incorrect name"):
        tables._cpu.Reader(torch.utils.dlpack.to_dlpack(torch.ones(1)), (torch.Tensor,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_reading_from_python_gives_the_same_bits(monkeypatch, dtype):
    """As with a torch that has no exchange API."""
    inputs = planted(3, SHAPES, dtype, ranks=[4, 1, 3])
    views = inputs.map(lambda t: torch.nn.functional.pad(t, (1, 2, 1, 2))[1:-2, 1:-2])
    weights = torch.tensor([1.0, 0.0, 2.5])

    def results():
        A, B = op.align_aggregate(*views, weights, lam=0.7)
        return [*A, *B, *op.align(*views, lam=0.7)]

    expected = results()
    monkeypatch.setattr(tables, "_native", None)
    actual = results()
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("align", ["joint", "A", "B"])
def test_every_value_is_looked_at(dtype, value, align):
    """Wherever it lies, also where no kernel reads; the largest finite values are none."""
    largest = torch.finfo(dtype).max
    for lam in (0.0, 0.4):
        for side, name in enumerate(("lora_A", "lora_B", "ref_A", "ref_B")):
            inputs = planted(2, SHAPES, dtype).map(lambda t: t * 0.01)
            given = list(inputs)
            if lam == 0.0 and name.startswith("ref"):
                given[side][1][0, 0] = largest
                op.align_aggregate(*given, lam=lam, align=align)
            given[side][-1][-1, -1] = value
            for operator in (op.align_aggregate, op.align):
                with pytest.raises(ValueError, match=f"{name} holds a non-finite .* layer 1"):
                    operator(*given, lam=lam, align=align)
