"""``align_aggregate`` and every baseline on the cases of ``fedrot bench``, verified first."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedrot.bench.cases import CASES, copies, factors
from fedrot.bench.machine import cold_bytes
from fedrot.bench.suites import operator_forms, verifier

FORMS = ("fedrot", "loop", "stacked", "per_layer", "compiled", "mean", "foreach_mean")


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request):
    return request.param


@pytest.fixture(scope="module", params=(torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
def problem(request, case):
    case = replace(case, dtype=request.param)
    return case, copies(factors(case), case.bytes, cold_bytes("cpu"))


@pytest.mark.parametrize("form", FORMS)
def test_operator(benchmark, time_in_turns, problem, form):
    case, inputs = problem
    benchmark.group = f"{case.name} {case.dtype_name}"
    function = operator_forms(case, compile=form == "compiled")[form]
    verifier(case, inputs[0], form)(function(*inputs[0]))
    time_in_turns(function, inputs, rounds=3 if form == "loop" else 7)
