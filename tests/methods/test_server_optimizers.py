"""Server optimizers: each step against the formula, written out, over several rounds."""

from __future__ import annotations

import pytest
import torch

from fedrot.factors import Factors
from fedrot.methods import FedIT, FedRot, FedSALoRA, FLoRA, RoLoRA, Server
from fedrot.optimizers import ServerOptimizer
from fedrot.server import Upload, serve

LR, M, B1, B2, EPS = 0.5, 0.8, 0.7, 0.9, 0.01


def by_hand(kind, gradients, x):
    """The published update, with Adam's bias correction (Adam, Yogi)."""
    m = v = torch.zeros_like(x)
    for t, g in enumerate(gradients, start=1):
        if kind == "fedavg":
            x = x - LR * g
        elif kind == "fedavgm":
            m = M * m + g
            x = x - LR * m
        elif kind == "fedadagrad":
            v = v + g**2
            x = x - LR * g / (v.sqrt() + EPS)
        else:
            m = B1 * m + (1 - B1) * g
            if kind == "fedadam":
                v = B2 * v + (1 - B2) * g**2
            else:
                v = v - (1 - B2) * torch.sign(v - g**2) * g**2
            x = x - LR * (m / (1 - B1**t)) / ((v / (1 - B2**t)).sqrt() + EPS)
    return x


@pytest.mark.parametrize("kind", ["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad"])
def test_steps_by_hand(kind):
    torch.manual_seed(0)
    optimizer = ServerOptimizer(kind, LR, M, B1, B2, EPS)
    # Gradients that shrink, so that Yogi's second moment has to go down as well as up.
    gradients = [torch.randn(3, 2) * 4.0**-t for t in range(5)]
    x = start = torch.randn(3, 2)
    state = {}
    for g in gradients:
        before = x.clone()
        new, state = optimizer.step({"A/m": x}, {"A/m": x - g}, state)
        assert torch.equal(x, before)
        x = new["A/m"]
    torch.testing.assert_close(x, by_hand(kind, gradients, start), rtol=1e-5, atol=1e-6)
    assert float((x - start).norm()) > 0.1
    assert all(not t.requires_grad for t in [x, *state.values()])


def test_fedavg_with_rate_1_is_the_aggregate_bit_for_bit():
    before, after = {"A/m": torch.tensor([1e-8])}, {"A/m": torch.tensor([1.0])}
    assert ServerOptimizer().step(before, after, {}) == (after, {})
    assert not ServerOptimizer("fedavg", 0.5).plain and not ServerOptimizer("fedavgm").plain
    assert ServerOptimizer("fedavgm").rate == 1.0 and ServerOptimizer("fedyogi").rate == 0.01


def factors(a, b):
    return Factors({"m": torch.tensor([[float(a)]])}, {"m": torch.tensor([[float(b)]])})


def test_serve_steps_factors_and_head():
    """Two clients, half a step: 1 -> mean 4 gives 2.5, 2 -> mean 2 stays, head 0 -> 3 gives 1.5."""
    server = Server(factors(1, 2), head={"classifier.bias": torch.tensor([0.0])})
    uploads = [
        Upload(i, factors(a, b), {"classifier.bias": torch.tensor([h])})
        for i, (a, b, h) in enumerate([(2, 0, 2.0), (5, 3, 3.5)])
    ]
    weights = torch.tensor([1.0, 2.0])
    update = serve(FedIT(), ServerOptimizer("fedavg", 0.5), server, uploads, weights)
    new = update.server
    assert (float(new.factors.A["m"]), float(new.factors.B["m"])) == (2.5, 2.0)
    assert float(new.head["classifier.bias"]) == 1.5
    assert float(update.aggregate.A["m"]) == 4.0 and update.folded == {} == new.merged
    assert new.rounds == 1 and new.past[0].factors is server.factors and new.personal == {}


def test_a_frozen_factor_has_no_step_and_its_momentum_waits():
    """RoLoRA trains B in even rounds: its momentum must not move B in odd ones."""
    server, optimizer = Server(factors(1, 0)), ServerOptimizer("fedavgm", 1.0, momentum=0.5)
    history = []
    for a, b in [(9, 1), (3, 9), (9, 2)]:  # the 9s are of the factor that is frozen
        server = serve(RoLoRA(), optimizer, server, [Upload(0, factors(a, b), {})]).server
        history.append((float(server.factors.A["m"]), float(server.factors.B["m"])))
    # Round 2: gradient 1 - 2 = -1, momentum 0.5 * -1 - 1 = -1.5.
    assert history == [(1.0, 1.0), (3.0, 1.0), (3.0, 2.5)]


def test_personal_factors_are_kept_and_not_stepped():
    server = Server(factors(1, 0), personal={7: {"m": torch.tensor([[5.0]])}})
    uploads = [Upload(2, factors(3, 4), {}), Upload(7, factors(5, 8), {})]
    new = serve(FedSALoRA(), ServerOptimizer("fedavg", 0.5), server, uploads).server
    assert float(new.factors.A["m"]) == 2.5 and float(new.factors.B["m"]) == 6.0
    assert {client: float(B["m"]) for client, B in new.personal.items()} == {2: 4.0, 7: 8.0}


def test_serve_hands_on_what_a_method_needs():
    """The reference of two rounds ago, and the generator, on which FLoRA's next adapter hangs."""
    quarter = torch.tensor([[0.0, -1], [1, 0]])
    eye = Factors({"m": torch.eye(2)}, {"m": torch.eye(2)})
    turned = Factors({"m": quarter.T @ eye.A["m"]}, {"m": eye.B["m"] @ quarter})
    server = Server(turned, 2, past=(Server(eye, 1),))
    uploads = [Upload(0, turned, {})]
    aligned = serve(FedRot(1.0, lag=2), ServerOptimizer(), server, uploads).server
    torch.testing.assert_close(aligned.factors.A["m"], torch.eye(2))
    drawn = [
        serve(
            FLoRA(),
            ServerOptimizer(),
            server,
            uploads,
            generator=torch.Generator().manual_seed(seed),
        ).server.factors.A["m"]
        for seed in (0, 1)
    ]
    assert not torch.equal(*drawn)
