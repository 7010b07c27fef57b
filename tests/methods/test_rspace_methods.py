"""FedRot-LoRA's rotations beyond the paper, and FlexLoRA in the gauge of the reference."""

from __future__ import annotations

import pytest
import torch

from fedrot.config import load
from fedrot.errors import FedrotError
from fedrot.factors import Factors, padded, truncate
from fedrot.gauge import haar, regauge
from fedrot.methods import FedIT, FedRot, FlexLoRA
from fedrot.methods.base import arguments
from fedrot.metrics import aggregation_error, rotation_angles, total
from fedrot.options import parse_overrides
from fedrot_kernels import rspace
from fedrot_kernels.rspace import Blocks

SHAPES = {"wide": (12, 30), "tall": (33, 9)}  # (d, k)
R = 4


def federation(ranks=(4, 4, 2, 3), seed=0, noise=1.0):
    """Uploads that share something, each in a basis of its own."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64)

    reference = Factors(
        {m: normal(R, k) for m, (_, k) in SHAPES.items()},
        {m: normal(d, R) for m, (d, _) in SHAPES.items()},
    )
    uploads = []
    for rank in ranks:
        own = regauge(reference, g)
        noisy = Factors(
            {m: A + noise * normal(*A.shape) for m, A in own.A.items()},
            {m: B + noise * normal(*B.shape) for m, B in own.B.items()},
        )
        uploads.append(truncate(noisy, rank))
    return uploads, reference, torch.tensor([1.0, 2.0, 0.5, 1.5])


def error(uploads, result, weights):
    return aggregation_error(uploads, result, weights)


@pytest.mark.parametrize("seed", range(3))
def test_each_rule_loses_no_more_than_what_it_starts_from(seed):
    """In every layer: optimal <= gpa, auto <= 0 and 1, and FlexLoRA, the bound, <= all."""
    uploads, reference, weights = federation(seed=seed)

    def lost(method):
        return error(uploads, method.aggregate(uploads, reference, weights), weights)

    found = {
        name: lost(method)
        for name, method in {
            "plain": FedIT(),
            "joint": FedRot(1.0),
            "auto": FedRot("auto"),
            "auto client": FedRot("auto-client"),
            "gpa": FedRot(1.0, "gpa"),
            "optimal": FedRot(1.0, "optimal"),
            "gpa auto": FedRot("auto", "gpa"),
            "best": FlexLoRA("reference"),
            "published": FlexLoRA(),
        }.items()
    }
    for module in SHAPES:
        of = {name: errors[module] for name, errors in found.items()}
        for less, more in (
            ("auto", "plain"),
            ("auto", "joint"),
            ("auto client", "auto"),
            ("optimal", "gpa"),
            ("gpa auto", "gpa"),
            ("gpa auto", "plain"),
            ("best", "optimal"),
        ):
            assert of[less] <= of[more] * (1 + 1e-9), (less, more)
        assert of["best"] == pytest.approx(of["published"], rel=1e-6)
    assert total(found["optimal"]) < 0.95 * total(found["joint"])


def test_shifted_and_alternate():
    uploads, reference, weights = federation()
    plain = FedIT().aggregate(uploads, reference, weights)
    shifted = FedRot(align="alternate", rotation="shifted")
    first = shifted.aggregate(uploads, reference, weights, round=0)
    assert all(torch.equal(first.A[m], plain.A[m]) for m in SHAPES)
    odd = shifted.aggregate(uploads, reference, weights, round=1)
    of_A = FedRot(align="A", rotation="shifted").aggregate(uploads, reference, weights)
    assert all(torch.equal(odd.B[m], of_A.B[m]) for m in SHAPES)
    hard = FedRot(align="A", rotation="shifted", eps=0.0).aggregate(uploads, reference, weights)
    expected = FedRot(1.0, "A").aggregate(uploads, reference, weights)
    for m in SHAPES:
        torch.testing.assert_close(hard.A[m], expected.A[m], rtol=0, atol=1e-9)
        assert float((of_A.A[m] - expected.A[m]).abs().max()) > 1e-3


def test_reflections_where_they_are_wanted():
    """Every way to a rotation takes `proper`; half of the clients' bases are mirrored."""
    uploads, reference, weights = federation(ranks=(4, 4, 4, 4))
    hard = FedRot(1.0, proper=False).aggregate(uploads, reference, weights)
    shifted = FedRot(rotation="shifted", eps=0.0, proper=False)
    ours = shifted.aggregate(uploads, reference, weights)
    for m in SHAPES:
        torch.testing.assert_close(ours.A[m], hard.A[m], rtol=0, atol=1e-9)
    for lam in rspace.AUTO:
        method = FedRot(lam, proper=False)
        plain = method.aggregate(uploads, reference, weights)
        told, _ = method.aggregate_with_lam(uploads, reference, weights)
        rotations = FedRot(lam).aggregate(uploads, reference, weights)
        for m in SHAPES:
            assert torch.equal(told.A[m], plain.A[m])
            assert float((rotations.A[m] - plain.A[m]).abs().max()) > 1e-3


def test_angles_by_hand():
    """Of rank 4, one plane turned by 60 degrees: 60, 60, 0, 0. Mirrored along the first, strongest
    direction: one angle of 180, and a rotation also flips the weakest. Size does not matter."""
    cos, sin = 0.5, 0.75**0.5
    turn = torch.block_diag(torch.tensor([[cos, -sin], [sin, cos]]), torch.eye(2))
    A = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    reference = Factors({"m": A}, {"m": A})
    for size in (1.0, 5e37):  # whose squares overflow
        for R, proper, angle in (
            (turn, True, 30.0),
            (torch.diag(torch.tensor([-1.0, 1, 1, 1])), False, 45.0),
            (torch.diag(torch.tensor([-1.0, 1, 1, 1])), True, 90.0),
        ):
            client = Factors({"m": size * R.T @ A}, {"m": size * A @ R})
            found = rotation_angles([client], reference, proper=proper)
            assert found.shape == (1, 1) and float(found) == pytest.approx(angle, abs=0.05)


def test_another_basis_keeps_the_product_and_each_type():
    A, B = torch.tensor([[1.0, 2], [3, -1]]), torch.tensor([[2.0, 1]], dtype=torch.float64)
    found = regauge(Factors({"m": A}, {"m": B}), torch.Generator().manual_seed(0))
    assert (found.A["m"].dtype, found.B["m"].dtype) == (torch.float32, torch.float64)
    product = found.B["m"] @ found.A["m"].double()
    torch.testing.assert_close(product, B @ A.double(), rtol=0, atol=1e-6)
    assert not torch.allclose(found.B["m"], B)


def test_bases_are_drawn_evenly():
    """QR alone gives a diagonal of one sign."""
    g = torch.Generator().manual_seed(0)
    drawn = torch.stack([haar(3, g) for _ in range(400)])
    assert float(drawn.mean(0).abs().max()) < 0.15
    assert 0.4 < float((torch.linalg.det(drawn) > 0).double().mean()) < 0.6


@pytest.mark.parametrize("setting", ["regauge", "one-shot"])
def test_a_setting_gives_lam_where_it_has_an_effect(setting):
    assert load(parse_overrides([f"setting={setting}"])).method == FedRot(lam=1.0)
    for rotation in ("random", "shifted"):
        config = load(parse_overrides([f"setting={setting}", f"method.rotation={rotation}"]))
        assert config.method == FedRot(rotation=rotation)


@pytest.mark.parametrize("align", ["joint", "alternate", "gpa"])
def test_the_average_was_made_with_the_lam_that_was_found(align):
    uploads, reference, weights = federation(ranks=(4, 4, 4))
    weights = weights[:3]
    for lam, columns in (("auto", 1), ("auto-client", 3)):
        method = FedRot(lam, align)
        result, found = method.aggregate_with_lam(uploads, reference, weights, round=3)
        assert found.shape == (2, columns)
        assert float(found.min()) < 1  # not what a whole rotation would do, too
        again = method.aggregate(uploads, reference, weights, round=3)
        assert all(torch.equal(again.A[m], result.A[m]) for m in SHAPES)
        whole = FedRot(1.0, align)
        for layer, m in enumerate(SHAPES):
            ours = [Factors({m: u.A[m]}, {m: u.B[m]}) for u in (*uploads, reference)]
            blocks = Blocks.of(*arguments(ours[:-1], ours[-1]), weights)
            R = rspace.rotations(blocks, align=whole.schedule(3)[1])[0]
            w = weights / weights.sum()
            A = B = 0
            for i, u in enumerate(uploads):
                own = float(found[layer, i if columns > 1 else 0])
                U, _, Vh = torch.linalg.svd((1 - own) * torch.eye(R.shape[-1]) + own * R[i])
                A, B = A + w[i] * (U @ Vh).mT @ u.A[m], B + w[i] * u.B[m] @ U @ Vh
            torch.testing.assert_close(result.A[m], A, rtol=0, atol=1e-6)
            torch.testing.assert_close(result.B[m], B, rtol=0, atol=1e-6)
    plain = FedRot("auto", "alternate").aggregate_with_lam(uploads, reference, round=0)
    assert plain[1] is None
    assert FedRot(0.5).aggregate_with_lam(uploads, reference)[1] is None


def test_flexlora_in_the_gauge_of_the_reference_stays_there():
    """Clients that are one adapter in other bases: that adapter comes back in the basis of the
    reference, where it is of the kind that training leaves, ``B^T B - A A^T`` a multiple of ``I``;
    and a server optimizer may follow it, which the singular vectors do not allow."""
    g = torch.Generator().manual_seed(1)
    basis = [
        torch.linalg.qr(torch.randn(n, R, generator=g, dtype=torch.float64)).Q for n in (30, 12)
    ]
    sizes = torch.tensor([2.0, 1.0, 0.5, 0.1], dtype=torch.float64)
    turn = haar(R, g)
    A = turn.T @ (sizes.square() + 0.3).sqrt().diag() @ basis[0].T
    B = basis[1] @ sizes.diag() @ turn
    reference = Factors({"m": A}, {"m": B})
    uploads = [regauge(reference, g) for _ in range(3)]
    out = FlexLoRA("reference").aggregate(uploads, reference)
    torch.testing.assert_close(out.A["m"], A, rtol=0, atol=1e-6)
    torch.testing.assert_close(out.B["m"], B, rtol=0, atol=1e-6)
    options = ["method.name=flexlora", "server.optimizer=fedavgm"]
    with pytest.raises(FedrotError, match=r"FlexLoRA cannot go with server.optimizer=fedavgm"):
        load(parse_overrides(options))
    assert load(parse_overrides([*options, "method.gauge=reference"])).method.steady_basis


@pytest.mark.parametrize(
    ("text", "value"),
    [("auto", "auto"), ("auto-client", "auto-client"), ("1e-1", 0.1), ("1", 1.0), (".25", 0.25)],
)
def test_lam_is_a_number_or_auto(text, value):
    config = load(parse_overrides([f"method.lam={text}", "method.align=optimal"]))
    assert config.method.lam == value and type(config.method.lam) is type(value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["method.lam=best"], "method.lam must be a number or auto, got 'best'"),
        (["method.lam=true"], "method.lam must be a number"),
        (["method.align=gpo"], "align must be joint, A, B, gpa, optimal or alternate, got 'gpo'"),
        (
            ["method.rotation=shifted", "method.align=gpa"],
            "align must be joint, A, B or alternate for rotation=shifted, got 'gpa'",
        ),
        (
            ["method.rotation=scale", "method.align=optimal"],
            "align must be A, B or alternate for rotation=scale, got 'optimal'",
        ),
        (
            ["method.rotation=scale", "method.align=A", "method.lam=auto"],
            "lam must be a number for rotation=scale",
        ),
        (["method.eps=-1"], "eps must be finite and not negative"),
        (["method.eps=0.1"], "method.eps has no effect with rotation=procrustes, got 0.1"),
        (
            ["method.rotation=shifted", "method.lam=1"],
            "method.lam has no effect with rotation=shifted, got 1.0",
        ),
        (["method.name=flexlora", "method.gauge=x"], "gauge must be singular or reference"),
    ],
)
def test_refused(options, message):
    with pytest.raises(FedrotError) as refused:
        load(parse_overrides(options))
    assert message in str(refused.value)


@pytest.mark.parametrize("align", ["joint", "A", "B", "gpa", "optimal"])
def test_a_rotation_leaves_more_rank_than_the_clients_have_empty(align):
    """Room for a rotation to act on the rest as a reflection is all that it gives."""
    uploads, reference, weights = federation()
    out = FedRot(1.0, align).aggregate(uploads, padded(reference, 7), weights)
    expected = FedRot(1.0, align, proper=False).aggregate(uploads, reference, weights)
    for m in SHAPES:
        assert float(out.A[m][R:].abs().max()) < 1e-12
        assert float(out.B[m][:, R:].abs().max()) < 1e-12
        if align != "optimal":  # the length of its ten steps depends on the rank
            product = expected.B[m] @ expected.A[m]
            torch.testing.assert_close(out.B[m] @ out.A[m], product, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 2, 3, 6])
def test_flexlora_to_a_rank_that_no_client_has(rank, dtype):
    """Clients of rank 4, 4, 2, 3, a reference of another rank: the product of the published gauge
    in the gauge of this reference, ``B^T B - A A^T = delta I``."""
    uploads, reference, weights = federation()
    cast = [
        Factors(*({m: t.to(dtype) for m, t in f.items()} for f in (u.A, u.B)))
        for u in (*uploads, padded(reference, rank) if rank > R else truncate(reference, rank))
    ]
    *uploads, like = cast
    mine = FlexLoRA("reference").aggregate(uploads, like, weights)
    best = FlexLoRA().aggregate(uploads, like, weights)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-7
    for m in SHAPES:
        A, B = mine.A[m].double(), mine.B[m].double()
        assert (A.shape[0], B.shape[1], mine.A[m].dtype) == (rank, rank, dtype)
        product = best.B[m].double() @ best.A[m].double()
        scale = float(product.norm())
        torch.testing.assert_close(B @ A, product, rtol=0, atol=tolerance * scale)
        norms = like.B[m].double().square().sum() - like.A[m].double().square().sum()
        delta = norms / rank * torch.eye(rank, dtype=torch.float64)
        torch.testing.assert_close(B.T @ B - A @ A.T, delta, rtol=0, atol=10 * tolerance * scale)
        # Nearest to the reference: the Procrustes matrix is symmetric, positive semi-definite.
        M = A @ like.A[m].double().T + B.T @ like.B[m].double()
        torch.testing.assert_close(M, M.T, rtol=0, atol=20 * tolerance * float(M.norm()))
        assert float(torch.linalg.eigvalsh(M)[0]) > -20 * tolerance * float(M.norm())


def test_flexlora_names_what_is_wrong():
    uploads, reference, weights = federation()
    for gauge in ("reference", "singular"):
        with pytest.raises(ValueError, match=r"weights.*-1"):
            FlexLoRA(gauge).aggregate(uploads, reference, torch.tensor([1.0, -1, 1, 1]))
        with pytest.raises(
            ValueError, match=r"clients have layers .* the reference has \['other'\]"
        ):
            other = Factors({"other": torch.ones(4, 3)}, {"other": torch.ones(3, 4)})
            FlexLoRA(gauge).aggregate(uploads, other, weights)


@pytest.mark.parametrize("size", [1e-19, 1e-12, 1e-6, 1e8, 1e12, 1e17])
def test_the_size_of_the_factors_changes_nothing(size):
    """In float32, whose numbers end at 1e38: what a rule loses is the same share of the whole. A
    truncation of mixed ranks gives the same rank, and 1e17 overflows nothing."""
    uploads, reference, weights = federation()

    def scaled(factors, by):
        A, B = ({m: (by * t).float() for m, t in f.items()} for f in (factors.A, factors.B))
        return Factors(A, B)

    for method in (
        FedRot(1.0, "gpa"),
        FedRot(1.0, "optimal"),
        FedRot("auto", "optimal"),
        FedRot(rotation="shifted"),
        FlexLoRA("reference"),  # clients of rank 2 to 4
    ):
        shares = []
        for by in (1.0, size):
            own = [scaled(u, by) for u in uploads]
            result = method.aggregate(own, scaled(reference, by), weights)
            zero = Factors(*({m: 0 * t for m, t in f.items()} for f in (result.A, result.B)))
            lost, all_of_it = (total(error(own, r, weights)) for r in (result, zero))
            shares.append(lost / all_of_it)
        assert shares[1] == pytest.approx(shares[0], rel=1e-4), method
        assert 0.1 < shares[0] < 0.95  # there is something to lose, and to keep
