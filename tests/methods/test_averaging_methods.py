"""Averaging methods on two clients computed by hand, and what each keeps."""

from __future__ import annotations

import pytest
import torch

from fedrot.factors import Factors, padded, truncate
from fedrot.methods import METHODS, FedIT, FedRot, FedSALoRA, FFALoRA, HetLoRA, RoLoRA, Server

# One layer "m": k = 2, d = 1, r = 2. Clients 0 and 1, and the global factors they started from.
REFERENCE = Factors({"m": torch.tensor([[1.0, 0], [0, 1]])}, {"m": torch.tensor([[1.0, 1]])})
CLIENTS = [
    Factors({"m": torch.tensor([[3.0, 0], [0, 1]])}, {"m": torch.tensor([[2.0, 0]])}),
    Factors({"m": torch.tensor([[1.0, 4], [0, 3]])}, {"m": torch.tensor([[0.0, 4]])}),
]
WEIGHTS = torch.tensor([3.0, 1.0])
MEAN_A, MEAN_B = [[2.5, 1], [0, 1.5]], [[1.5, 1]]  # 3/4 of client 0, 1/4 of client 1


def check(factors: Factors, A, B):
    torch.testing.assert_close(factors.A["m"], torch.tensor(A))
    torch.testing.assert_close(factors.B["m"], torch.tensor(B))


def test_fedit():
    check(FedIT().aggregate(CLIENTS, REFERENCE, WEIGHTS), MEAN_A, MEAN_B)
    check(FedIT().aggregate(CLIENTS, REFERENCE), [[2.0, 2], [0, 2]], [[1.0, 2]])


def test_ffa_keeps_A():
    out = FFALoRA().aggregate(CLIENTS, REFERENCE, WEIGHTS)
    check(out, [[1.0, 0], [0, 1]], MEAN_B)
    assert [FFALoRA().parts(t) for t in range(3)] == ["B", "B", "B"]


def test_rolora_takes_turns():
    assert [RoLoRA().parts(t) for t in range(4)] == ["B", "A", "B", "A"]
    check(RoLoRA().aggregate(CLIENTS, REFERENCE, WEIGHTS, round=0), [[1.0, 0], [0, 1]], MEAN_B)
    check(RoLoRA().aggregate(CLIENTS, REFERENCE, WEIGHTS, round=1), MEAN_A, [[1.0, 1]])


def test_one_frozen_factor_makes_the_average_exact():
    """With the A (or B) of the reference in every upload, nothing is lost."""
    for parts, round in (("B", 0), ("A", 1)):
        uploads = [
            Factors(c.A if parts == "A" else REFERENCE.A, c.B if parts == "B" else REFERENCE.B)
            for c in CLIENTS
        ]
        out = RoLoRA().aggregate(uploads, REFERENCE, round=round)
        exact = sum(c.B["m"] @ c.A["m"] for c in uploads) / 2
        torch.testing.assert_close(out.B["m"] @ out.A["m"], exact)


def test_hetlora():
    """||B_0 A_0|| = |(6, 0)| = 6, ||B_1 A_1|| = |(0, 12)| = 12: weights 3 * 6 to 1 * 12."""
    out = HetLoRA().aggregate(CLIENTS, REFERENCE, WEIGHTS)
    check(out, [[2.2, 1.6], [0, 1.8]], [[1.2, 1.6]])
    check(HetLoRA(norm_weights=False).aggregate(CLIENTS, REFERENCE, WEIGHTS), MEAN_A, MEAN_B)
    zero = [Factors(c.A, {"m": torch.zeros(1, 2)}) for c in CLIENTS]
    check(HetLoRA().aggregate(zero, REFERENCE, WEIGHTS), MEAN_A, [[0.0, 0]])
    # Who has a product has no weight: the weights alone decide.
    check(
        HetLoRA().aggregate([zero[0], CLIENTS[1]], REFERENCE, torch.tensor([1.0, 0])),
        [[3.0, 0], [0, 1]],
        [[0.0, 0]],
    )


def test_hetlora_tails_by_hand():
    """Two layers, rank 3; decay .7 keeps int(2.1) = 2 directions, of rank 2 one, of rank 1 all."""
    A = {
        "m": torch.tensor([[[1.0, 1], [3, 4], [0, 2]], [[1, 1], [3, 4], [0, 0]]]),
        "n": torch.tensor([[[1.0, 1], [1, 0], [0, 1]], [[1, 1], [0, 1], [0, 0]]]),
    }
    B = {
        "m": torch.tensor([[[5.0, 1, 3]], [[5, 2, 0]]]),
        "n": torch.tensor([[[5.0, 1, 4]], [[5, 3, 0]]]),
    }
    method, ranks = HetLoRA(decay=0.7, penalty=0.5), [3, 2]
    tails = [2 * 3 + 1 * 4, 5 * 2 + 1 * 3]
    assert method.regularizer(A, B, ranks).tolist() == [0.5 * tails[0], 0.5 * tails[1]]
    assert method.regularizer(A, B, [1, 1]).tolist()[1] == 0.5 * tails[1]
    for p in (*A.values(), *B.values()):
        p.requires_grad_()
    method.regularizer(A, B, ranks).sum().backward()
    # d/dB ||B_tail|| ||A_tail|| = ||A_tail|| B_tail / ||B_tail||, and nothing of what is kept.
    assert B["m"].grad.tolist() == [[[0, 0, 0.5 * 2]], [[0, 0.5 * 5, 0]]]
    torch.testing.assert_close(A["m"].grad[1], torch.tensor([[0, 0], [0.6, 0.8], [0, 0]]))
    for idle in (HetLoRA(decay=1), HetLoRA(penalty=0)):
        assert idle.regularizer(A, B, ranks) is None


def test_hetlora_prunes_what_has_become_smaller():
    method = HetLoRA(decay=0.5)
    start, larger = CLIENTS  # tails of 0 * 1 and 4 * 3
    assert method.hand_in(start, larger) is larger
    check(method.hand_in(larger, start), [[3.0, 0]], [[2.0]])
    assert method.hand_in(start, start) is start
    one = truncate(larger, 1)
    assert method.hand_in(one, truncate(start, 1)).A["m"].shape == (1, 2)  # one direction stays
    assert HetLoRA(decay=1).hand_in(larger, start) is start
    wide = Factors({"m": torch.ones(100, 1)}, {"m": torch.ones(1, 100)})  # .29 * 100 < 29
    less = Factors(wide.A, {"m": 0.5 * wide.B["m"]})
    assert HetLoRA(decay=0.29).hand_in(wide, less).A["m"].shape == (29, 1)
    assert method.prunes and not HetLoRA(decay=1).prunes and not FedIT().prunes
    for wrong in ({"decay": 0}, {"decay": 1.1}, {"penalty": -1}, {"penalty": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            HetLoRA(**wrong)


def test_a_smaller_rank_is_padded_with_zeros():
    small = truncate(CLIENTS[0], 1)
    assert small.A["m"].shape == (1, 2) and small.B["m"].shape == (1, 1)
    for method in (FedIT(), HetLoRA(norm_weights=False)):
        check(method.aggregate([small, CLIENTS[1]], REFERENCE), [[2.0, 2], [0, 1.5]], [[1.0, 2]])
    assert FedIT().download(Server(REFERENCE), 0, 1).A["m"].tolist() == [[1.0, 0]]
    again = padded(small, 2)
    check(again, [[3.0, 0], [0, 0]], [[2.0, 0]])
    assert torch.equal(again.B["m"] @ again.A["m"], small.B["m"] @ small.A["m"])


def test_fedsa_starts_from_the_own_B():
    server = Server(REFERENCE, personal={1: {"m": torch.tensor([[7.0, 8]])}})
    check(FedSALoRA().download(server, 1), [[1.0, 0], [0, 1]], [[7.0, 8]])
    check(FedSALoRA().download(server, 0), [[1.0, 0], [0, 1]], [[0.0, 0]])
    check(FedSALoRA().aggregate(CLIENTS, REFERENCE, WEIGHTS), MEAN_A, MEAN_B)


@pytest.mark.parametrize("align", ["A", "B", "alternate", "joint"])
def test_fedrot_with_lam_0_is_fedit(align):
    for round in (0, 1, 2):
        out = FedRot(0.0, align).aggregate(CLIENTS, REFERENCE, WEIGHTS, round=round)
        check(out, MEAN_A, MEAN_B)


def test_fedrot_turns_a_client_back():
    """A client that is the reference turned by 90 degrees comes back whole."""
    quarter = torch.tensor([[0.0, -1], [1, 0]])
    turned = Factors({"m": quarter.T @ REFERENCE.A["m"]}, {"m": REFERENCE.B["m"] @ quarter})
    for align in ("A", "joint"):
        out = FedRot(1.0, align).aggregate([REFERENCE, turned], REFERENCE)
        check(out, [[1.0, 0], [0, 1]], [[1.0, 1]])
    check(
        FedRot(1.0, "alternate").aggregate([turned, turned], REFERENCE, round=0),
        [[0.0, 1], [-1, 0]],
        [[1.0, -1]],
    )


def test_alternate_is_A_in_odd_rounds_and_B_in_even():
    for round, align in ((1, "A"), (2, "B"), (3, "A")):
        ours = FedRot(1.0, "alternate").aggregate(CLIENTS, REFERENCE, round=round)
        theirs = FedRot(1.0, align).aggregate(CLIENTS, REFERENCE)
        assert torch.equal(ours.A["m"], theirs.A["m"]) and torch.equal(ours.B["m"], theirs.B["m"])


def test_scalar_rescaling():
    """A: s_0 = (3 + 1) / 10, s_1 = (1 + 3) / 26; B: s_0 = 2 / 4, s_1 = 4 / 16."""
    s, t = 0.4, 4 / 26
    out = FedRot(1.0, "A", rotation="scale").aggregate(CLIENTS, REFERENCE)
    check(out, [[(3 * s + t) / 2, 2 * t], [0, (s + 3 * t) / 2]], [[1 / s, 2 / t]])
    out = FedRot(1.0, "B", rotation="scale").aggregate(CLIENTS, REFERENCE)
    check(out, [[(6 + 4) / 2, 8.0], [0, (2 + 12) / 2]], [[0.5, 0.5]])
    half = FedRot(0.5, "B", rotation="scale").aggregate(CLIENTS[:1], REFERENCE)
    check(half, [[3 * 2**0.5, 0], [0, 2**0.5]], [[2**0.5, 0]])
    zero = Factors(REFERENCE.A, {"m": torch.zeros(1, 2)})  # nothing to fit to
    check(
        FedRot(1.0, "B", rotation="scale").aggregate(CLIENTS[:1], zero),
        [[3.0, 0], [0, 1]],
        [[2.0, 0]],
    )


def test_a_smaller_rank_is_rescaled_to_its_own_rows():
    """(1, 4) against the first row (1, 0) alone: s = 1 / 17."""
    one = truncate(CLIENTS[1], 1)
    out = FedRot(1.0, "A", rotation="scale").aggregate([one], REFERENCE)
    check(out, [[1 / 17, 4 / 17], [0, 0]], [[0.0, 0]])


def test_layers_are_never_mixed_up():
    """As many of them under other names, or the same in another order."""
    a, b = torch.ones(2, 2), 2 * torch.ones(2, 2)
    ours, turned = Factors({"a": a, "b": b}, {"a": a, "b": b}), {"b": b, "a": a}
    with pytest.raises(ValueError, match="client 1 has layers"):
        FedIT().aggregate([ours, Factors(turned, turned)], ours)
    with pytest.raises(ValueError, match=r"clients have layers .* the reference has \['b', 'a'\]"):
        FedIT().aggregate([ours], Factors(turned, turned))
    with pytest.raises(ValueError, match="A and B must name the same layers"):
        Factors(ours.A, turned)


def test_random_rotation_keeps_products_and_ruins_the_mean():
    method, g = FedRot(rotation="random"), torch.Generator().manual_seed(3)
    alone = method.aggregate(CLIENTS[:1], REFERENCE, generator=g)
    torch.testing.assert_close(alone.B["m"] @ alone.A["m"], torch.tensor([[6.0, 0]]))
    assert float((alone.A["m"] - CLIENTS[0].A["m"]).norm()) > 0.1
    assert torch.linalg.det(alone.A["m"]) > 0  # proper: a rotation keeps the sign of det A = 3
    one, two = (method.aggregate(CLIENTS, REFERENCE, round=t).A["m"] for t in (1, 2))
    assert torch.equal(one, method.aggregate(CLIENTS, REFERENCE, round=1).A["m"])
    assert not torch.equal(one, two)


def test_reference_of_the_round_before():
    older = Factors({"m": torch.ones(2, 2)}, {"m": torch.ones(1, 2)})
    server = Server(REFERENCE, past=(Server(older),))
    assert FedRot(lag=2).reference(server) is older
    assert FedRot(lag=2).reference(Server(REFERENCE)) is REFERENCE  # the first round
    assert all(METHODS[name]().reference(server) is REFERENCE for name in METHODS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": 1.5}, r"lam must lie in \[0, 1\], got 1.5"),
        ({"rotation": "scalar"}, "rotation must be procrustes, random, scale or shifted, got"),
        ({"rotation": "scale"}, "align must be A, B or alternate for rotation=scale"),
        ({"lag": 3}, "lag must be 1 or 2, got 3"),
        ({"rotation": "random", "lam": 1.0}, "lam has no effect with rotation=random, got 1.0"),
        ({"rotation": "shifted", "lam": 0.0}, "lam has no effect with rotation=shifted, got 0.0"),
        ({"rotation": "shifted", "lam": "auto"}, "lam has no effect with .*=shifted, got 'auto'"),
        ({"eps": 0.1}, "eps has no effect with rotation=procrustes, got 0.1"),
        ({"rotation": "random", "align": "A"}, "align has no effect with rotation=random, got 'A'"),
        ({"rotation": "random", "eps": 0.1}, "eps has no effect with rotation=random, got 0.1"),
        ({"rotation": "shifted", "eps": float("nan")}, "eps must be finite and not negative, got"),
    ],
)
def test_fedrot_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        FedRot(**options)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_leaves_its_inputs_and_keeps_shapes_and_dtype(name):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        clients = [
            Factors({"m": c.A["m"].to(dtype)}, {"m": c.B["m"].to(dtype)})
            for c in [truncate(CLIENTS[0], 1), CLIENTS[1]]
        ]
        reference = Factors({"m": REFERENCE.A["m"].to(dtype)}, {"m": REFERENCE.B["m"].to(dtype)})
        before = [(f.A["m"].clone(), f.B["m"].clone()) for f in [*clients, reference]]
        out = METHODS[name]().aggregate(clients, reference, WEIGHTS)
        assert out.A["m"].shape == (2, 2) and out.B["m"].shape == (1, 2)
        assert out.A["m"].dtype == out.B["m"].dtype == dtype
        for f, (A, B) in zip([*clients, reference], before, strict=True):
            assert torch.equal(f.A["m"], A) and torch.equal(f.B["m"], B)
