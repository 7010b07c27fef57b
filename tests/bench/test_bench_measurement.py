"""Work and floor of a case, timing in turns, and the numbers of the tables."""

import pytest
import torch

from fedrot.bench import tables
from fedrot.bench.cases import CASES, Case, copies, factors, select, sweeps
from fedrot.bench.floor import floor
from fedrot.bench.timing import Form, Timing, measure


def test_work_of_a_case():
    """Two layers, 3 clients, rank 2: by hand."""
    shapes = ((10, 20), (30, 40))
    case = Case("hand", 3, 2, shapes)
    assert case.elements == 3 * 2 * (10 + 20 + 30 + 40) == 600
    assert case.bytes == 2400
    assert Case("hand", 3, 2, shapes, torch.bfloat16).bytes == 1200
    apply = 2 * 2 * 600
    assert Case("hand", 3, 2, shapes, lam=0.0).flops == apply
    assert case.flops == apply + 2 * 2 * (3 * 2 * (20 + 40))
    assert Case("hand", 3, 2, shapes, align="B").flops == apply + 2 * 2 * (3 * 2 * (10 + 30))
    assert Case("hand", 3, 2, shapes, align="joint").flops == 2 * apply


def test_floor_is_the_larger_of_reading_and_multiplying():
    rates = {"bandwidth": 10.0, "sgemm": 100.0}
    assert floor(50, 200, rates) == 5.0
    assert floor(50, 700, rates) == 7.0


def test_cases_are_those_announced():
    megabytes = {case.name: round(case.bytes / 1e6) for case in CASES}
    assert megabytes["roberta-large-r4-n10"] == 16
    assert megabytes["roberta-large-r4-n50"] == 79
    assert megabytes["llama-8b-qv-r16-n10"] == 273
    assert [case.rank for case in select(["r64", "n50"])] == [4, 64]
    with pytest.raises(ValueError, match=r"cases must name some of roberta.*got 'gpt'"):
        select(["r64", "gpt"])
    for short in (False, True):
        for points in sweeps(short).values():
            assert len({value for value, _ in points}) == len(points) > 2


def test_copies_are_equal_and_apart():
    case = Case("small", 2, 2, ((6, 5),))
    inputs = copies(factors(case), case.bytes, 3 * case.bytes)
    assert len(inputs) == 3
    tensors = [t for copy in inputs for side in copy for t in side]
    assert len({t.data_ptr() for t in tensors}) == len(tensors)
    for side, again in zip(inputs[0], inputs[2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(side, again, strict=True))
    assert len(copies(inputs[0], case.bytes, 1)) == 2
    assert len(copies(inputs[0], case.bytes, 2**40)) == 64


def test_forms_take_turns_and_threads(monkeypatch):
    monkeypatch.setattr("fedrot.bench.timing.MAX_BURST", 1)
    before = torch.get_num_threads()
    seen = []

    def form(name, threads):
        def call(i):
            seen.append((name, i, torch.get_num_threads()))

        return Form(name, call, [(0,), (1,)], threads)

    timings = measure([form("a", 1), form("b", 2)], "cpu", 0.0, rounds=(3, 3))
    # Each is called twice first, verified and estimated.
    assert seen[:4] == [("a", 0, 1), ("a", 1, 1), ("b", 0, 2), ("b", 1, 2)]
    assert seen[4:] == [(n, i, t) for i in (0, 1, 0) for n, t in (("a", 1), ("b", 2))]
    assert [t.calls for t in timings.values()] == [3, 3]
    assert torch.get_num_threads() == before


def test_median_and_quartiles():
    assert Timing.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Timing(3.0, 2.0, 4.0, 5)


def row(seconds: float, floor: float = 1.0, **times: float):
    return {
        "floor": floor,
        "flops": 8.0,
        "bytes": 4.0,
        "sgemm": 10.0,
        "times": {name: {"median": t} for name, t in {"fedrot": seconds, **times}.items()},
    }


def test_ratios_of_the_tables():
    assert tables.ratio(row(2.0, loop=9.0), "loop") == 4.5
    assert tables.ratio(row(2.0), "loop") is None
    assert tables.bound(row(2.0)) == "memory"
    assert tables.bound(row(2.0, floor=0.8)) == "arithmetic"
    assert [tables.times(x) for x in (None, 0.456, 4.56, 45.6)] == ["", "0.46x", "4.6x", "46x"]
    rows = [row(2.0), row(8.0, floor=2.0), row(6.0, floor=3.0)]
    assert [tables.cliff(rows, i) for i in range(3)] == [0.5, 2.0, 0.5]
