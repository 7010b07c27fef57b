"""What the benchmarks compare with computes the same thing; a wrong form is never timed."""

from dataclasses import replace

import pytest
import torch
from problems import planted

from fedrot.bench import baselines, suites
from fedrot.bench.cases import Case, factors
from fedrot.bench.timing import Form, measure
from fedrot_kernels.backends import reference

CASE = Case("small", 3, 4, ((40, 30), (20, 50), (40, 30)))


@pytest.mark.parametrize("form", [baselines.loop, baselines.per_layer, baselines.stacked])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lam": 1.0, "align": "A"},
        {"proper": False, "align": "B"},
        {"weights": torch.tensor([3.0, 1.0, 2.0])},
    ],
    ids=str,
)
def test_aligning_forms_agree_with_the_reference(form, options):
    inputs = planted(3, [(40, 30, 4), (20, 50, 4), (40, 30, 4)])
    expected = reference.align_aggregate(*inputs, **options)
    for side, wanted in zip(form(*inputs, **options), expected, strict=True):
        for actual, want in zip(side, wanted, strict=True):
            torch.testing.assert_close(actual, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("align", ["A", "B", "joint"])
def test_every_form_in_every_dtype(dtype, align):
    case = replace(CASE, dtype=dtype, align=align)
    inputs = factors(case)
    for name, form in suites.operator_forms(case, compile=False).items():
        result = form(*inputs)
        suites.verifier(case, inputs, name)(result)
        assert {t.dtype for side in result for t in side} == {dtype}, name


def test_inputs_are_turned_and_well_conditioned():
    M = suites.cross_covariance(replace(CASE, rank=8), factors(replace(CASE, rank=8)))
    U, S, Vh = torch.linalg.svd(M.double())
    assert (torch.linalg.det(U @ Vh) > 0).all()  # rotations, no reflections
    assert float(((U @ Vh).diagonal(dim1=1, dim2=2).sum(1) < 6).double().mean()) > 0.9
    assert 10 < float((S[:, 0] / S[:, -1]).median()) < 1000


def test_a_wrong_form_is_not_timed():
    inputs = factors(CASE)
    calls = []

    def wrong(*given):
        calls.append(given)
        A, B = baselines.per_layer(*given, lam=0.4, align="A")
        A[1][0, 0] += 0.01
        return A, B

    form = Form("wrong", wrong, [inputs], 1, suites.verifier(CASE, inputs, "wrong"))
    with pytest.raises(RuntimeError, match=r"wrong in small is off by .*; not timed"):
        measure([form], "cpu", 0.0)
    assert len(calls) == 1


@pytest.mark.parametrize("clients", [2, 12])  # 12 * 4 is more than d and k
def test_truncations_agree_with_float64(clients):
    case = Case("small", clients, 4, ((40, 30),))
    inputs, verify, forms = suites.truncation_forms(case, "cpu")
    for form in forms.values():
        A, B = form(*inputs)
        assert (A.shape, B.shape) == ((4, 30), (40, 4))
        verify((A, B))
    with pytest.raises(RuntimeError, match="off by"):
        verify((A, 1.01 * B))


def test_sign_of_large_determinants():
    M = torch.eye(130).repeat(2, 2, 1, 1)
    M[0, 1, 5, 5] = -1
    assert baselines.det_sign(M).tolist() == [[1, -1], [1, 1]]
    assert torch.equal(baselines.det_sign(M[..., 3:9, 3:9]), baselines.det_sign(M))
