"""Batched local training is N separate trainings; a regauged adapter is the same adapter."""

from __future__ import annotations

import pytest
import torch
from small import SMALL

from fedrot.config import load
from fedrot.factors import Factors
from fedrot.gauge import haar, regauge
from fedrot.methods import Server
from fedrot.options import merge, parse_overrides
from fedrot.simulation import grouped
from fedrot.simulation import memory as memory_module
from fedrot.simulation.adapter import draw_factors, get_factors, parameter_names, set_factors
from fedrot.simulation.grouped import GroupedLinear
from fedrot.simulation.local import NO_EXAMPLE, draw_batches, train_clients
from fedrot.simulation.memory import remember
from fedrot.simulation.rounds import prepare, train_round
from fedrot.simulation.seeding import generator


@pytest.fixture(scope="module")
def federation():
    return prepare(load(parse_overrides(SMALL)))


def one_client(federation, start: Factors, rows: torch.Tensor, local, parts="AB", head=()):
    """The ordinary way: PEFT's own forward and backward, a client at a time."""
    model, train = set_factors(federation.model, start), federation.data.train
    names = [pair["AB".index(part)] for pair in parameter_names(model).values() for part in parts]
    names += [f"base_model.model.{name}" for name in head]
    kept = {name: model.get_parameter(name).detach().clone() for name in names}
    trained = [model.get_parameter(name).requires_grad_() for name in names]
    groups = [
        {"params": [p], "lr": local.lr * (local.lr_ratio if "lora_B" in name else 1)}
        for name, p in zip(names, trained, strict=True)
    ]
    options = {"weight_decay": local.weight_decay}
    if local.optimizer == "sgd":
        options["momentum"] = local.momentum
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    optimizer = kind[local.optimizer](groups, **options)
    losses = []
    for step in rows:
        batch = {key: value[step[step >= 0]] for key, value in train.items()}
        optimizer.zero_grad()
        loss = model(**batch).loss
        losses.append(loss.item())
        for p, name in zip(trained, names, strict=True):
            loss = loss + local.prox / 2 * (p - kept[name]).square().sum()
        loss.backward()
        if local.clip is not None:
            torch.nn.utils.clip_grad_norm_(trained, local.clip)
        optimizer.step()
    factors = get_factors(model)
    heads = {
        name: model.get_parameter(f"base_model.model.{name}").detach().clone() for name in head
    }
    with torch.no_grad():
        for name in head:
            parameter = model.get_parameter(f"base_model.model.{name}")
            parameter.requires_grad_(False).copy_(kept[f"base_model.model.{name}"])
    return factors, heads, sum(losses) / len(losses)


WAYS = {
    "sgd": ["local.lr=0.3"],
    "adam": ["local.optimizer=adam", "local.lr=1e-2"],
    "adamw": ["local.optimizer=adamw", "local.lr=1e-2", "local.weight_decay=0.5"],
    "momentum": ["local.momentum=0.9", "local.lr=0.1"],
    "prox": ["local.prox=2", "local.lr=0.3"],
    "lora+": ["local.lr_ratio=8", "local.lr=0.1"],
    "clip": ["local.clip=0.05", "local.lr=3"],
    "epochs": ["local.epochs=1", "local.batch_size=20", "local.momentum=0.9", "local.lr=0.1"],
    "micro-batches": ["local.micro_batch=5", "local.optimizer=adam", "local.lr=1e-2"],
    "micro-batches of epochs": ["local.epochs=1", "local.batch_size=20", "local.micro_batch=8"],
    "two at a time": ["local.together=2"],
    "thin products": ["local.lr=0.3"],
    "head": [
        "local.lr=0.1",
        "local.lr_ratio=0.5",
    ],  # at 0.3 the steps multiply rounding a hundredfold
    "A": ["local.lr=0.3"],
    "B": ["local.lr=0.3"],
}


@pytest.mark.parametrize("way", WAYS)
def test_batched_equals_one_client_at_a_time(federation, way, monkeypatch):
    if way == "thin products":
        monkeypatch.setattr(grouped, "MERGED", 0)
    local = load(parse_overrides(["local.steps=8", *WAYS[way]])).local
    parts = way if way in "AB" else "AB"
    head = ["classifier.weight", "classifier.bias"] if way == "head" else []
    starts = [draw_factors(federation.model, generator(5, "start", i)) for i in range(4)]
    for factors in starts:  # with B = 0 the first steps would hardly move A
        factors.B.update({name: torch.full_like(B, 0.05) for name, B in factors.B.items()})
    rows = [
        draw_batches(federation.examples[i], local, generator(5, "batches", i)) for i in range(4)
    ]
    base = federation.model.base_model.model
    heads = [{name: base.get_parameter(name).detach() + 0.1 * i for name in head} for i in range(4)]
    done = train_clients(
        federation.model,
        starts,
        federation.data.train,
        rows,
        local,
        parts=parts,
        heads=heads,
        memory=federation.memory,
    )
    for i in range(4):
        with torch.no_grad():
            before = {name: base.get_parameter(name).clone() for name in head}
            for name in head:
                base.get_parameter(name).copy_(heads[i][name])
        alone, own_head, loss = one_client(federation, starts[i], rows[i], local, parts, head)
        with torch.no_grad():
            for name in head:
                base.get_parameter(name).copy_(before[name])
        assert float(done.losses[i]) == pytest.approx(loss, abs=1e-5)
        moved = done.factors[i]
        for name in alone.A:
            # The start differs from the result by far more than the tolerance.
            for part in parts:
                old, new = getattr(starts[i], part)[name], getattr(moved, part)[name]
                assert float((new - old).norm()) > 1e-3
            torch.testing.assert_close(moved.A[name], alone.A[name], rtol=0, atol=5e-5)
            torch.testing.assert_close(moved.B[name], alone.B[name], rtol=0, atol=5e-5)
            if parts != "AB":
                frozen = "B" if parts == "A" else "A"
                assert torch.equal(getattr(moved, frozen)[name], getattr(starts[i], frozen)[name])
        for name in head:
            assert float((done.heads[i][name] - heads[i][name]).norm()) > 1e-3
            torch.testing.assert_close(done.heads[i][name], own_head[name], rtol=0, atol=5e-5)


def test_smaller_ranks_train_as_they_would_alone(federation):
    local = load(parse_overrides(["local.steps=6", "local.optimizer=adam", "local.lr=1e-2"])).local
    starts = [draw_factors(federation.model, generator(5, "start", i)) for i in range(3)]
    for client, r in enumerate((1, 3)):
        A = {name: A[:r] for name, A in starts[client].A.items()}
        B = {name: B[:, :r] for name, B in starts[client].B.items()}
        starts[client] = Factors(A, B)
    rows = [
        draw_batches(federation.examples[i], local, generator(5, "batches", i)) for i in range(3)
    ]
    train = federation.data.train
    together = train_clients(federation.model, starts, train, rows, local)
    for i in range(3):
        alone = train_clients(federation.model, starts[i : i + 1], train, rows[i : i + 1], local)
        for name in starts[i].A:
            for part in "AB":
                actual = getattr(together.factors[i], part)[name]
                assert actual.shape == getattr(starts[i], part)[name].shape
                expected = getattr(alone.factors[0], part)[name]
                torch.testing.assert_close(actual, expected, rtol=0, atol=5e-5)


def test_an_epoch_sees_every_example_once():
    examples = torch.arange(100, 137)
    local = load(parse_overrides(["local.epochs=2", "local.batch_size=8"])).local
    rows = draw_batches(examples, local, generator(0, "batches"))
    assert rows.shape == (10, 8)
    for epoch in rows.view(2, 5, 8):
        seen = epoch[epoch != NO_EXAMPLE]
        assert torch.equal(seen.sort().values, examples)
        assert int((epoch[:-1] == NO_EXAMPLE).sum()) == 0
    assert not torch.equal(rows[:5], rows[5:])


def test_a_grouped_layer_is_its_layers():
    weight, bias, x = torch.randn(3, 5, 4), torch.randn(3, 5), torch.randn(6, 2, 7, 4)
    for b in (None, bias):
        y = GroupedLinear(weight, b)(x)
        for i in range(3):
            own = torch.nn.functional.linear(
                x[2 * i : 2 * i + 2], weight[i], None if b is None else b[i]
            )
            torch.testing.assert_close(y[2 * i : 2 * i + 2], own)


def test_frozen_parameters_and_inputs_stay(federation):
    before = {n: p.clone() for n, p in federation.model.named_parameters()}
    start = draw_factors(federation.model, generator(1, "start", 0))
    copies = {n: t.clone() for n, t in start.A.items()}
    train_round(federation, Server(start))
    after = dict(federation.model.named_parameters())
    assert list(after) == list(before)
    assert all(torch.equal(before[n], p) for n, p in after.items())
    assert all(torch.equal(copies[n], t) for n, t in start.A.items())


def test_a_client_does_not_depend_on_the_others(federation):
    """Batches belong to (seed, round, client); more clients in the pass change rounding only."""
    local = load(parse_overrides(SMALL)).local
    start = draw_factors(federation.model, generator(0, "start", 0))
    rows = [
        draw_batches(federation.examples[i], local, generator(0, "batches", 0, i)) for i in range(4)
    ]
    train = federation.data.train
    together = train_clients(federation.model, [start] * 4, train, rows, local).factors
    two = train_clients(federation.model, [start] * 2, train, rows[:2], local).factors
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
    plain = train_round(federation, Server(start)).factors
    own = train_round(prepare(load(options)), Server(start)).factors
    for a, b in zip(plain, own, strict=True):
        for name in a.A:
            product = a.B[name] @ a.A[name]
            torch.testing.assert_close(b.B[name] @ b.A[name], product, rtol=0, atol=1e-6)
            assert float((b.A[name] - a.A[name]).norm()) > 0.1
    again = regauge(plain[0], generator(0, "gauge", 0, 0))
    assert all(torch.equal(again.A[n], own[0].A[n]) for n in again.A)


def test_memory_holds_what_no_trained_parameter_reaches(federation):
    memory, train = federation.memory, federation.data.train
    assert "vit.embeddings" in memory.outputs
    kept = [name for name in memory.outputs if name != "vit.embeddings"]
    # Of the first block the norm and the key, which is not adapted; of the second nothing.
    assert len(kept) == 2 and all(".0." in name for name in kept)
    model = federation.model
    rows = torch.tensor([5, 0, 5, 300])
    batch = {"pixel_values": train["pixel_values"][rows]}
    plain = model(**batch).logits
    # Even with another input: it is looked up.
    batch = {"pixel_values": torch.zeros_like(batch["pixel_values"])}
    memory.rows = rows
    with memory.recalled(model):
        torch.testing.assert_close(model(**batch).logits, plain, rtol=0, atol=1e-6)
    assert float((model(**batch).logits - plain).detach().abs().max()) > 1e-3


def test_memory_is_bounded_and_leaves_sequences_alone(federation, monkeypatch):
    train = federation.data.train
    padded = {**train, "attention_mask": torch.ones(len(train["labels"]), 9)}
    assert remember(federation.model, padded).outputs == {}
    kept = sum(t.nbytes for t in federation.memory.outputs.values())
    monkeypatch.setattr(memory_module, "LARGEST", kept)
    assert remember(federation.model, train).outputs.keys() == federation.memory.outputs.keys()
    monkeypatch.setattr(memory_module, "LARGEST", kept - 1)
    assert remember(federation.model, train).outputs == {}
