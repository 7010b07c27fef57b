"""``align_aggregate`` along one size at a time: clients, rank, layers, width, shape, dtype."""

from __future__ import annotations

import pytest

from fedrot.bench.cases import copies, factors, sweeps
from fedrot.bench.machine import cold_bytes
from fedrot.bench.suites import operator_forms, verifier

POINTS = [(name, value, case) for name, points in sweeps().items() for value, case in points]


@pytest.mark.parametrize(
    ("sweep", "value", "case"), POINTS, ids=[f"{name}-{value}" for name, value, _ in POINTS]
)
def test_scaling(benchmark, time_in_turns, sweep, value, case):
    benchmark.group = f"scaling: {sweep}"
    inputs = copies(factors(case), case.bytes, cold_bytes("cpu") // 4)
    function = operator_forms(case, compile=False)["fedrot"]
    verifier(case, inputs[0], "fedrot")(function(*inputs[0]))
    time_in_turns(function, inputs)
