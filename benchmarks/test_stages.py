"""The operators that a call of ``align_aggregate`` is made of, on the same inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedrot.bench.cases import CASES, copies, factors
from fedrot.bench.machine import cold_bytes
from fedrot.bench.suites import stage_forms


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def forms(request):
    case = replace(request.param, align="joint")
    inputs = copies(factors(case), case.bytes, cold_bytes("cpu"))
    return case.name, stage_forms(case, inputs)


@pytest.mark.parametrize("stage", ("whole", "align", "apply", "polar", "soft", "svd"))
def test_stage(benchmark, time_in_turns, forms, stage):
    benchmark.group, found = forms
    time_in_turns(*found[stage])
