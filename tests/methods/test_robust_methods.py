"""Robust averages by hand, and against attackers that spoil plain and unaligned ones."""

from __future__ import annotations

import pytest
import torch

from fedrot.factors import Factors, truncate
from fedrot.gauge import regauge
from fedrot.methods import FedRot, Robust, Server
from fedrot.methods.robust import krum, product_distances, trimmed_mean
from fedrot.optimizers import ServerOptimizer
from fedrot.server import Upload, serve
from fedrot.streaming import StreamingAggregator

RULES = {
    "median": Robust("median"),
    "trimmed": Robust("trimmed", attackers=3),
    "krum": Robust("krum", attackers=3),
    "multi-krum": Robust("multi-krum", attackers=3),
    "clip": Robust("clip"),
}


def scalar(B: float, A: float = 1.0) -> Factors:
    """One layer of rank 1: the rotation is 1 as long as both factors stay positive."""
    return Factors({"m": torch.tensor([[A]])}, {"m": torch.tensor([[B]])})


REFERENCE = scalar(1.0)
CLIENTS = [scalar(2.0), scalar(1.5), scalar(2.5), scalar(1.0), scalar(100.0)]


@pytest.mark.parametrize(
    ("method", "B"),
    [
        (Robust("median"), 2.0),
        (Robust("trimmed", attackers=1), 2.0),  # of 1.5, 2, 2.5
        (Robust("trimmed", attackers=0), 21.4),
        # Squared distances to the two nearest: .25 + .25, .25 + .25, .25 + 1, .25 + 1, far.
        (Robust("krum", attackers=1), 2.0),
        (Robust("multi-krum", attackers=1), 1.75),  # all but the last
        # Changes 1, .5, 1.5, 0, 99, of which the median is 1: 1, .5, 1, 0, 1 remain.
        (Robust("clip"), 1.7),
        (Robust("clip", bound=0.25), 1.2),
    ],
)
def test_by_hand(method, B):
    out = method.aggregate(CLIENTS, REFERENCE)
    torch.testing.assert_close(out.B["m"], torch.tensor([[B]]))
    torch.testing.assert_close(out.A["m"], torch.tensor([[1.0]]))


def test_weights():
    weights = torch.tensor([1.0, 3.0, 0.0, 0.0, 4.0])
    # Two clients and an outlier: one vote each for the median, their weights when clipped.
    out = Robust("median").aggregate(CLIENTS, REFERENCE, weights)
    assert out.B["m"].item() == 2.0
    out = Robust("clip").aggregate(CLIENTS, REFERENCE, weights)  # changes 1, .5, 99: no more than 1
    assert out.B["m"].item() == pytest.approx(1 + (1 * 1 + 3 * 0.5 + 4 * 1) / 8)
    weights = torch.tensor([1.0, 3.0, 2.0, 2.0, 4.0])
    out = Robust("multi-krum").aggregate(CLIENTS, REFERENCE, weights)
    assert out.B["m"].item() == pytest.approx((2 + 3 * 1.5 + 2 * 2.5 + 2 * 1) / 8)


def federation(clients=10, *, seed=0, bases=True, dtype=torch.float32):
    """Honest clients near the reference, in bases of their own; layers of two ranks."""
    gen = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    shapes = {"q": (12, 9, 4), "v": (8, 10, 4), "head": (5, 7, 2)}
    ref = Factors(
        {m: randn(r, k) for m, (_, k, r) in shapes.items()},
        {m: randn(d, r) for m, (d, _, r) in shapes.items()},
    )
    uploads = []
    for _ in range(clients):
        near = Factors(
            {m: A + 0.1 * randn(*A.shape) for m, A in ref.A.items()},
            {m: B + 0.1 * randn(*B.shape) for m, B in ref.B.items()},
        )
        uploads.append(regauge(near, gen) if bases else near)
    return cast(ref, dtype), [cast(u, dtype) for u in uploads]


def cast(f: Factors, dtype) -> Factors:
    return Factors(*({m: t.to(dtype) for m, t in side.items()} for side in (f.A, f.B)))


def attack(kind: str, honest: Factors, reference: Factors, gen: torch.Generator) -> Factors:
    def spoil(t, ref):
        if kind == "sign flip":
            return ref - 10 * (t - ref)
        return t + 10 * torch.randn(t.shape, generator=gen, dtype=t.dtype)

    return Factors(
        {m: spoil(A, reference.A[m]) for m, A in honest.A.items()},
        {m: spoil(B, reference.B[m]) for m, B in honest.B.items()},
    )


def distance(f: Factors, target: dict[str, torch.Tensor]) -> float:
    """Of the products, relative to the target."""
    squares = [(f.B[m] @ f.A[m] - t).square().sum() for m, t in target.items()]
    return float(sum(squares) / sum(t.square().sum() for t in target.values())) ** 0.5


@pytest.mark.parametrize("kind", ["sign flip", "noise"])
@pytest.mark.parametrize("rule", RULES)
def test_planted_attackers(rule, kind):
    """Three of ten. The plain average of aligned clients is far off, several times what there is to
    find; the robust ones in the clients' own bases find little of it."""
    reference, uploads = federation()
    gen = torch.Generator().manual_seed(1)
    honest = {m: sum(u.B[m] @ u.A[m] for u in uploads[:7]) / 7 for m in reference.A}
    # The attackers, unlike the honest, need not care for a basis: the aligned one hurts most.
    near = federation(bases=False, seed=2)[1]
    uploads = uploads[:7] + [attack(kind, u, reference, gen) for u in near[7:]]
    robust = distance(RULES[rule].aggregate(uploads, reference), honest)
    plain = distance(FedRot(lam=1.0).aggregate(uploads, reference), honest)
    assert robust < 0.15 and plain > 5
    if rule != "krum":  # one client, whose basis does not matter
        options = {"attackers": RULES[rule].attackers, "lam": 0.0}
        unaligned = distance(Robust(rule, **options).aggregate(uploads, reference), honest)
        assert unaligned > 0.6


@pytest.mark.parametrize("rule", RULES)
def test_a_basis_of_the_clients_own_changes_nothing(rule):
    """With M far from singular the aligned clients are the same, whatever the basis."""
    reference, uploads = federation(dtype=torch.float64)
    gen = torch.Generator().manual_seed(3)
    again = [regauge(u, gen) for u in uploads]
    one, two = (RULES[rule].aggregate(u, reference) for u in (uploads, again))
    for m in reference.A:
        torch.testing.assert_close(one.A[m], two.A[m])
        torch.testing.assert_close(one.B[m], two.B[m])


@pytest.mark.parametrize("align", ["joint", "A", "B"])
def test_without_attackers_and_cuts_it_is_fedrot(align):
    reference, uploads = federation(5, dtype=torch.float64)
    mean = FedRot(1.0, align, proper=False).aggregate(uploads, reference)
    for rule, options in (
        ("trimmed", {"attackers": 0}),
        ("multi-krum", {"attackers": 0}),
        ("clip", {"bound": 1e6}),
    ):
        out = Robust(rule, **options, align=align).aggregate(uploads, reference)
        for m in reference.A:
            torch.testing.assert_close(out.A[m], mean.A[m])
            torch.testing.assert_close(out.B[m], mean.B[m])


def test_distances_are_those_of_the_products():
    reference, uploads = federation(4, dtype=torch.float64)
    uploads[1] = truncate(uploads[1], 2)  # a smaller rank
    found = product_distances(uploads, reference)
    for i, a in enumerate(uploads):
        for j, b in enumerate(uploads):
            squares = [(a.B[m] @ a.A[m] - b.B[m] @ b.A[m]).square().sum() for m in reference.A]
            assert float(found[i, j]) == pytest.approx(float(sum(squares)), abs=1e-9)


def test_smaller_ranks_and_narrow_dtypes():
    reference, uploads = federation(5, dtype=torch.bfloat16)
    uploads[0] = truncate(uploads[0], 2)
    for method in (Robust("median"), Robust("krum"), Robust("clip")):
        out = method.aggregate(uploads, reference)
        for m in reference.A:
            assert out.A[m].dtype == torch.bfloat16 and out.A[m].shape == reference.A[m].shape
        exact = {m: reference.B[m].float() @ reference.A[m].float() for m in reference.A}
        assert distance(cast(out, torch.float32), exact) < 0.3


def test_clip_with_a_client_that_did_not_move():
    out = Robust("clip").aggregate([REFERENCE, REFERENCE, scalar(9.0)], REFERENCE)
    assert out.B["m"].item() == 1.0  # the median length is 0: nobody moves
    torch.testing.assert_close(trimmed_mean(torch.tensor([4.0, 1, 9, 2]), 1), torch.tensor(3.0))
    assert krum(torch.zeros(4, 4), 1) == [0, 1, 2, 3]


def streamed(uploads, reference, weights, **options) -> StreamingAggregator:
    aggregator = StreamingAggregator(reference, lam=1.0, **options)
    for client, weight in zip(uploads, weights, strict=True):
        aggregator.accept(client, weight)
    return aggregator


def test_clip_streams():
    by_hand = streamed(CLIENTS, REFERENCE, [1.0] * 5, bound=0.25).finish()
    assert by_hand.B["m"].item() == pytest.approx(1.2)  # changes 1, .5, 1.5, 0, 99
    reference, uploads = federation()
    weights = torch.arange(1.0, 11.0)
    for proper in (True, False):
        clip = Robust("clip", bound=1.0, proper=proper)
        expected = clip.aggregate(uploads, reference, weights)
        out = streamed(uploads, reference, weights, bound=1.0, proper=proper).finish()
        plain = streamed(uploads, reference, weights, proper=proper).finish()
        for side in ("A", "B"):
            for module, t in getattr(expected, side).items():
                torch.testing.assert_close(getattr(out, side)[module], t, atol=1e-5, rtol=1e-5)
                assert (getattr(plain, side)[module] - t).abs().max() > 0.01


def test_bounds_of_the_stream():
    for bound in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="bound must be positive"):
            StreamingAggregator(REFERENCE, bound=bound)
    one, other = (streamed(CLIENTS, REFERENCE, [1.0] * 5, bound=b) for b in (1.0, 2.0))
    with pytest.raises(ValueError, match=r"same options.*'bound': 1\.0.*'bound': 2\.0"):
        one.merge(other)
    with pytest.raises(ValueError, match="same reference and options"):
        one.load_state_dict(other.state_dict())


def test_what_is_refused():
    for options, message in [
        ({"rule": "mean"}, "rule must be median, trimmed"),
        ({"attackers": -1}, "attackers must not be negative, got -1"),
        ({"rule": "trimmed", "attackers": 0.5}, "attackers must be a whole number, got 0.5"),
        ({"attackers": 2}, "attackers=2 is for trimmed, krum, multi-krum; median has no number"),
        ({"bound": 2.0}, "bound=2.0 is for rule=clip, got rule=median"),
        ({"bound": float("inf")}, "bound must be finite"),
        ({"align": "gpa"}, "align must be joint, A or B, got 'gpa'"),
        ({"lam": "auto"}, "lam must be a number, got 'auto'"),
        ({"lam": 1.5}, "lam"),
    ]:
        with pytest.raises(ValueError, match=message):
            Robust(**options)
    with pytest.raises(
        ValueError, match="rule=trimmed with attackers=2 needs at least 5 clients, got 4"
    ):
        Robust("trimmed", attackers=2).aggregate(CLIENTS[:4], REFERENCE)
    with pytest.raises(
        ValueError, match="rule=krum with attackers=2 needs at least 7 clients, got 4"
    ):
        Robust("krum", attackers=2).aggregate(CLIENTS[:4], REFERENCE)
    with pytest.raises(ValueError, match="client 1 has layers"):
        other = Factors({"x": torch.ones(1, 1)}, {"x": torch.ones(1, 1)})
        Robust().aggregate([CLIENTS[0], other], REFERENCE)
    with pytest.raises(ValueError, match="at least one client"):
        Robust().aggregate([], REFERENCE)
    for weights in ([1.0, 1], [1.0, 1, 1, 1, -1], [1.0, 1, 1, 1, float("nan")]):
        with pytest.raises(ValueError, match="weights"):
            Robust().aggregate(CLIENTS, REFERENCE, torch.tensor(weights))
    with pytest.raises(ValueError, match="client 4, layer m"):
        Robust().aggregate([*CLIENTS[:4], scalar(float("inf"))], REFERENCE)


HEADS = [{"bias": torch.tensor([h, 0.0])} for h in (2.0, 1.5, 2.5, 1.0, 100.0)]
START = {"bias": torch.tensor([1.0, 0.0])}


@pytest.mark.parametrize(
    ("method", "bias"),
    [  # the numbers of test_by_hand
        (Robust("median"), 2.0),
        (Robust("trimmed", attackers=1), 2.0),
        (Robust("krum", attackers=1), 2.0),
        (Robust("multi-krum", attackers=1), 1.75),
        (Robust("clip"), 1.7),
        (Robust("clip", bound=0.25), 1.2),
        (FedRot(), 21.4),  # every other method: the weighted mean
    ],
)
def test_what_lies_beside_the_factors_by_hand(method, bias):
    out = method.average_rest(HEADS, START)
    assert out.keys() == {"bias"} and out["bias"].dtype == torch.float64
    torch.testing.assert_close(out["bias"], torch.tensor([bias, 0.0], dtype=torch.float64))
    assert method.average_rest([{}] * 5, {}) == {}
    update = serve(
        method,
        ServerOptimizer(),
        Server(REFERENCE, head=START),
        [Upload(i, f, h) for i, (f, h) in enumerate(zip(CLIENTS, HEADS, strict=True))],
    )
    torch.testing.assert_close(update.server.head["bias"], torch.tensor([bias, 0.0]))


def test_weights_beside_the_factors():
    weights = torch.tensor([1.0, 3.0, 0.0, 0.0, 4.0])
    assert Robust("median").average_rest(HEADS, START, weights)["bias"][0] == 2.0
    clip = Robust("clip").average_rest(HEADS, START, weights)["bias"][0]
    assert float(clip) == pytest.approx(1 + (1 * 1 + 3 * 0.5 + 4 * 1) / 8)
    mean = FedRot().average_rest(HEADS, START, weights)["bias"][0]
    assert float(mean) == pytest.approx((2 + 3 * 1.5 + 4 * 100) / 8)
    with pytest.raises(ValueError, match="needs at least 5 clients, got 3"):
        Robust("krum").average_rest(HEADS, START, weights)
    for value in (torch.inf, torch.nan):
        bad = [*HEADS[:4], {"bias": torch.tensor([0.0, value])}]
        for method in (Robust("clip"), Robust("median"), FedRot()):
            with pytest.raises(ValueError, match="client 4: bias is not finite"):
                method.average_rest(bad, START)


@pytest.mark.parametrize("rule", ["krum", "multi-krum"])
def test_krum_withstands_bad_clients_that_send_the_same(rule):
    """They are at no distance from each other: with ``N = 2 f + 3`` an honest client has as many
    near ones, with fewer it would lose."""
    clients = [scalar(2.0), scalar(2.1), scalar(1.9), scalar(2.2), scalar(1.8)]
    out = Robust(rule, attackers=2).aggregate([*clients, *[scalar(-100.0)] * 2], REFERENCE)
    assert 1.8 <= (out.B["m"] @ out.A["m"]).item() <= 2.2
    squares = product_distances([*clients[:4], *[scalar(-100.0)] * 2], REFERENCE)
    assert krum(squares, 3)[0] == 4  # what is refused


def test_krum_ties_go_to_the_lower_number():
    """With ``N = f + 3`` the two closest have each other as their only nearest: always a tie."""
    for seed in range(60):
        reference, uploads = federation(4, seed=seed, dtype=torch.float64)
        squares = product_distances(uploads, reference)
        assert torch.equal(squares, squares.T)
        closest = squares.clone().fill_diagonal_(torch.inf).argmin()
        pair = sorted(divmod(int(closest), 4))
        assert krum(squares, 1)[:2] == pair


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [1e25, 3e38])
def test_the_largest_numbers_there_are_do_not_end_the_round(rule, size):
    """Finite values whose squares, or whose products with a reference, are not."""
    reference, uploads = federation()
    honest = {m: sum(u.B[m] @ u.A[m] for u in uploads[:7]) / 7 for m in reference.A}
    for upload in uploads[7:]:
        for t in (*upload.A.values(), *upload.B.values()):
            t.sign_().mul_(size)
    assert distance(RULES[rule].aggregate(uploads, reference), honest) < 0.15


def test_an_empty_factor_is_named():
    empty = Factors({"m": torch.zeros(0, 1)}, {"m": torch.zeros(1, 0)})
    with pytest.raises(ValueError, match=r"lora_A must be \(r <= 1, 1\) for client 2, layer m"):
        Robust("median").aggregate([scalar(1.0), scalar(2.0), empty], REFERENCE)


def test_huge_clients_are_left_alone_where_they_are_half():
    uploads = [scalar(1e20), scalar(2e20), scalar(3.0)]
    assert Robust("median").aggregate(uploads, REFERENCE).B["m"].item() == pytest.approx(1e20)
    uploads.append(scalar(4.0))  # of four, the middle two are 4 and 1e20
    assert Robust("median").aggregate(uploads, REFERENCE).B["m"].item() == pytest.approx(5e19)


def test_narrow_heads_are_rounded_once():
    """A third of 1 is no bfloat16, and with two thirds of it no longer 1."""
    heads = [{"bias": torch.ones(1, dtype=torch.bfloat16)}] * 2
    mean = FedRot().average_rest(heads, heads[0], torch.tensor([1.0, 2.0]))
    assert float(mean["bias"]) == pytest.approx(1.0, abs=1e-12)
