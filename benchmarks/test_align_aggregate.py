"""``align_aggregate`` against the forms in baselines.py, on the same inputs in one run.

Each result is checked against the operator before it is timed; inputs take turns, so that no
call finds its data in cache because the call before left it there.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import fedrot_kernels  # noqa: F401  (registers torch.ops.fedrot)
from benchmarks import baselines
from benchmarks.conftest import factors

FORMS = {
    "fedrot": torch.ops.fedrot.align_aggregate,
    "batched": baselines.batched,
    "loop": baselines.loop,
    "plain_mean": lambda A, B, ref_A, ref_B: baselines.plain_mean(A, B, len(ref_A)),
}


@pytest.mark.parametrize("form", FORMS)
def test_align_aggregate(benchmark, case, form):
    benchmark.group = case.name
    inputs = [factors(case, seed) for seed in range(3)]
    function = FORMS[form]
    if form != "plain_mean":
        for actual, expected in zip(
            function(*inputs[0]), torch.ops.fedrot.align_aggregate(*inputs[0]), strict=True
        ):
            torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)
    turn = itertools.cycle(inputs)
    rounds = 3 if form == "loop" else 7
    benchmark.pedantic(
        function, setup=lambda: (next(turn), {}), rounds=rounds, warmup_rounds=1, iterations=1
    )
