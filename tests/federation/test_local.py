"""Batched local training is N separate trainings; a regauged adapter is the same adapter."""

from __future__ import annotations

import pytest
import torch
from small import SMALL

from fedrot.config import load
from fedrot.factors import Factors
from fedrot.gauge import haar, regauge
from fedrot.options import merge, parse_overrides
from fedrot.simulation.adapter import draw_factors, get_factors, parameter_names, set_factors
from fedrot.simulation.local import draw_batches, train_clients
from fedrot.simulation.rounds import prepare, train_round
from fedrot.simulation.seeding import generator


@pytest.fixture(scope="module")
def federation():
    return prepare(load(parse_overrides(SMALL)))


def one_client(federation, start: Factors, rows: torch.Tensor, local) -> tuple[Factors, float]:
    """The ordinary way: PEFT's own forward and backward, a client at a time."""
    model, train = set_factors(federation.model, start), federation.data.train
    trained = [model.get_parameter(n) for pair in parameter_names(model).values() for n in pair]
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[local.optimizer]
    optimizer = kind(trained, lr=local.lr)
    losses = []
    for step in rows:
        optimizer.zero_grad()
        loss = model(**{key: value[step] for key, value in train.items()}).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return get_factors(model), sum(losses) / len(losses)


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", "0.3"), ("adam", "1e-2")])
def test_batched_equals_one_client_at_a_time(federation, optimizer, lr):
    options = parse_overrides(["local.steps=8", f"local.optimizer={optimizer}", f"local.lr={lr}"])
    local = load(options).local
    starts = [draw_factors(federation.model, generator(5, "start", i)) for i in range(4)]
    rows = [
        draw_batches(federation.examples[i], local, generator(5, "batches", i)) for i in range(4)
    ]
    batched, losses = train_clients(federation.model, starts, federation.data.train, rows, local)
    for i in range(4):
        alone, loss = one_client(federation, starts[i], rows[i], local)
        assert float(losses[i]) == pytest.approx(loss, abs=1e-5)
        for name in alone.A:
            # The start differs from the result by orders of magnitude more than this.
            assert float((alone.B[name] - starts[i].B[name]).norm()) > 1e-2
            torch.testing.assert_close(batched[i].A[name], alone.A[name], rtol=0, atol=2e-5)
            torch.testing.assert_close(batched[i].B[name], alone.B[name], rtol=0, atol=2e-5)


def test_frozen_parameters_and_inputs_stay(federation):
    before = {n: p.clone() for n, p in federation.model.named_parameters()}
    start = draw_factors(federation.model, generator(1, "start", 0))
    copies = {n: t.clone() for n, t in start.A.items()}
    train_round(federation, 0, start)
    assert all(torch.equal(before[n], p) for n, p in federation.model.named_parameters())
    assert all(torch.equal(copies[n], t) for n, t in start.A.items())


def test_a_client_does_not_depend_on_the_others(federation):
    """Batches belong to (seed, round, client); more clients in the pass change rounding only."""
    local = load(parse_overrides(SMALL)).local
    start = draw_factors(federation.model, generator(0, "start", 0))
    rows = [
        draw_batches(federation.examples[i], local, generator(0, "batches", 0, i)) for i in range(4)
    ]
    train = federation.data.train
    together, _ = train_clients(federation.model, [start] * 4, train, rows, local)
    two, _ = train_clients(federation.model, [start] * 2, train, rows[:2], local)
    for name in start.A:
        torch.testing.assert_close(together[1].B[name], two[1].B[name], rtol=0, atol=1e-6)


def test_generators_differ_by_purpose_and_index():
    keys = [(0, "a"), (1, "a"), (0, "b"), (0, "a", 0), (0, "a", 1), (0, "a", 1, 0)]
    draws = {float(torch.rand((), generator=generator(*key), dtype=torch.float64)) for key in keys}
    assert len(draws) == len(keys)
    assert torch.equal(
        torch.rand(3, generator=generator(4, "x", 2)), torch.rand(3, generator=generator(4, "x", 2))
    )


def test_haar_is_orthogonal_with_both_determinants():
    g = torch.Generator().manual_seed(0)
    draws = torch.stack([haar(4, g) for _ in range(400)])
    torch.testing.assert_close(
        draws.mT @ draws, torch.eye(4).double().expand(400, 4, 4), rtol=0, atol=1e-12
    )
    assert 0.4 < float((torch.linalg.det(draws) > 0).double().mean()) < 0.6
    # Uniform: entries have mean 0 and variance 1/4; the raw Q of LAPACK has Q[0, 0] <= 0 always.
    assert abs(float(draws[:, 0, 0].mean())) < 0.1
    assert float(draws.square().mean()) == pytest.approx(0.25)


def test_regauge_keeps_the_products(federation):
    options = merge(parse_overrides(SMALL), {"setting": "regauge"})
    start = draw_factors(federation.model, generator(0, "start", 0))
    plain = train_round(federation, 0, start).factors
    own = train_round(prepare(load(options)), 0, start).factors
    for a, b in zip(plain, own, strict=True):
        for name in a.A:
            product = a.B[name] @ a.A[name]
            torch.testing.assert_close(b.B[name] @ b.A[name], product, rtol=0, atol=1e-6)
            assert float((b.A[name] - a.A[name]).norm()) > 0.1
    again = regauge(plain[0], generator(0, "gauge", 0, 0))
    assert all(torch.equal(again.A[n], own[0].A[n]) for n in again.A)
