"""FlexLoRA's exact truncation of one layer: dense SVD and QR form in PyTorch, Gram blocks."""

from __future__ import annotations

import pytest

from fedrot.bench.suites import TRUNCATIONS, truncation_forms


@pytest.mark.parametrize("form", ("dense", "qr", "gram"))
@pytest.mark.parametrize("case", TRUNCATIONS, ids=lambda case: case.name)
def test_truncation(benchmark, time_in_turns, case, form):
    benchmark.group = f"truncation: {case.name}"
    inputs, verify, forms = truncation_forms(case, "cpu")
    verify(forms[form](*inputs))
    time_in_turns(forms[form], [inputs], rounds=3)
