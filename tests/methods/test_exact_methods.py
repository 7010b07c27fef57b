"""FlexLoRA, FedEx-LoRA, FLoRA and LoRA-FAIR against dense float64 computations."""

from __future__ import annotations

import pytest
import torch

from fedrot.factors import Factors, padded, truncate
from fedrot.methods import FedExLoRA, FedIT, FlexLoRA, FLoRA, LoRAFAIR
from fedrot.methods.energy import singular_values
from fedrot.methods.exact import truncation
from fedrot.methods.fair import corrected
from fedrot.metrics import aggregation_error

SHAPES = {"wide": (12, 30), "tall": (33, 9), "narrow": (3, 20)}  # (d, k); 3 < r
R = 4


def federation(clients=5, ranks=None, dtype=torch.float32, seed=0, drift=0.5):
    """Uploads that drifted from one reference, in the given ranks."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64)

    def near(reference):
        return Factors(
            {m: (A + drift * normal(*A.shape)).to(dtype) for m, A in reference.A.items()},
            {m: (B + drift * normal(*B.shape)).to(dtype) for m, B in reference.B.items()},
        )

    reference = Factors(
        {m: normal(R, k) / k**0.5 for m, (_, k) in SHAPES.items()},
        {m: normal(d, R) for m, (d, _) in SHAPES.items()},
    )
    uploads = [near(reference) for _ in range(clients)]
    if ranks:
        uploads = [truncate(u, r) for u, r in zip(uploads, ranks, strict=True)]
    reference = Factors(
        *({m: t.to(dtype) for m, t in f.items()} for f in (reference.A, reference.B))
    )
    return uploads, reference, torch.rand(clients, generator=g) + 0.1


def exact(uploads, module, weights=None):
    w = torch.ones(len(uploads)) if weights is None else weights
    w = w.double() / w.double().sum()
    return sum(w[i] * u.B[module].double() @ u.A[module].double() for i, u in enumerate(uploads))


def product(factors, module):
    return factors.B[module].double() @ factors.A[module].double()


@pytest.mark.parametrize("ranks", [None, (4, 1, 2, 4, 3)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_flexlora_is_the_dense_truncation(ranks, weighted, dense):
    uploads, reference, weights = federation(ranks=ranks)
    method = FlexLoRA(dense=dense)
    out = method.aggregate(uploads, reference, weights if weighted else None)
    for module in SHAPES:
        U, S, Vh = torch.linalg.svd(exact(uploads, module, weights if weighted else None), False)
        scale = float(S[0])
        for rank in range(1, R + 1):  # a client of smaller rank gets the best of its own rank
            own = truncate(out, rank)
            best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
            assert float((product(own, module) - best).abs().max()) < 1e-5 * scale
        rows = min(R, *SHAPES[module])
        A = out.A[module].double()
        torch.testing.assert_close(
            (A @ A.T)[:rows, :rows], torch.eye(rows).double(), rtol=0, atol=1e-5
        )
        largest = A[:rows].gather(1, A[:rows].abs().argmax(1, keepdim=True))
        assert bool((largest > 0).all())  # the sign rule


@pytest.mark.parametrize(
    "method", [FlexLoRA(), FlexLoRA("reference"), FlexLoRA(energy=0.9), FlexLoRA(dense=True)]
)
def test_flexlora_names_what_is_not_finite(method):
    uploads, reference, _ = federation()
    uploads[1].B[next(iter(SHAPES))][0, 0] = float("nan")
    message = rf"lora_B holds a non-finite value for client 1, layer '{next(iter(SHAPES))}'"
    with pytest.raises(ValueError, match=message):
        method.aggregate(uploads, reference)


def test_dense_is_for_the_published_gauge():
    with pytest.raises(ValueError, match=r"dense=true is for gauge=singular, got gauge=reference"):
        FlexLoRA("reference", dense=True)


def test_flexlora_by_hand():
    """B_0 A_0 = diag(4, 0), B_1 A_1 = diag(0, 2): the mean diag(2, 1) has the best rank 1
    diag(2, 0); plain averaging gives ones * 1.5 instead."""
    A = [torch.tensor([[2.0, 0]]), torch.tensor([[0.0, 1]])]
    B = [torch.tensor([[2.0], [0]]), torch.tensor([[0.0], [2]])]
    uploads = [Factors({"m": a}, {"m": b}) for a, b in zip(A, B, strict=True)]
    reference = Factors({"m": torch.ones(1, 2)}, {"m": torch.zeros(2, 1)})
    out = FlexLoRA().aggregate(uploads, reference)
    torch.testing.assert_close(out.A["m"], torch.tensor([[1.0, 0]]))
    torch.testing.assert_close(out.B["m"], torch.tensor([[2.0], [0]]))
    folded = FedExLoRA().fold(uploads, FedExLoRA().aggregate(uploads, reference))
    # mean B mean A = [[1], [1]] [1, .5]
    torch.testing.assert_close(folded["m"], torch.tensor([[1.0, -0.5], [-1.0, 0.5]]))


def test_the_rank_that_holds_the_energy_by_hand():
    """The mean of diag(8, 0, 0), diag(0, 6, 0), diag(0, 0, 0), diag(0, 0, 2) of weight 1/4 each is
    diag(2, 1.5, .5): squares 4, 2.25, .25 of 6.5, so shares .615, .962, 1 for ranks 1, 2, 3."""
    uploads = [
        Factors({"m": torch.eye(3)[[i]]}, {"m": value * torch.eye(3)[:, [i]]})
        for i, value in ((0, 8.0), (1, 6.0), (0, 0.0), (2, 2.0))
    ]
    mean = torch.tensor([2.0, 1.5, 0.5])
    for bound in (1, 2, 3):
        reference = Factors({"m": torch.ones(bound, 3)}, {"m": torch.zeros(3, bound)})
        for energy, rank in ((0.61, 1), (0.62, 2), (0.96, 2), (0.97, 3), (1.0, 3)):
            wanted = min(rank, bound)
            for gauge in ("singular", "reference"):
                out = FlexLoRA(gauge, energy).aggregate(uploads, reference)
                assert out.A["m"].shape == (wanted, 3) and out.B["m"].shape == (3, wanted)
                best = torch.where(torch.arange(3) < wanted, mean, 0.0).diag()
                torch.testing.assert_close(out.B["m"] @ out.A["m"], best, rtol=0, atol=1e-6)
    alone = FlexLoRA("singular", 0.62).aggregate(uploads, reference, torch.tensor([0, 1.0, 1, 0]))
    assert alone.A["m"].shape == (1, 3)


@pytest.mark.parametrize("gauge", ["singular", "reference"])
@pytest.mark.parametrize("ranks", [None, (4, 1, 2, 4, 3), (6, 1, 2, 7, 3)])
def test_energy_decides_by_layer_up_to_the_reference(gauge, ranks):
    """Layers differ in what they need; the result is the truncation to that rank."""
    uploads, reference, weights = federation(ranks=None, drift=0.3)
    if ranks:
        uploads = [padded(truncate(u, r), r) for u, r in zip(uploads, ranks, strict=True)]
    found = {}
    for energy in (0.5, 0.8, 0.95, 1.0):
        out = FlexLoRA(gauge, energy).aggregate(uploads, reference, weights)
        found[energy] = {m: A.shape[0] for m, A in out.A.items()}
        for module in SHAPES:
            U, S, Vh = torch.linalg.svd(exact(uploads, module, weights), full_matrices=False)
            kept = S.square().cumsum(0) / S.square().sum()
            wanted = (
                min(R, int((kept < energy - 1e-12).sum()) + 1) if energy < 1 else min(R, len(S))
            )
            assert found[energy][module] == wanted
            best = (U[:, :wanted] * S[:wanted]) @ Vh[:wanted]
            assert float((product(out, module) - best).abs().max()) < 1e-5 * float(S[0])
    assert len({tuple(r.values()) for r in found.values()}) > 2
    assert any(len(set(r.values())) > 1 for r in found.values())
    whole = FlexLoRA(gauge).aggregate(uploads, reference, weights)
    assert {m: A.shape[0] for m, A in whole.A.items()} == dict.fromkeys(SHAPES, R)


def test_narrow_factors_have_the_rank_that_they_had():
    """What is rounding is so for float32, in which one computes: bfloat16's would hide the 1/8."""
    A = torch.zeros(2, 100, dtype=torch.bfloat16)
    A[0, 0], A[1, 1] = 1.0, 0.125
    upload = Factors({"m": A}, {"m": (A > 0).T.to(A.dtype)})
    found = singular_values([upload])["m"]
    torch.testing.assert_close(found, torch.tensor([1.0, 0.125], dtype=torch.float64))


def test_what_is_computed_in_float64_has_its_digits():
    uploads, reference, weights = federation(dtype=torch.float64)
    best = FlexLoRA().aggregate(uploads, reference, weights)
    fedex = FedExLoRA().aggregate(uploads, reference, weights)
    folded = FedExLoRA().fold(uploads, fedex, weights)
    for module in SHAPES:
        target = exact(uploads, module, weights)
        U, S, Vh = torch.linalg.svd(target, full_matrices=False)
        truncated = (U[:, :R] * S[:R]) @ Vh[:R]
        torch.testing.assert_close(product(best, module), truncated, rtol=0, atol=1e-11)
        whole = product(fedex, module) + folded[module]
        torch.testing.assert_close(whole, target, rtol=0, atol=1e-11)


def test_an_average_that_overflows_is_named():
    huge = Factors({"m": torch.full((1, 2), 1e25)}, {"m": torch.full((2, 1), 1e25)})
    with pytest.raises(ValueError, match="layer 'm': the exact average overflows its dtype"):
        FlexLoRA().aggregate([huge], huge)


def test_the_rank_can_rise_again():
    """Two clients of rank 1 that go apart: their mean has rank 2."""
    A = [torch.tensor([[1.0, 0]]), torch.tensor([[0.0, 1]])]
    uploads = [Factors({"m": a}, {"m": a.T.clone()}) for a in A]
    start = Factors({"m": torch.tensor([[1.0, 0]])}, {"m": torch.zeros(2, 1)})
    reference = padded(start, 4)
    out = FlexLoRA("reference", 0.9).aggregate(uploads, reference)
    assert out.A["m"].shape == (2, 2)
    torch.testing.assert_close(out.B["m"] @ out.A["m"], torch.eye(2) / 2)


@pytest.mark.parametrize("gauge", ["singular", "reference"])
def test_energy_of_an_update_of_zero(gauge):
    uploads, reference, _ = federation()
    zero = [Factors(u.A, {m: torch.zeros_like(B) for m, B in u.B.items()}) for u in uploads]
    out = FlexLoRA(gauge, 0.9).aggregate(zero, reference)
    assert all(A.shape[0] == 1 and bool(A.isfinite().all()) for A in out.A.values())
    assert all(B.shape[1] == 1 and float(B.abs().max()) == 0 for B in out.B.values())


@pytest.mark.parametrize("energy", [0.0, -1.0, 1.01, float("nan")])
def test_energy_is_a_share(energy):
    with pytest.raises(ValueError, match=f"energy must be above 0 and at most 1, got {energy}"):
        FlexLoRA(energy=energy)


def test_truncation_never_forms_the_product():
    """A layer whose dense product would take 4 TB."""
    d = k = 1_000_000
    left, right = torch.zeros(d, 2), torch.zeros(2, k)
    left[0, 0], left[5, 1], right[0, 3], right[1, 4] = 3.0, 1.0, 2.0, 1.0
    A, B = truncation(left, right, 1)
    assert A[0, 3] == pytest.approx(1.0) and B[0, 0] == pytest.approx(6.0)
    assert float(A.norm()) == pytest.approx(1.0) and float(B.norm()) == pytest.approx(6.0)


@pytest.mark.parametrize("method", [FedExLoRA(), FLoRA()])
@pytest.mark.parametrize("ranks", [None, (4, 1, 2, 4, 3)])
def test_folding_makes_the_global_model_exact(method, ranks):
    uploads, reference, weights = federation(ranks=ranks)
    aggregate = method.aggregate(uploads, reference, weights)
    folded = method.fold(uploads, aggregate, weights)
    plain = FedIT().aggregate(uploads, reference, weights)
    errors = aggregation_error(uploads, aggregate, weights, folded)
    for module in SHAPES:
        target = exact(uploads, module, weights)
        merged = product(aggregate, module) + folded[module].double()
        torch.testing.assert_close(merged, target, rtol=0, atol=1e-5)
        assert errors[module] == pytest.approx(float((merged - target).norm()), abs=1e-9)
        assert errors[module] < 1e-4
        assert float((product(plain, module) - target).norm()) > 0.1  # what folding makes good


def test_fedex_keeps_the_averaged_factors_and_flora_restarts():
    uploads, reference, weights = federation()
    plain = FedIT().aggregate(uploads, reference, weights)
    fedex = FedExLoRA().aggregate(uploads, reference, weights)
    assert all(torch.equal(fedex.A[m], plain.A[m]) for m in SHAPES)
    assert all(torch.equal(fedex.B[m], plain.B[m]) for m in SHAPES)
    draws = [
        FLoRA().aggregate(uploads, reference, generator=torch.Generator().manual_seed(s))
        for s in (0, 0, 1)
    ]
    for m, (_, k) in SHAPES.items():
        assert all(float(f.B[m].abs().max()) == 0 for f in draws)
        assert torch.equal(draws[0].A[m], draws[1].A[m])
        assert not torch.equal(draws[0].A[m], draws[2].A[m])
        # PEFT's: uniform within 1 / sqrt(k).
        assert 0.5 * k**-0.5 < float(draws[0].A[m].abs().max()) <= k**-0.5
    assert FedIT().fold(uploads, plain) == {}


def objective(X, B, A, T, regularization):
    P = X @ A
    return 1 - (T * P).sum() / (T.norm() * P.norm()) + regularization * (X - B).square().sum()


@pytest.mark.parametrize("regularization", [0.01, 1.0])
def test_lora_fair_is_stationary_and_lower(regularization):
    uploads, reference, weights = federation(dtype=torch.float64)
    plain = FedIT().aggregate(uploads, reference, weights)
    out = LoRAFAIR(regularization).aggregate(uploads, reference, weights)
    for module in ("wide", "tall"):
        A, B, T = plain.A[module], plain.B[module], exact(uploads, module, weights)
        assert torch.equal(out.A[module], A)
        X = out.B[module].requires_grad_()
        value = objective(X, B, A, T, regularization)
        (gradient,) = torch.autograd.grad(value, X)
        at_mean = B.clone().requires_grad_()
        before = objective(at_mean, B, A, T, regularization)
        (steepest,) = torch.autograd.grad(before, at_mean)
        assert float(gradient.norm()) < 1e-6 * float(steepest.norm())
        assert value.item() < before.item()
        # What the paper does: plain gradient descent; the fixed point must not be above it.
        Y = B.clone().requires_grad_()
        for _ in range(300):
            (g,) = torch.autograd.grad(objective(Y, B, A, T, regularization), Y)
            Y = (Y - 0.05 * g).detach().requires_grad_()
        assert value.item() <= objective(Y, B, A, T, regularization).item() + 1e-9


def test_lora_fair_by_hand():
    """Rank 1, A = (1, 0), B = (1, 0)^T, T = diag(1, 1): only the column B can follow. T's part
    in reach is (1, 0)^T itself, so B is stationary; against T = [[0, 0], [1, 0]] the average has
    nothing in common with the target and stays."""
    A, B = torch.tensor([[1.0, 0]]), torch.tensor([[1.0], [0]])
    for left, right in ((torch.eye(2), torch.eye(2)), (torch.tensor([[0.0], [1]]), A)):
        torch.testing.assert_close(corrected(left, right, A, B, 0.01), B)
    # T = [[1, 0], [1, 0]], no regularization to speak of: the direction becomes (1, 1).
    X = corrected(torch.tensor([[1.0], [1]]), A, A, B, 1e-9)
    assert float(X[1] / X[0]) == pytest.approx(1.0, abs=1e-4)
    zero = torch.zeros(2, 1)
    assert torch.equal(corrected(zero, A, A, zero, 0.01), zero)


def test_lora_fair_with_little_regularization_approaches_the_refit():
    """As the penalty goes to zero, the direction is that of the least-squares B."""
    uploads, reference, weights = federation(dtype=torch.float64)
    out = LoRAFAIR(1e-7).aggregate(uploads, reference, weights)
    for module in ("wide", "tall"):
        A, T = out.A[module], exact(uploads, module, weights)
        refit = T @ torch.linalg.pinv(A)
        cosine = torch.cosine_similarity(
            product(out, module).flatten(), (refit @ A).flatten(), dim=0
        )
        assert float(cosine) > 1 - 1e-6


def test_lora_fair_refuses():
    with pytest.raises(ValueError, match="regularization must not be negative, got -1"):
        LoRAFAIR(-1)


def test_weights_whose_sum_overflows_count_as_any_others():
    uploads, reference, _ = federation(clients=2)
    large = torch.full((2,), 1e308, dtype=torch.float64)
    plain, out = (FlexLoRA().aggregate(uploads, reference, w) for w in (None, large))
    for module in SHAPES:
        torch.testing.assert_close(product(out, module), product(plain, module))
    average = FedExLoRA().aggregate(uploads, reference, large)
    residuals = FedExLoRA().fold(uploads, average, large)
    for module in SHAPES:
        whole = product(average, module) + residuals[module].double()
        torch.testing.assert_close(whole, exact(uploads, module), rtol=1e-5, atol=1e-5)
    errors = aggregation_error(uploads, FedIT().aggregate(uploads, reference), large)
    assert errors == aggregation_error(uploads, FedIT().aggregate(uploads, reference))


def test_flora_looks_at_what_it_stacks():
    uploads, reference, _ = federation(clients=2)
    with pytest.raises(ValueError, match=r"weights must not be negative|weights\[0\]"):
        FLoRA().aggregate(uploads, reference, torch.tensor([-1.0, 3.0]))
    uploads[1].A["tall"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"lora_A holds a non-finite value for client 1"):
        FLoRA().aggregate(uploads, reference)
    other = Factors({"x": torch.ones(1, 1)}, {"x": torch.ones(1, 1)})
    with pytest.raises(ValueError, match="client 1 has layers"):
        FLoRA().aggregate([uploads[0], other], reference)


@pytest.mark.parametrize("method", [FlexLoRA(), FlexLoRA("reference"), FLoRA()])
def test_shapes_that_do_not_fit_are_named(method):
    like = Factors({"m": torch.ones(2, 5)}, {"m": torch.ones(3, 2)})
    for A, B in (((2, 4), (3, 2)), ((2, 5), (4, 2)), ((2, 5), (3, 1))):
        wrong = Factors({"m": torch.ones(A)}, {"m": torch.ones(B)})
        wanted = rf"\(r, 5\) and \(3, r\) for client 1, layer 'm', got \({A[0]}, {A[1]}\) and"
        with pytest.raises(ValueError, match=wanted):
            method.aggregate([like, wrong], like)
